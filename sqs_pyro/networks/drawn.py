"""Draws of one network: networks that differ in some tensors, which they are given without being written to.

A module reads its drawn tensors from the draw that its *thread* runs. So any number of threads may run one
network, and nothing in it is ever exchanged, as :func:`torch.func.functional_call` exchanges tensors for a while.
"""

import math
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from sqs_pyro.errors import NetworkError
from sqs_pyro.networks.calling import output_tensor

_KEYS = "_drawn"  # of a module: by attribute, what a draw calls its tensor


class _AtHand(threading.local):
    """The tensors of the draw that this thread runs."""

    tensors: Mapping[str, Tensor] | None = None


_at_hand = _AtHand()


def leave_to_draws(net: nn.Module, names: Mapping[int, str]) -> None:
    """Take tensors out of a network, in place: its modules read those of the draw at hand instead.

    Args:
        net: the network.
        names: what a draw calls each tensor, by ``id`` of the parameter or buffer.
    """
    for module in list(net.modules()):
        drawn = {}
        for held in (module._parameters, module._buffers):
            for name in [name for name, tensor in held.items() if id(tensor) in names]:
                drawn[name] = names[id(held.pop(name))]  # out: torch looks there before it asks the class
        if drawn:
            vars(module)[_KEYS] = drawn
            # A class of its own for this module: properties are looked up on classes only.
            module.__class__ = _drawn_class(type(module), tuple(drawn))


def average_log_probabilities(
    net: nn.Module,
    draws: Mapping[str, Tensor],
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    draws_at_once: int = 1,
    class_axis: int | None = None,
) -> Tensor:
    """Return ``log 1/S Σ_s softmax(f(x; θ_s))``, shaped as the logits, of networks that differ in some tensors.

    Args:
        net: f, a module from inputs to logits, from which :func:`leave_to_draws` took these tensors.
        draws: θ, tensors ``[S, *shape]`` by name.
        args, kwargs: x, the network's arguments.
        draws_at_once: networks that run together, by ``torch.vmap``; 1 is a loop.
        class_axis: the dimension of the logits that holds the classes; needed if there are more than two.

    Raises:
        NetworkError: it is needed.
    """

    def log_probabilities(tensors: Mapping[str, Tensor]) -> Tensor:
        with _running(tensors):
            output = net(*args, **kwargs)
            return output_tensor(output).float().log_softmax(_class_axis(output, class_axis))

    num_draws = len(next(iter(draws.values())))
    if draws_at_once > 1:
        every = torch.vmap(log_probabilities, chunk_size=draws_at_once)(dict(draws))
    else:
        each = ({name: tensor[s] for name, tensor in draws.items()} for s in range(num_draws))
        every = torch.stack([log_probabilities(tensors) for tensors in each])
    return every.logsumexp(0) - math.log(num_draws)  # [S, B, C] -> [B, C]


def _class_axis(output: Any, given: int | None) -> int:
    dims = output_tensor(output).dim()
    tokens = dims == 3 and not isinstance(output, (Tensor, tuple, list))  # of transformers
    if given is None and dims > 2 and not tokens:
        raise NetworkError(
            f"The network's output has the shape {list(output_tensor(output).shape)}, and nothing says which "
            "dimension holds the classes that are averaged: set class_axis of the averaged network, 1, or -1 for "
            "the last."
        )
    return -1 if given is None else given


@contextmanager
def _running(tensors: Mapping[str, Tensor]) -> Iterator[None]:
    before = _at_hand.tensors  # of an average within an average
    _at_hand.tensors = tensors
    try:
        yield
    finally:
        _at_hand.tensors = before


def _drawn_class(plain: type[nn.Module], names: tuple[str, ...]) -> type[nn.Module]:
    """Return a subclass whose attributes ``names`` are tensors of the draw at hand."""

    def reduce(module: nn.Module, protocol: Any) -> tuple[Any, ...]:
        """Let copies and pickles make the class anew: it stands in no file."""
        reduced: Any = plain.__reduce_ex__(module, protocol)
        return _empty, (plain, names), *reduced[2:]

    attributes: dict[str, Any] = {name: _drawn_attribute(name) for name in names}
    return type(plain.__name__, (plain,), attributes | {"__reduce_ex__": reduce})


def _drawn_attribute(name: str) -> property:
    def drawn(module: nn.Module) -> Tensor:
        tensors = _at_hand.tensors
        if tensors is None:
            raise NetworkError(
                f"'{name}' of a {type(module).__name__} differs from draw to draw and is there only while an "
                "average of draws runs it in the same thread: call the average instead of its network."
            )
        return tensors[module.__dict__[_KEYS][name]]

    return property(drawn)


def _empty(plain: type[nn.Module], names: tuple[str, ...]) -> nn.Module:
    kind = _drawn_class(plain, names)
    return kind.__new__(kind)
