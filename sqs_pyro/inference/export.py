"""From a trained guide to the network that is shipped."""

import copy
import itertools
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from sqs_pyro.errors import NetworkError
from sqs_pyro.inference.guide import SpikeGMMGuide
from sqs_pyro.kernels import PackedEnsemble, packed_ensemble, packed_network
from sqs_pyro.minibatches import minibatches
from sqs_pyro.network_io import call_arguments, device_of, move_to
from sqs_pyro.packing import CodedTensor
from sqs_pyro.packing.leftovers import round_to
from sqs_pyro.packing.module import METADATA

_BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)


def hard_network(net: nn.Module, coded: Mapping[str, CodedTensor]) -> nn.Module:
    """A copy of ``net`` with dense weights that are exactly the coded tensors' values.

    Args:
        net: the network; its other parameters and buffers are copied as they are.
        coded: hardened weights by parameter name.
    """
    return network_with(net, {name: tensor.dense() for name, tensor in coded.items()})


def network_with(net: nn.Module, weights: Mapping[str, Tensor]) -> nn.Module:
    """A copy of ``net`` with other values in the named parameters."""
    changed = copy.deepcopy(net)
    parameters = dict(changed.named_parameters())
    with torch.no_grad():
        for name, value in weights.items():
            parameters[name].copy_(value)
    return changed


@torch.no_grad()
def reestimate_batch_norm(net: nn.Module, loader: Iterable[Any], num_batches: int) -> None:
    """Replace running statistics by cumulative averages over minibatches of the network as it now is.

    Hardening changes what every layer sees; statistics from training belong to the softer network. Everything
    but the batch norms is in evaluation mode (no dropout), as it will be when the statistics are used.
    """
    norms = [m for m in net.modules() if isinstance(m, _BATCH_NORMS) and m.track_running_stats]
    if not norms:
        return
    modes, momenta, device = [m.training for m in net.modules()], [m.momentum for m in norms], device_of(net)
    net.eval()
    for norm in norms:
        norm.train()
        norm.reset_running_stats()
        norm.momentum = None  # cumulative average
    for x, _ in itertools.islice(minibatches(loader, net, "training", labelled=False), num_batches):
        args, kwargs = call_arguments(move_to(x, device), net)
        net(*args, **kwargs)
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum
    for module, training in zip(net.modules(), modes, strict=True):
        module.training = training


def batch_norm_statistics(net: nn.Module) -> dict[str, Tensor]:
    """The running means and variances of a network, by the names of their buffers."""
    norms = {name: m for name, m in net.named_modules() if isinstance(m, _BATCH_NORMS) and m.track_running_stats}
    return {
        f"{name}.{buffer}" if name else buffer: getattr(norm, buffer)
        for name, norm in norms.items()
        for buffer in ("running_mean", "running_var")
    }


@torch.no_grad()
def fold_batch_norm(net: nn.Module) -> None:
    """Fold running statistics into weight and bias, in place; evaluation-mode outputs stay the same.

    Batch norm in evaluation is one scale and one shift a channel; with mean 0 and variance 1 in place of the
    statistics only those two are left to store. Layers without affine parameters or statistics are left.
    """
    for module in net.modules():
        if not isinstance(module, _BATCH_NORMS) or module.running_mean is None or not module.affine:
            continue
        assert module.running_var is not None
        scale = module.weight / (module.running_var + module.eps).sqrt()
        module.bias.sub_(module.running_mean * scale)
        module.weight.copy_(scale * (1 + module.eps) ** 0.5)
        module.running_mean.zero_()
        module.running_var.fill_(1)


@torch.no_grad()
def round_leftovers(net: nn.Module, coded: Mapping[str, CodedTensor], dtype: str) -> None:
    """Round, in place, every stored tensor that is not compressed as :func:`packed_network` will round it."""
    stored = net.state_dict().keys()
    for name, tensor in itertools.chain(net.named_parameters(), net.named_buffers()):
        if name in stored and name not in coded:
            tensor.copy_(round_to(tensor, dtype))


def pack(
    source: Any,
    *,
    layout: str = "auto",
    leftover_dtype: str = "float16",
    codebook_dtype: str = "float16",
    metadata: Mapping[str, Any] | None = None,
) -> nn.Module:
    """The packed network of a compression result or of a trained guide.

    Args:
        source: a :class:`~sqs_pyro.compression.CompressionResult`, whose packed network is returned, or
            a :class:`SpikeGMMGuide` made for a ``BayesianNetwork``: its most probable network is packed.
        layout: ``"auto"``, or a layout's name.
        leftover_dtype: of what is not compressed.
        codebook_dtype: of codebook values.
        metadata: written into the file.

    Raises:
        NetworkError: the guide's model has no network, or it is still in its dense stage.
    """
    if isinstance(getattr(source, "network", None), nn.Module):
        return source.network
    if not isinstance(source, SpikeGMMGuide):
        raise NetworkError(
            f"pack was given a {type(source).__name__}, but packs a SpikeGMMGuide or a CompressionResult."
        )
    net = _network_of(source)
    coded = source.harden(getattr(torch, codebook_dtype))
    return packed_network(
        hard_network(net, coded).eval(),
        coded,
        layout=layout,
        leftover_dtype=leftover_dtype,
        metadata=metadata,
    )


def pack_ensemble(
    source: Any,
    num_samples: int = 20,
    *,
    temperature: float | None = None,
    gate_temperature: float | None = None,
    layout: str = "auto",
    leftover_dtype: str = "float16",
    codebook_dtype: str = "float16",
    metadata: Mapping[str, Any] | None = None,
) -> PackedEnsemble:
    """Draw networks from a posterior and pack them as one, whose forward gives their averaged log-probabilities.

    Codebooks and everything that is not compressed are shared; :func:`~sqs_pyro.save` writes one file.

    Args:
        source: a :class:`~sqs_pyro.compression.CompressionResult`, whose shipped norms and biases are used, or a
            :class:`SpikeGMMGuide` made for a ``BayesianNetwork``.
        num_samples: S, networks to draw.
        temperature, gate_temperature: see :meth:`SpikeGMMGuide.evaluation_temperatures`.
        layout: ``"auto"``, which tries ``"conditional"`` too, or a layout's name.
        leftover_dtype, codebook_dtype: as for :func:`pack`.
        metadata: written into the file, over that of a result's packed network.

    Raises:
        NetworkError: the source is neither, or its guide is still in its dense stage.
    """
    guide = getattr(source, "guide", source)
    if not isinstance(guide, SpikeGMMGuide):
        raise NetworkError(
            f"pack_ensemble was given a {type(source).__name__}, but draws from a SpikeGMMGuide or a "
            "CompressionResult."
        )
    net, about = (_network_of(guide), {}) if guide is source else (source.hard, getattr(source.network, METADATA))
    dtype = getattr(torch, codebook_dtype)
    draws = [guide.draw(temperature, gate_temperature, dtype) for _ in range(num_samples)]
    about = {**about, **(metadata or {})}
    return packed_ensemble(net, draws, layout=layout, leftover_dtype=leftover_dtype, metadata=about)


def _network_of(guide: SpikeGMMGuide) -> nn.Module:
    net = getattr(guide.model, "net", None)
    if not isinstance(net, nn.Module):
        raise NetworkError(
            f"The guide's model is a {type(guide.model).__name__} without a network 'net' to pack: use "
            "guide.harden() and packed_network(net, coded) with a network of your own."
        )
    return net
