"""Draws of one network: networks that differ in some tensors, which they are given without being written to.

A module reads its drawn tensors from the draw that its *thread* runs. So any number of threads may run one
network, and nothing in it is ever exchanged, as :func:`torch.func.functional_call` exchanges tensors for a while.
"""

import math
import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
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


class AverageOfDraws(nn.Module, ABC):
    """Networks that differ in some tensors, as one: ``log 1/S Σ_s softmax(f(x; θ_s))``, shaped as the logits.

    Attributes:
        draws_at_once: networks that run together, by ``torch.vmap``; 1 is a loop.
        class_axis: the dimension of the networks' outputs that holds the classes; to be set where there are more
            than two dimensions.
        draws_used: how many draws count, the first ones; None: all of them.
    """

    draws_at_once: int = 1
    class_axis: int | None = None
    draws_used: int | None = None

    @property
    @abstractmethod
    def called_like(self) -> nn.Module:
        """The network that runs, to which arguments are handed on."""

    @abstractmethod
    def draws(self) -> dict[str, Tensor]:
        """Return the tensors in which the networks differ, ``[S, *shape]`` by name."""

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        """Return the average of the draws' probabilities, as logarithms; the arguments are the network's."""
        return average_log_probabilities(
            self.called_like, self._used(), args, kwargs, self.draws_at_once, self.class_axis
        )

    def each(self, *args: Any, **kwargs: Any) -> Tensor:
        """Return what each network says, ``[S, B, ...]``: logits, or numbers; the arguments are the network's."""
        return outputs_of_draws(self.called_like, self._used(), args, kwargs, self.draws_at_once)

    def _used(self) -> dict[str, Tensor]:
        return {name: tensor[: self.draws_used] for name, tensor in self.draws().items()}


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

    def log_probabilities(output: Any) -> Tensor:
        return output_tensor(output).float().log_softmax(_class_axis(output, class_axis))

    every = _of_each(net, draws, args, kwargs, draws_at_once, log_probabilities)
    return every.logsumexp(0) - math.log(len(every))  # [S, B, C] -> [B, C]


def outputs_of_draws(
    net: nn.Module,
    draws: Mapping[str, Tensor],
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    draws_at_once: int = 1,
) -> Tensor:
    """Return what each network says, ``[S, B, ...]``; arguments as of :func:`average_log_probabilities`."""
    return _of_each(net, draws, args, kwargs, draws_at_once, output_tensor)


def _of_each(
    net: nn.Module,
    draws: Mapping[str, Tensor],
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    draws_at_once: int,
    function: Callable[[Any], Tensor],
) -> Tensor:
    """Return a function of each network's output, stacked."""

    def one(tensors: Mapping[str, Tensor]) -> Tensor:
        with _running(tensors):
            return function(net(*args, **kwargs))

    if draws_at_once > 1:
        return torch.vmap(one, chunk_size=draws_at_once)(dict(draws))
    num_draws = len(next(iter(draws.values())))
    return torch.stack([one({name: tensor[s] for name, tensor in draws.items()}) for s in range(num_draws)])


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
