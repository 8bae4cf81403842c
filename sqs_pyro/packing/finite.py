"""Numbers that a network can compute with: one check for what is compressed, saved and loaded."""

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from sqs_pyro.errors import NetworkError


def check_finite(net: nn.Module) -> None:
    """Check the network's parameters and buffers; those on the meta device have no values.

    A buffer may hold infinity, as masks of attention do. A parameter may not, and nothing may hold NaN: from there
    on every output is NaN.

    Raises:
        NetworkError: naming the first tensor that does.
    """
    for name, parameter in net.named_parameters():
        _check(name, "Parameter", parameter, torch.isfinite, "NaN or infinite")
    for name, buffer in net.named_buffers():
        _check(name, "Buffer", buffer, lambda value: ~torch.isnan(value), "NaN")


def _check(name: str, kind: str, value: Tensor, is_right: Callable[[Tensor], Tensor], what: str) -> None:
    # A lazy parameter has no shape yet, one on the meta device no values; integers are always finite.
    if is_lazy(value) or value.is_meta or not (value.is_floating_point() or value.is_complex()):
        return
    right = is_right(value.detach())  # [*shape], bool
    if not bool(right.all()):
        raise NetworkError(
            f"{kind} {name!r} has {int((~right).sum())} values of {value.numel()} that are {what}, so that the "
            "network's outputs mean nothing: start from a network that works."
        )
