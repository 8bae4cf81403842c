"""How minibatches enter a network and predictions come out of it, whoever made the network."""

import copy
import dataclasses
import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping, MutableMapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from sqs_pyro.errors import NetworkError

_PREDICTIONS = ("logits", "out")


def call_arguments(inputs: Any, net: nn.Module | None = None) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Return positional and keyword arguments of a network's call.

    A mapping becomes keywords and a tuple or a list positions; but where the network's ``forward`` does not take
    them so and takes one argument, that argument is the whole mapping, tuple or list. Everything else, a
    ``PackedSequence`` too, is one argument.

    Args:
        inputs: what :func:`~sqs_pyro.networks.minibatches.split_minibatch` gives.
        net: the network that is called; None asks no signature.
    """
    if isinstance(inputs, PackedSequence) or not isinstance(inputs, (Mapping, tuple, list)):
        return (inputs,), {}
    args, kwargs = ((), dict(inputs)) if isinstance(inputs, Mapping) else (tuple(inputs), {})
    if net is not None and not takes(net, args, kwargs) and takes(net, (inputs,), {}):
        return (inputs,), {}
    return args, kwargs


def takes(net: nn.Module, args: Sequence[Any], kwargs: Mapping[Any, Any]) -> bool:
    """Return whether the signature of ``net.forward`` has room for these arguments; yes where it is unknown."""
    signature = forward_signature(net)
    try:
        if signature is not None:  # bound, not compared: defaults and **kwargs count as Python counts them
            signature.bind(*args, **kwargs)
    except TypeError:
        return False
    return True


def forward_signature(net: nn.Module) -> inspect.Signature | None:
    """Return the signature of a network's ``forward``, of what is inside if it only hands its arguments on."""
    # `module` is what torch's own wrappers call it, `called_like` ours; theirs take *args.
    while isinstance(inside := getattr(net, "called_like", getattr(net, "module", None)), nn.Module):
        net = inside
    try:
        return inspect.signature(net.forward)
    except (TypeError, ValueError):  # compiled or native: it cannot be told
        return None


def output_tensor(output: Any) -> Tensor:
    """Return the tensor of predictions in a network's output: itself, its ``logits``, or its first element.

    Of mappings it is ``logits``, as in transformers, or ``out``, as of torchvision's networks for segmentation.

    Raises:
        NetworkError: the output holds no tensor that could be the predictions.
    """
    if isinstance(output, Tensor):
        return output
    if isinstance(output, Mapping) and (key := next((k for k in _PREDICTIONS if k in output), None)) is not None:
        return output[key]
    if isinstance(getattr(output, "logits", None), Tensor):
        return output.logits
    if isinstance(output, (tuple, list)) and output and isinstance(output[0], Tensor):
        return output[0]
    raise NetworkError(
        f"The network returned a {type(output).__name__} without 'logits' or 'out': give a likelihood=callable "
        "that turns this output into a distribution."
    )


def predictions(net: nn.Module, inputs: Any) -> Tensor:
    """Run ``net`` on a minibatch's inputs and return its predictions."""
    args, kwargs = call_arguments(inputs, net)
    return output_tensor(net(*args, **kwargs))


def move_to(inputs: Any, device: torch.device) -> Any:
    """Return the inputs in their containers, every tensor on ``device``; objects by their own method ``to``."""
    if isinstance(inputs, Tensor):
        return inputs.to(device, non_blocking=True)  # from pinned memory the copy goes beside the computation
    if not isinstance(inputs, Mapping) and callable(getattr(inputs, "to", None)):
        return inputs.to(device)  # a PackedSequence, a graph
    return _each(lambda value: move_to(value, device), inputs)


def own_copy(inputs: Any) -> Any:
    """Return the inputs in their containers, every tensor a copy: what a forward writes into is not the data."""
    return inputs.clone() if isinstance(inputs, Tensor) else _each(own_copy, inputs)


def split_examples(inputs: Any, size: int) -> Iterator[Any]:
    """A minibatch's inputs as smaller ones of at most ``size`` examples, tensors cut along their first dimension.

    What is no tensor of as many examples goes with each of them.
    """
    count = len(tensors_in(inputs)[0])
    for start in range(0, count, size):
        yield some_examples(inputs, slice(start, start + size), count)


def some_examples(inputs: Any, part: slice, count: int) -> Any:
    """Return a part of a minibatch's ``count`` examples; what is no tensor of as many stays as it is."""
    if isinstance(inputs, Tensor):
        return inputs[part] if inputs.dim() and len(inputs) == count else inputs
    return _each(lambda inside: some_examples(inside, part, count), inputs)


def tensors_in(inputs: Any) -> list[Tensor]:
    """Return the tensors of a minibatch's inputs, however deep; of other objects those among their attributes."""
    if isinstance(inputs, Tensor):
        return [inputs]
    if isinstance(inputs, PackedSequence):
        return [inputs.data]
    if isinstance(inputs, Mapping):
        inside: Iterable[Any] = inputs.values()
    elif isinstance(inputs, (tuple, list)):
        inside = inputs
    else:
        inside = [value for value in getattr(inputs, "__dict__", {}).values() if isinstance(value, Tensor)]
    return [tensor for value in inside for tensor in tensors_in(value)]


def _each(function: Callable[[Any], Any], value: Any) -> Any:
    """Return the same container with a function's value in place of everything in it; what is none comes back."""
    if isinstance(value, Mapping):
        changed = {key: function(item) for key, item in value.items()}
        if not isinstance(value, MutableMapping) or type(value) is dict:
            return changed
        same = copy.copy(value)  # keeps the class, and what else it knows
        same.update(changed)
        return same
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*map(function, value))
    if isinstance(value, (tuple, list)):
        return type(value)(map(function, value))
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        other: Any = copy.copy(value)
        for field in dataclasses.fields(value):
            object.__setattr__(other, field.name, function(getattr(value, field.name)))  # frozen ones, too
        return other
    return value


def device_of(net: nn.Module) -> torch.device:
    """Return where a network's first parameter or buffer is; the CPU if it has none."""
    return next((tensor.device for tensor in (*net.parameters(), *net.buffers())), torch.device("cpu"))
