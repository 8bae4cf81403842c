"""Running statistics of batch norms: estimated anew for a hardened network, folded for the file."""

import copy
import itertools
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from sqs_pyro.networks.batch_statistics import has_statistics
from sqs_pyro.networks.calling import call_arguments, device_of, move_to
from sqs_pyro.networks.minibatches import minibatches
from sqs_pyro.networks.modes import evaluating

_BatchNorm = nn.modules.batchnorm._BatchNorm
#: Only these forwards are known to be one scale and one shift a channel; a subclass may compute anything.
_KNOWN_FORWARDS = (_BatchNorm.forward, nn.SyncBatchNorm.forward)
_TENSORS = ("weight", "bias", "running_mean", "running_var")
# Mean over standard deviation from which on the folded shift is no longer rounded: float16's half step, 2^-11,
# times this is 1/32 of the output's own standard deviation.
_LARGEST_MEAN = 64.0
_PRECISION = 2.0**-22  # relative; what float32 holds and two-byte floats do not


@torch.no_grad()
def reestimate_batch_norm(net: nn.Module, loader: Iterable[Any], num_batches: int) -> None:
    """Replace running statistics by cumulative averages over minibatches of the network as it now is.

    Hardening changes what every layer sees; statistics from training belong to the softer network. Everything
    but the batch norms is in evaluation mode (no dropout), as it will be when the statistics are used. After an
    error modes, momenta and statistics are those from before.
    """
    norms: list[Any] = [m for m in net.modules() if has_statistics(m)]
    if not norms:
        return
    device = device_of(net)
    with evaluating(net), _cumulative(norms):
        batches = minibatches(loader, net, "training", labelled=False)  # inputs alone
        for seen, (x, _) in enumerate(itertools.islice(batches, num_batches)):
            for norm in norms:
                if type(norm).forward not in _KNOWN_FORWARDS:  # which may compute with the momentum
                    norm.momentum = 1 / (seen + 1)  # running = (1 - 1/n) running + 1/n new: the mean
            args, kwargs = call_arguments(move_to(x, device), net)
            net(*args, **kwargs)


def batch_norm_statistics(net: nn.Module) -> dict[str, Tensor]:
    """Return the running means and variances of a network, by the names of their buffers."""
    norms = {name: m for name, m in net.named_modules() if has_statistics(m)}
    return {
        f"{name}.{buffer}" if name else buffer: getattr(norm, buffer)
        for name, norm in norms.items()
        for buffer in ("running_mean", "running_var")
    }


@torch.no_grad()
def fold_batch_norm(net: nn.Module, coded: Collection[str] = (), kept: Collection[str] = ()) -> None:
    """Fold running statistics into weight and bias, in place, where evaluation-mode outputs stay the same.

    Batch norm in evaluation is one scale and one shift a channel; with mean 0 and variance 1 in place of the
    statistics only those two are left to store. A layer is left as it is unless its function is torch's own, its
    four tensors are there and shared with nothing (a tied norm has statistics of its own), none of them is coded,
    and scale and shift, in float64, are kept to float32's precision. Means beyond 64 standard deviations
    are left, too: what was a difference of large numbers would become one of rounded numbers.

    Args:
        net: the network.
        coded: names of parameters whose values are codewords.
        kept: names of modules to leave.
    """
    fixed = {id(tensor) for name, tensor in net.named_parameters(remove_duplicate=False) if name in set(coded)}
    # Two modules with one weight would both be scaled by the statistics of the first.
    users = _users(net)
    for name, module in net.named_modules():
        if name in kept or not has_statistics(module) or type(module).forward not in _KNOWN_FORWARDS:
            continue
        tensors = {**module._parameters, **module._buffers}
        own = [tensor for each in _TENSORS if (tensor := tensors.get(each)) is not None]
        alone = all(id(tensor) not in fixed and users[_storage(tensor)] == 1 for tensor in own)
        if alone and len(own) == len(_TENSORS):
            _fold(module, *own)


def _fold(norm: Any, weight: Tensor, bias: Tensor, mean: Tensor, var: Tensor) -> None:
    """One layer, if nothing is lost by it."""
    # y = scale x + shift in evaluation: with mean 0 and variance 1 weight and bias must give the same two.
    gamma, beta = weight.double(), bias.double()
    scale = gamma / (var.double() + norm.eps).sqrt()
    shift = beta - mean.double() * scale
    root = (1 + norm.eps) ** 0.5  # what remains to divide by once the variance is 1
    new_weight, new_bias = (scale * root).to(weight.dtype), shift.to(bias.dtype)
    # float16 parameters may not hold the product: then the layer stays as it is, and so does the network's
    # function.
    exact = (new_weight.double() / root - scale).abs() <= _PRECISION * scale.abs()
    exact &= (new_bias.double() - shift).abs() <= _PRECISION * shift.abs()
    # |mean| |γ| / σ against the output's own size.
    near = (shift - beta).abs() <= _LARGEST_MEAN * (gamma.abs() + beta.abs())
    if bool((exact & near).all()):  # comparisons with NaN and infinity are False
        weight.copy_(new_weight)
        bias.copy_(new_bias)
        mean.zero_()
        var.fill_(1)


def _users(net: nn.Module) -> Mapping[int, int]:
    """Return how many places of the network's modules hold each piece of memory, by its address."""
    held = (t for m in net.modules() for t in (*m._parameters.values(), *m._buffers.values()) if t is not None)
    return Counter(_storage(tensor) for tensor in held)


def _storage(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata  # views of one tensor have the same


@contextmanager
def _cumulative(norms: list[Any]) -> Iterator[None]:
    """Let batch norms gather cumulative averages, whatever mode the rest of their network is in."""
    momenta = [norm.momentum for norm in norms]
    # Copied: statistics are written in place.
    before = [{name: copy.deepcopy(value) for name, value in norm._buffers.items()} for norm in norms]
    try:
        for norm in norms:
            norm.train()
            norm.reset_running_stats()
            norm.momentum = None  # cumulative: every minibatch counts the same
        yield
    # Ctrl-C as well: half an average is no statistics.
    except BaseException:
        for norm, buffers in zip(norms, before, strict=True):
            for name, value in buffers.items():
                if value is not None:
                    norm._buffers[name].copy_(value)
        raise
    finally:
        for norm, momentum in zip(norms, momenta, strict=True):
            norm.momentum = momentum
