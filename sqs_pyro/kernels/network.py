"""Packed networks: made from a trained network and its coded weights, saved to a file, loaded from one."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from sqs_pyro.errors import NetworkError, PackedFileError
from sqs_pyro.isolation import isolated, lasting_tensors
from sqs_pyro.kernels.assemble import assemble, tensor_slots
from sqs_pyro.kernels.described import described_network
from sqs_pyro.kernels.ensemble import PackedEnsemble
from sqs_pyro.networks.checks import check_replaceable
from sqs_pyro.packing.coded import CodedTensor, stack_draws
from sqs_pyro.packing.file import PackedContents, read_packed, write_packed
from sqs_pyro.packing.finite import check_finite
from sqs_pyro.packing.layouts import PackedTensor, pack_tensor
from sqs_pyro.packing.module import (
    METADATA,
    StoredEnsemble,
    leftover_state,
    module_contents,
    round_leftovers,
    stored_weights,
    with_metadata,
)
from sqs_pyro.resources import enough_resources

LEFTOVER_DTYPES = ("float16", "bfloat16", "float32")


@lasting_tensors()
def packed_network(
    net: nn.Module,
    coded: Mapping[str, CodedTensor | PackedTensor],
    *,
    layout: str = "auto",
    leftover_dtype: str | None = "float16",
    metadata: Mapping[str, Any] | None = None,
) -> nn.Module:
    """Return a copy of ``net``, in eval mode, that runs on packed weights.

    Args:
        net: the network; it stays as it is. Its other tensors are taken over.
        coded: the compressed weights by parameter name; of a shared parameter, one of its names. What is
            packed already stays in its layout.
        layout: ``"dense"``, ``"bitmap"``, ``"entropy"``, or ``"auto"`` for the smallest, tensor by tensor.
        leftover_dtype: ``"float16"``, ``"bfloat16"`` or ``"float32"``: other parameters are rounded to it at once,
            so that the packed network and its file agree bit for bit; they keep their own dtype to compute. A
            tensor whose values do not survive that is left as it is, and so are all buffers; None leaves all.
        metadata: plain JSON to keep in the file; ``"network"`` is filled in where
            :mod:`sqs_pyro.networks.registry` has built the network. The result's ``packed_metadata`` can be edited
            until it is saved.

    Raises:
        NetworkError: for names or shapes that are not the network's, an unknown layout or dtype, or a module
            whose weights cannot be packed.
    """
    _check_dtype(leftover_dtype)
    check_replaceable(net)
    tensors = {
        name: value if isinstance(value, PackedTensor) else pack_tensor(value, layout)
        for name, value in coded.items()
    }
    packed = assemble(net, tensors)
    if leftover_dtype is not None:
        round_leftovers(packed, (), leftover_dtype)
    return _finish(packed, _about(net, metadata))


@lasting_tensors()
def packed_ensemble(
    net: nn.Module,
    draws: Sequence[Mapping[str, CodedTensor]],
    *,
    layout: str = "auto",
    leftover_dtype: str | None = "float16",
    metadata: Mapping[str, Any] | None = None,
) -> PackedEnsemble:
    """Return the average of packed draws of ``net``, in eval mode: codebooks and all other tensors are shared.

    Args:
        net: the network; it stays as it is.
        draws: of each network, the compressed weights by parameter name.
        layout: a layout's name; ``"auto"`` tries ``"conditional"``, too.
        leftover_dtype, metadata: see :func:`packed_network`.

    Raises:
        NetworkError: as :func:`packed_network`; or there is no draw, or draws differ in names or codebooks.
    """
    _check_dtype(leftover_dtype)
    check_replaceable(net)
    if not draws or any(set(draw) != set(draws[0]) for draw in draws):
        raise NetworkError(f"The {len(draws)} draws to pack must be at least one, and all of the same parameters.")
    stacked = {name: stack_draws([draw[name] for draw in draws]) for name in draws[0]}
    tensors = {
        name: _smallest(value) if layout == "auto" else pack_tensor(value, layout)
        for name, value in stacked.items()
    }
    packed = PackedEnsemble(net, tensors, len(draws))
    if leftover_dtype is not None:
        round_leftovers(packed.network, (), leftover_dtype)
    setattr(packed, METADATA, _about(net, metadata))
    return packed


@enough_resources("Saving a packed file")
@isolated()
def save(packed: nn.Module, path: str | Path) -> None:
    """Write a packed network to a file, which appears complete or not at all.

    Tensors that are not compressed are stored in the smallest floating dtype that holds them exactly.

    Raises:
        NetworkError: if ``packed`` is not a packed network, or its metadata is not plain JSON.
        OutputError: if the file cannot be written.
    """
    write_packed(path, *module_contents(packed))


@enough_resources("Loading a packed file")
def load(path: str | Path, net: nn.Module | Callable[[], nn.Module] | None = None) -> nn.Module:
    """Return the packed network of a file, in eval mode; its outputs equal those of the saved one exactly.

    Args:
        path: the file.
        net: the network it belongs to, whatever its weights (also on the ``meta`` device; it stays as it is),
            or what builds it. None: built from the file's metadata through :mod:`sqs_pyro.networks.registry`.

    Raises:
        PackedFileError: if the file is not intact, holds NaN, or was made for another network.
        RecipeError: if the registry does not know the file's network.
        NetworkError: if ``net`` is no network and builds none.
        ResourceError: if there is too little memory.
    """
    with isolated():
        contents = read_packed(path)
        plain = described_network(contents) if net is None else net
    if not isinstance(plain, nn.Module):
        with isolated(sees_dtype=True):  # what the caller builds has the caller's dtype; first weights are drawn
            plain = _built(plain)
    with isolated(plain):
        check_replaceable(plain)
        try:
            packed = _assembled(contents, plain)
        except (NetworkError, PackedFileError) as error:
            raise PackedFileError(
                f"Packed file {str(path)!r} cannot be used with this {type(plain).__name__}. {error}"
            ) from None
        return _finish(packed, contents.metadata)


@lasting_tensors()
def dense_state(packed: nn.Module) -> dict[str, Tensor]:
    """Return the way back to a plain checkpoint: a state dict for the original network.

    Compressed weights are decoded to float32, shared tensors stand under each of their names.

    Raises:
        NetworkError: an ensemble is given.
    """
    if isinstance(packed, StoredEnsemble):
        raise NetworkError(f"An ensemble of {packed.num_draws} draws is no single checkpoint: give one network.")
    weights = stored_weights(packed, every_name=True)
    inside = {id(buffer) for weight in weights.values() for buffer in weight.buffers()}
    state = {
        name: value.detach()
        for name, value in packed.state_dict(keep_vars=True).items()
        if id(value) not in inside
    }
    return {**state, **{name: weight.coded().dense() for name, weight in weights.items()}}


def _check_dtype(leftover_dtype: str | None) -> None:
    if leftover_dtype is not None and leftover_dtype not in LEFTOVER_DTYPES:
        raise NetworkError(
            f"leftover_dtype is {leftover_dtype!r}, but should be one of {', '.join(LEFTOVER_DTYPES)}."
        )


def _built(function: Any) -> nn.Module:
    built = function() if callable(function) else function
    if not isinstance(built, nn.Module):
        given = "what load was given made" if callable(function) else "load was given"
        raise NetworkError(
            f"For the network {given} a {type(built).__name__}: give a torch.nn.Module, or a function without "
            "arguments that makes one."
        )
    return built


def _about(net: nn.Module, metadata: Mapping[str, Any] | None) -> dict[str, Any]:
    about: dict[str, Any] = {"network": getattr(net, "network_spec", None), "recipe": {}, "metrics": {}}
    return with_metadata(about, metadata)


def _smallest(draws: CodedTensor) -> PackedTensor:
    return min((pack_tensor(draws, layout) for layout in ("auto", "conditional")), key=lambda p: p.num_bytes)


def after_packing(function: Callable[[nn.Module], None]) -> Callable[[nn.Module], None]:
    """Decorator: call ``function`` with every packed network that is made or loaded from now on.

    For other libraries' networks, which may need to know that they are packed (how to save themselves, say).
    """
    _after_packing.append(function)
    return function


_after_packing: list[Callable[[nn.Module], None]] = []


def _finish(packed: nn.Module, metadata: dict[str, Any]) -> nn.Module:
    setattr(packed, METADATA, metadata)
    for function in _after_packing:
        function(packed)
    return packed.eval()


def _assembled(contents: PackedContents, plain: nn.Module) -> nn.Module:
    packed: nn.Module
    if contents.draws is None:
        packed = root = assemble(plain, contents.tensors)
    else:
        packed = PackedEnsemble(plain, contents.tensors, contents.draws)
        root = packed.network
    _fill(root, contents.leftovers)
    check_finite(root)
    return packed


def _fill(packed: nn.Module, leftovers: Mapping[str, Tensor]) -> None:
    """Copy the leftovers into the network, which must need exactly them."""
    targets = packed.state_dict(keep_vars=True)
    needed = {id(value): name for name, value in leftover_state(packed).items()}
    slots = tensor_slots(packed)
    for name, value in leftovers.items():
        target = targets.get(name)
        if target is None or needed.pop(id(target), None) is None:
            raise PackedFileError(f"The network has no tensor {name!r}: the file was made for another network.")
        if target.shape != value.shape or target.is_floating_point() != value.is_floating_point():
            raise PackedFileError(
                f"Tensor {name!r} is {value.dtype} {list(value.shape)} in the file, but {target.dtype} "
                f"{list(target.shape)} in the network: the file was made for another network."
            )
        _write(target, value, slots[id(target)])
    if needed:
        raise PackedFileError(
            f"The file has no tensor {next(iter(needed.values()))!r}: it was made for another network."
        )
    stranded = [name for name, value in packed.named_buffers() if value.is_meta]
    if stranded:
        raise NetworkError(
            f"Buffer {stranded[0]!r} is on the meta device and no file holds it: build the network on the CPU."
        )


def _write(target: Tensor, value: Tensor, slots: list[tuple[dict[str, Tensor | None], str]]) -> None:
    if target.device.type != "meta":
        with torch.no_grad():
            target.copy_(value)
        return
    made = torch.empty(value.shape, dtype=target.dtype).copy_(value)
    if isinstance(target, nn.Parameter):
        made = nn.Parameter(made, requires_grad=target.requires_grad)
    for held, name in slots:
        held[name] = made
