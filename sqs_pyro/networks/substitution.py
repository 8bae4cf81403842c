"""Call a network with other tensors in place of its own."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn
from torch.func import functional_call


def call_with(
    net: nn.Module, tensors: Mapping[str, Tensor], args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> Any:
    """Call ``net`` with other values of some parameters and buffers; the network itself stays as it is.

    A tensor that hangs in several places (tied parameters, a module under several names) is replaced in all of
    them. Each place is told to torch once: told twice, torch restores it to the value that was put in first.

    Args:
        net: the network.
        tensors: values by one of their names; of several names of one tensor the last one given counts.
        args, kwargs: the network's arguments.

    Raises:
        KeyError: the network has no tensor of a name.
    """
    every = dict(net.named_parameters(remove_duplicate=False)) | dict(net.named_buffers(remove_duplicate=False))
    values = {id(every[name]): value for name, value in tensors.items()}  # by the tensor it stands for
    places = {
        f"{prefix}.{name}".removeprefix("."): values[id(own)]
        for prefix, module in net.named_modules()  # each module once
        for held in (module._parameters, module._buffers)
        for name, own in held.items()
        if id(own) in values
    }
    # tie_weights=False: all names of tied tensors are among the places already.
    return functional_call(net, places, args, dict(kwargs), tie_weights=False)
