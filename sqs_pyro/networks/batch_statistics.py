"""Statistics of batch norms that belong to one draw of a network's weights."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from sqs_pyro.networks.calling import call_arguments, device_of, move_to
from sqs_pyro.networks.modes import evaluating
from sqs_pyro.networks.substitution import call_with


def has_statistics(module: nn.Module) -> bool:
    """Return whether a module is a batch norm that keeps running statistics."""
    norm: Any = module
    is_norm = isinstance(module, nn.modules.batchnorm._BatchNorm)
    return is_norm and norm.track_running_stats and norm.running_mean is not None


@torch.no_grad()
def statistics_of(net: nn.Module, tensors: Mapping[str, Tensor], inputs: Any) -> dict[str, Tensor]:
    """Return running means and variances, by the names of their buffers, of one minibatch alone.

    Everything but the batch norms is in evaluation mode; the network's own statistics stay as they are.

    Args:
        net: the network.
        tensors: in place of its parameters, by name.
        inputs: of the minibatch.
    """
    norms: dict[str, Any] = {
        name: module
        for name, module in net.named_modules()
        if has_statistics(module) and module.momentum != 0  # of such a norm statistics are never to change
    }
    if not norms:
        return {}
    # From 0, so that what is written there is the momentum times the minibatch's own.
    written = {
        f"{name}.{buffer}".removeprefix("."): torch.zeros_like(value)
        for name, norm in norms.items()
        for buffer, value in norm.named_buffers(recurse=False)
    }
    args, kwargs = call_arguments(move_to(inputs, device_of(net)), net)
    with evaluating(net):
        for norm in norms.values():
            norm.training = True
        call_with(net, {**tensors, **written}, args, kwargs)
    for name, norm in norms.items():
        share = 1.0 if norm.momentum is None else norm.momentum  # None: of one minibatch all
        for buffer in ("running_mean", "running_var"):
            written[f"{name}.{buffer}".removeprefix(".")] /= share
    return written
