"""Is this a network whose weights can be read and replaced? One sentence that says how to repair it if not."""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn
from torch.nn.parameter import is_lazy
from torch.nn.utils import prune, spectral_norm, weight_norm

from sqs_pyro.errors import NetworkError

_AROUND = {
    "DataParallel": "`net.module`",
    "DistributedDataParallel": "`net.module`, and give every process its own share of the data",
    "FullyShardedDataParallel": "the network as it was before, with its gathered weights loaded",
}
# By name: none of these libraries is imported to find out that a network is not of it.
_QUANTIZED = ("torch.ao.nn.quantized", "torch.nn.quantized", "bitsandbytes.", "torchao.")
_SHARDED = "DTensor"


def check_network(net: Any) -> None:
    """Check that a network's weights can be read, copied and replaced, all of which compression does.

    Raises:
        NetworkError: it is no module, is wrapped for several devices, scripted, quantized or packed already, has
            weights that are not there yet (lazy, ``meta``), or that hooks compute from others (old weight and
            spectral norm, pruning that was not made permanent).
    """
    check_runs(net)
    check_replaceable(net)


def check_replaceable(net: nn.Module) -> None:
    """Check that other weights can take the place of a network's own, wherever those are.

    Raises:
        NetworkError: as :func:`check_network`, but for weights that are not there yet.
    """
    for path, module in net.named_modules():
        where = f"'{path}'" if path else "the network"
        for found, repair in _obstacles(module):
            raise NetworkError(f"{type(net).__name__} cannot be compressed, because {where} {found}: {repair}.")


def check_runs(net: Any) -> None:
    """Check that a network can run at all.

    Raises:
        NetworkError: it is no module, or has weights that are not there yet (lazy, ``meta``).
    """
    if not isinstance(net, nn.Module):
        kind = "class" if isinstance(net, type) else type(net).__name__
        raise NetworkError(f"The network is a {kind}, but must be a torch.nn.Module: give the module itself.")
    for name, tensor in (*net.named_parameters(), *net.named_buffers()):
        if is_lazy(tensor):
            raise NetworkError(
                f"{type(net).__name__} has not run yet, so that the shape of '{name}' is unknown: call it on one "
                "minibatch and train it first."
            )
        if tensor.is_meta:
            raise NetworkError(
                f"'{name}' of {type(net).__name__} is on the 'meta' device, where tensors have no values: make "
                "the network on a real device and load its weights."
            )


def _obstacles(module: nn.Module) -> Iterator[tuple[str, str]]:
    """What stands in the way in one module, and how to repair it."""
    kind = type(module).__name__
    if kind in _AROUND:
        yield f"is a {kind}", f"give {_AROUND[kind]}"
    if isinstance(module, (torch.jit.ScriptModule, torch.jit.ScriptFunction)):
        yield "is scripted or traced", "give the module that it was made of"
    packed = any(_module_name(child).startswith("sqs_pyro.kernels") for child in module.children())
    if _module_name(module).startswith(_QUANTIZED) or packed:
        yield f"is a {kind}, whose weights are compressed already", "give the network in floating point"
    for hook in module._forward_pre_hooks.values():
        yield from _computed(hook, kind)
    for name, parameter in module.named_parameters(recurse=False):
        if type(parameter).__name__ == _SHARDED or type(parameter.data).__name__ == _SHARDED:
            yield f"has '{name}' sharded over devices", "give a network with whole weights"
        if parameter.is_quantized or _module_name(parameter.data).startswith("torchao."):
            yield f"has '{name}' quantized already", "give the network in floating point"


def _computed(hook: Callable[..., Any], kind: str) -> Iterator[tuple[str, str]]:
    """Weights that a hook makes anew before each forward pass."""
    # Pruning keeps it in `_tensor_name`, the older norms in `name`.
    name = getattr(hook, "_tensor_name", getattr(hook, "name", "weight"))
    if isinstance(hook, prune.BasePruningMethod):
        yield (
            f"({kind}) computes '{name}' from a mask of torch.nn.utils.prune",
            f"make that permanent with torch.nn.utils.prune.remove(module, '{name}')",
        )
    for norm in (weight_norm, spectral_norm):
        if type(hook).__module__ == norm.__module__:
            what = norm.__name__
            yield (
                f"({kind}) computes '{name}' by torch.nn.utils.{what}",
                f"make that permanent with torch.nn.utils.remove_{what}(module, '{name}')",
            )


def _module_name(value: Any) -> str:
    return type(value).__module__ or ""
