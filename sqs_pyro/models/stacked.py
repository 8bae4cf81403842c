"""Several networks at once: weights drawn in Pyro's plates, and what each network predicts, jointly."""

import itertools
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from pyro.distributions import TorchDistribution
from torch import Tensor
from torch.distributions import constraints


def drawn_networks(
    tensors: Mapping[str, Tensor], like: Mapping[str, Tensor]
) -> tuple[torch.Size, list[dict[str, Tensor]]]:
    """Return the networks in drawn tensors, whose dimensions of plates (particles, samples) come before their own.

    Args:
        tensors: values by name, ``[*plates, *shape]``; plates of different tensors broadcast.
        like: tensors of each ``shape``, by name.

    Returns:
        The joint shape of the plates, ``()`` if there is one network, and tensors ``[*shape]`` of each network.
    """
    # What stands before a tensor's own dimensions; a point estimate has none.
    plates = {name: value.shape[: max(value.dim() - like[name].dim(), 0)] for name, value in tensors.items()}
    joint = torch.broadcast_shapes(*plates.values())
    wide = {name: value.expand((*joint, *value.shape[len(plates[name]) :])) for name, value in tensors.items()}
    # A single network keeps its plain shapes, whatever plates of size 1 are around it.
    if joint.numel() == 1:
        first = (0,) * len(joint)
        return torch.Size(), [{name: value[first] for name, value in wide.items()}]
    places = itertools.product(*map(range, joint))
    return joint, [{name: value[place] for name, value in wide.items()} for place in places]


def plates_around(drawn: torch.Size, dim: int) -> torch.Size:
    """Return the shape ``drawn`` of networks with a dimension of size 1 at ``dim``, for the examples.

    ``Predictive(parallel=True)`` leaves that place out of what it hands on.
    """
    padded = torch.Size([1] * (-dim - len(drawn)) + list(drawn))
    # Occupied by networks: the examples then go to the right of all of them.
    return padded if padded[dim] == 1 else torch.Size([*padded, *[1] * -dim])


def stack_networks(parts: Sequence[Tensor], plates: torch.Size, dim: int, event_dims: int) -> Tensor:
    """Join tensors ``[*sample, B, *event]`` of each network; B is at ``dim`` among the plates.

    Args:
        parts: one for each network, in row-major order of ``plates``.
        plates: of networks, of size 1 at ``dim``.
        dim: negative, where B goes.
        event_dims: number of event dimensions.
    """
    networks = [size for at, size in enumerate(plates, -len(plates)) if at != dim]
    stacked = torch.stack(list(parts), -2 - event_dims)  # [*sample, S, B, *event]
    return stacked.unflatten(-2 - event_dims, networks).movedim(-1 - event_dims, dim - event_dims)


class StackedDistribution(TorchDistribution):
    """What several networks predict: independent distributions, each with batch shape ``[B]``, as one.

    Shapes: ``batch_shape`` is ``plates`` with B at ``dim``, ``event_shape`` that of each distribution.

    Args:
        networks: what each of them predicts, in row-major order of ``plates``.
        plates: of networks, of size 1 at ``dim``.
        dim: negative, the place of the examples.
    """

    arg_constraints: dict[str, constraints.Constraint] = {}  # noqa: RUF012  as torch declares it

    def __init__(self, networks: Sequence[TorchDistribution], plates: torch.Size, dim: int) -> None:
        self.networks, self.plates, self.dim = tuple(networks), plates, dim
        # The examples' place is 1 in `plates`, and B here.
        shape = list(plates)
        shape[dim] = self.networks[0].batch_shape[0]
        super().__init__(torch.Size(shape), self.networks[0].event_shape, validate_args=False)

    @property
    def support(self) -> Any:
        """That of each distribution."""
        return self.networks[0].support

    @property
    def has_rsample(self) -> bool:
        """Whether draws of every distribution are differentiable."""
        return all(each.has_rsample for each in self.networks)

    def log_prob(self, value: Tensor) -> Tensor:
        """Return ``[*sample, *batch_shape]``; a value without the networks' dimensions is each of theirs."""
        events = len(self.event_shape)
        # An observation is the same for every network.
        value = value.expand(torch.broadcast_shapes(value.shape, self.batch_shape + self.event_shape))
        value = value.movedim(self.dim - events, -1 - events)  # [*sample, *networks, B, *event]
        behind: tuple[Any, ...] = (slice(None),) * (1 + events)
        sizes = value.shape[value.dim() - events - len(self.plates) : value.dim() - events - 1]
        places = itertools.product(*map(range, sizes))
        parts = [each.log_prob(value[(..., *at, *behind)]) for each, at in zip(self.networks, places, strict=True)]
        return stack_networks(parts, self.plates, self.dim, 0)

    def sample(self, sample_shape: Sequence[int] = ()) -> Tensor:
        """Return a draw of each network's prediction, ``[*sample, *batch_shape, *event_shape]``."""
        return self._drawn([each.sample(torch.Size(sample_shape)) for each in self.networks])

    def rsample(self, sample_shape: Sequence[int] = ()) -> Tensor:
        """Return the same, differentiable."""
        return self._drawn([each.rsample(torch.Size(sample_shape)) for each in self.networks])

    def _drawn(self, parts: list[Tensor]) -> Tensor:
        return stack_networks(parts, self.plates, self.dim, len(self.event_shape))
