"""What ranks share: things that are counted, minibatches or rows of a matrix, in consecutive units.

The number of units is given, and not a matter of ranks: within a unit work is done in turn, sums over units are
those of one tree (:class:`~sqs_pyro.ranks.OrderedSum`). What depends on how many rows a product of matrices has,
as its last bits do, is computed a unit at a time.
"""

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import TypeVar, overload

import torch
from torch import Tensor

from sqs_pyro.networks.calling import move_to
from sqs_pyro.ranks import ALONE, OrderedSum, Ranks

T = TypeVar("T")

#: Weights of a layer up to which messages cost more than one rank's waiting for another's layer.
_WHOLE = 1 << 21


@dataclass(frozen=True)
class Shares:
    """So many things in units, of which each rank has some.

    Attributes:
        count: of the things.
        most: units, at most: there are no more than things.
        ranks: that share them.
    """

    count: int
    most: int = 1
    ranks: Ranks = ALONE

    @property
    def units(self) -> int:
        """How many there are, on all ranks together; as even as can be."""
        return max(1, min(self.most, self.count))

    @property
    def own(self) -> slice:
        """Those of this rank; none where ranks are more than units."""
        mine = self.ranks.share(self.units)
        return slice(self._start(mine.start), self._start(mine.stop))

    @property
    def parts(self) -> list[slice]:
        """Units of this rank, as places among its own."""
        mine = self.ranks.share(self.units)
        bounds = [self._start(unit) - self._start(mine.start) for unit in range(mine.start, mine.stop + 1)]
        return [slice(a, b) for a, b in itertools.pairwise(bounds)]

    def sums(self, of: Callable[[slice], Sequence[Tensor]]) -> list[Tensor]:
        """Return sums over all units, the same on each rank, bit for bit.

        Args:
            of: from one of :attr:`parts`, in turn, to as many tensors each time, which are ours from then on.

        Raises:
            RankError: another rank has ended.
        """
        found: list[OrderedSum] = []
        for unit, part in zip(self.ranks.share(self.units), self.parts, strict=True):
            values = of(part)
            found = found or [OrderedSum(self.units) for _ in values]
            for total, value in zip(found, values, strict=True):
                total.add(unit, value)
        if self.units >= self.ranks.size:
            return [self.ranks.summed(total) for total in found]
        # Some ranks have no unit, and learn of what the sums are.
        values = [total.branches[0][1] for total in found]
        own = [(value.shape, value.dtype, value.device.type) for value in values]
        told = next(each for each in self.ranks.gathered(own) if each)
        found = found or [OrderedSum(self.units) for _ in told]
        likes = (torch.empty(shape, dtype=dtype, device=device) for shape, dtype, device in told)
        return [self.ranks.summed(total, like) for total, like in zip(found, likes, strict=True)]

    def sum(self, of: Callable[[slice], Tensor]) -> Tensor:
        """Return the sum of one tensor over all units, see :meth:`sums`."""
        (total,) = self.sums(lambda part: [of(part)])
        return total

    def joined(self, own: Tensor) -> Tensor:
        """Return what there is of all things, ``[count, ...]``, from each rank's own, ``[n, ...]``."""
        if self.ranks.size == 1:
            return own
        # By way of the CPU: another rank's GPU is not this one's.
        return torch.cat(self.ranks.gathered(own.cpu())).to(own.device)

    def everywhere(self, own: Sequence[T], device: torch.device) -> Sequence[T]:
        """Return all things as a sequence, each of which comes from its rank when all ranks ask for it.

        Args:
            own: this rank's.
            device: where tensors in them are to be.
        """
        return own if self.ranks.size == 1 else _Everywhere(self, own, device)

    def _start(self, unit: int) -> int:
        return unit * self.count // self.units


@cache  # of a thousand ranks it is asked for each of a network's layers
def largest_share(count: int, units: int, ranks: int) -> int:
    """Return how many of ``count`` things in units the rank has that has most."""
    every = (Shares(count, units, Ranks(rank, ranks)).own for rank in range(ranks))
    return max(own.stop - own.start for own in every)


def whole_layers(shapes: Mapping[str, Sequence[int]], ranks: int) -> list[str]:
    """Return which of some layers one rank codes alone: of each shape as many for each rank.

    Of the others each rank codes rows, with a message for each sum over all rows. Of large layers messages are no
    loss beside the steps that one of them takes and another does not.

    Args:
        shapes: N and M of layers that share their input, by name.
        ranks: how many there are.
    """
    if ranks == 1:
        return []
    alike: dict[tuple[int, int], list[str]] = {}
    for name, (rows, inputs) in shapes.items():
        if rows * inputs <= _WHOLE:
            alike.setdefault((rows, inputs), []).append(name)
    return [name for names in alike.values() for name in names[: len(names) // ranks * ranks]]


class _Everywhere(Sequence[T]):
    def __init__(self, shares: Shares, own: Sequence[T], device: torch.device) -> None:
        self.shares, self.own, self.device = shares, own, device
        ranks = shares.ranks
        every = (Shares(shares.count, shares.most, Ranks(rank, ranks.size)) for rank in range(ranks.size))
        self.firsts = [each.own.start for each in every]

    def __len__(self) -> int:
        return self.shares.count

    @overload
    def __getitem__(self, i: int) -> T: ...
    @overload
    def __getitem__(self, i: slice) -> Sequence[T]: ...
    def __getitem__(self, i: int | slice) -> T | Sequence[T]:
        if isinstance(i, slice):
            return [self[j] for j in range(len(self))[i]]
        owner = max(rank for rank, first in enumerate(self.firsts) if first <= i)
        mine = owner == self.shares.ranks.rank
        value = self.own[i - self.firsts[owner]] if mine else None
        return move_to(self.shares.ranks.from_rank(value, owner), self.device)
