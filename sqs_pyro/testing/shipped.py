"""What every compression result promises, as one assertion: :func:`assert_shipped`."""

import copy
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from sqs_pyro import CompressionResult, load, save, size_report
from sqs_pyro.networks.calling import call_arguments


def assert_shipped(result: CompressionResult, inputs: Any, *, relative: float = 1e-5) -> Tensor:
    """Assert that what was compressed is what ships.

    Packed equals hard, a file of it reloads to the same bits, its size is the reported one, every compressed
    weight is zero or a codeword, and the zeros are as many as were asked for.

    Args:
        result: of ``compress``.
        inputs: of the network, as a loader gives them: a tensor, a tuple or a mapping.
        relative: largest difference allowed, in units of the largest output (of each tensor of the output).

    Returns:
        The packed network's first output tensor.
    """
    hard, packed = outputs(result.hard, inputs), outputs(result.network, inputs)
    assert_equal_outputs(hard, packed, relative)
    _assert_weights(result)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "packed.safetensors"
        save(result.network, path)
        report = size_report(path)
        assert report.total == size_report(result.network).total == path.stat().st_size
        assert report.nonzeros == sum(coded.nonzeros for coded in result.guide.harden().values())
        reloaded = outputs(load(path, copy.deepcopy(result.hard)), inputs)
    for before, after in zip(packed, reloaded, strict=True):
        assert torch.equal(before, after)
    return packed[0]


def assert_equal_outputs(expected: list[Tensor], found: list[Tensor], relative: float = 1e-5) -> None:
    """Assert that outputs are finite, of one form, and equal but for rounding."""
    assert expected and len(expected) == len(found)
    for one, other in zip(expected, found, strict=True):
        assert one.shape == other.shape and one.dtype == other.dtype
        if not one.is_floating_point():
            assert torch.equal(one, other)
            continue
        assert one.isfinite().all() and other.isfinite().all()
        scale = float(one.abs().max()) if one.numel() else 0.0
        difference = float((one - other).abs().max()) if one.numel() else 0.0
        assert difference <= relative * scale, f"packed and hard differ by {difference:.3g} of {scale:.3g}"


@torch.no_grad()
def outputs(net: nn.Module, inputs: Any) -> list[Tensor]:
    """Return every tensor that a network in evaluation mode puts out, in order."""
    args, kwargs = call_arguments(inputs)
    return list(_tensors(net.eval()(*args, **kwargs)))


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping):  # transformers' outputs as well
        for each in value.values():
            yield from _tensors(each)
    elif isinstance(value, (tuple, list)):
        for each in value:
            yield from _tensors(each)


def _assert_weights(result: CompressionResult) -> None:
    recipe, sites = result.recipe, result.model.site_values()
    kept = others = 0
    for name in sites:
        weight = result.hard.get_parameter(name).detach().float()
        own, nonzeros = recipe.rate_of(name), int((weight != 0).sum())
        if own is None:
            kept, others = kept + nonzeros, others + weight.numel()
        else:
            assert nonzeros == round(own * weight.numel()), name
        if recipe.groups == "layer":
            assert len(weight[weight != 0].unique()) <= recipe.components_of(name)
    # To the weight; with a target size the rate is what comes out.
    if recipe.allocation == "schedule" and recipe.target_ratio is None:
        assert kept == round(recipe.nonzero_rate * others)
