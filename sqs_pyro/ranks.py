"""Ranks: processes that `torchrun` has started to compute one thing together, by torch.distributed.

What comes out must not depend on how many there are. Floating-point sums depend on their order, so work is
divided into *units* (shards of a minibatch, sequences of a text), whose number is given and not a matter of ranks,
and what units give is summed in the order of one binary tree over them (:class:`OrderedSum`). Each rank has
consecutive units; a rank more or less moves where additions are done, never which.
"""

import os
import statistics
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from functools import cache
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from sqs_pyro.errors import RankError, RecipeError, SQSError, first_line

T = TypeVar("T")

_SLOW = 1.5  # times the others' median
#: Of a rank that waits for another. A killed one is noticed at once, by its closed connection.
_PATIENCE = timedelta(days=3)  # the leader may be training the fp32 network

#: Numbers of a tensor that is sent whole: what a message takes is then the time until it arrives.
_SMALL = 4096


@dataclass(frozen=True)
class Ranks:
    """Which of how many processes this is.

    Attributes:
        rank: from 0.
        size: how many there are.
    """

    rank: int = 0
    size: int = 1

    @property
    def leads(self) -> bool:
        """Whether this is the one that writes files and speaks."""
        return self.rank == 0

    def share(self, units: int) -> range:
        """Return the numbers of the units that are this rank's: consecutive, as even as can be."""
        return _share(self.rank, self.size, units)

    def check(self, units: int, key: str) -> None:
        """Check that every rank has a unit.

        Raises:
            RecipeError: there are more ranks than units.
        """
        if self.size > units:
            raise RecipeError(
                f"{self.size} ranks share the {units} unit{'s' * (units != 1)} of {key}: start as many, or "
                f"set {key} to at least {self.size} (the file depends on it, but not on how many ranks there are)."
            )

    def summed(self, parts: "OrderedSum", like: Tensor | None = None) -> Tensor:
        """Return the sum over all ranks' units, the same on each, bit for bit.

        Each rank adds up a slice of all ranks' parts and hands it on: what a rank sends and receives is twice the
        tensor, however many there are (as of a ring), as long as its units make one branch of the tree.

        Args:
            parts: the sum over this rank's units.
            like: of the shape of what a unit gives, for a rank that may have none.

        Raises:
            RankError: another rank has ended.
        """
        if self.size == 1:
            return parts.total()
        own = [value for _, value in parts.branches]
        first = own[0] if like is None else like
        shape = first.shape
        places = [_branches(_share(rank, self.size, parts.units)) for rank in range(self.size)]
        if first.numel() <= _SMALL:
            return self._summed_at_once(own, places, first, parts.units)
        slice_length = -(-first.numel() // self.size)
        padded = first.new_zeros(len(own), self.size * slice_length)
        for row, value in zip(padded, own, strict=True):
            row[: value.numel()] = value.reshape(-1)
        mine = first.new_empty(sum(map(len, places)), slice_length)
        with failing_together():
            dist.all_to_all_single(
                mine,
                # [branches, ranks, slice] -> [ranks, branches, slice]: what goes to a rank lies together.
                padded.view(len(own), self.size, slice_length)
                .transpose(0, 1)
                .reshape(self.size * len(own), slice_length),
                [len(each) for each in places],
                [len(own)] * self.size,
            )
            whole = OrderedSum(parts.units)
            for (level, index), value in zip((place for each in places for place in each), mine, strict=True):
                whole.join(level, index, value)
            gathered = first.new_empty(self.size * slice_length)
            _all_gather(gathered, whole.total())
        return gathered[: first.numel()].reshape(shape)

    def _summed_at_once(
        self, own: list[Tensor], places: list[list[tuple[int, int]]], like: Tensor, units: int
    ) -> Tensor:
        """Return the sum from all branches of all ranks, which each adds up for itself: one message, not two."""
        most = max(map(len, places))
        sent, received = like.new_zeros(most, like.numel()), like.new_empty(self.size * most, like.numel())
        for row, value in zip(sent, own, strict=False):
            row.copy_(value.reshape(-1))
        with failing_together():
            _all_gather(received, sent)
        whole = OrderedSum(units)
        for rank, each in enumerate(places):
            for (level, index), value in zip(each, received[rank * most :], strict=False):
                whole.join(level, index, value)
        return whole.total().reshape(like.shape)

    def from_rank(self, value: T | None, rank: int = 0) -> T:
        """Return a rank's value on each of them; it is pickled, so that each has its own.

        Raises:
            RankError: another rank has ended.
        """
        if self.size == 1:
            return value  # type: ignore[return-value]
        box: list[Any] = [value]
        with failing_together():
            dist.broadcast_object_list(box, src=rank)
        return box[0]

    def of_leader(self, call: Callable[[], T]) -> T:
        """Return on each rank what a call gives on the leader, where alone it is made.

        Raises:
            SQSError: the call's own, on each rank.
            RankError: another rank has ended.
        """
        if self.size == 1:
            return call()
        value, failed = self.from_rank(_tried(call) if self.leads else None)
        if failed is not None:
            raise failed
        return value  # type: ignore[return-value]

    def of_each(self, call: Callable[[], T]) -> list[T]:
        """Return what each rank's call gives, in their order, on each of them.

        Raises:
            SQSError: the first rank's whose call has failed, on each.
            RankError: another rank has ended.
        """
        if self.size == 1:
            return [call()]
        told = self.gathered(_tried(call))
        for _, failed in told:
            if failed is not None:
                raise failed
        return [value for value, _ in told]  # type: ignore[misc]

    def gathered(self, value: T) -> list[T]:
        """Return every rank's value, in their order, on each of them.

        Raises:
            RankError: another rank has ended.
        """
        if self.size == 1:
            return [value]
        values: list[Any] = [None] * self.size
        with failing_together():
            dist.all_gather_object(values, value)
        return values

    def dealt(self, costs: Mapping[str, float], of: Callable[[str], T]) -> dict[str, T]:
        """Return what ``of`` gives for each name, in their order, on each rank; one rank makes it of each.

        What comes from another rank is pickled.

        Args:
            costs: by name, see :func:`owners_of`.
            of: from a name; no rank may wait for another in it.

        Raises:
            RankError: another rank has ended.
        """
        owners = owners_of(costs, self.size)
        return self.every({name: of(name) for name, owner in owners.items() if owner == self.rank}, costs)

    def every(self, own: Mapping[str, T], names: Iterable[str]) -> dict[str, T]:
        """Return the values of some names, in their order, each of which one rank has; on each of them.

        Raises:
            RankError: another rank has ended.
        """
        made: dict[str, T] = {}
        for each in self.gathered(own):
            made |= each
        return {name: made[name] for name in names}

    def wait(self) -> None:
        """Wait until every rank is here.

        Raises:
            RankError: another rank has ended.
        """
        if self.size > 1:
            with failing_together():
                dist.barrier()


#: A process that nothing is shared with.
ALONE = Ranks()


class OrderedSum:
    """A sum over units in the order of one binary tree: ``((0 + 1) + (2 + 3)) + ((4 + 5) + ...)``.

    Args:
        units: how many there are, on all ranks together; at least 1.

    Attributes:
        branches: what has been added so far, as ``((level, index), sum)``: the sum over units
            ``index 2**level ... (index + 1) 2**level - 1``. At most two for each level, so that summing units in
            turn needs memory for ``log2(units)`` tensors and not for all of them.
    """

    def __init__(self, units: int) -> None:
        self.units = units
        self.branches: list[tuple[tuple[int, int], Tensor]] = []

    def add(self, unit: int, value: Tensor) -> None:
        """Add what the next unit gives; the tensor is ours from now on, and changed."""
        self.join(0, unit, value)

    def join(self, level: int, index: int, value: Tensor) -> None:
        """Add the sum over a branch of the tree, whose units follow those of the last one."""
        # A right child is added to its left sibling, in place: that is where the order of additions is made.
        while index % 2 and self.branches and self.branches[-1][0] == (level, index - 1):
            value = self.branches.pop()[1].add_(value)
            level, index = level + 1, index // 2
        self.branches.append(((level, index), value))

    def total(self) -> Tensor:
        """Return the sum over all units; what is beyond the last whole branch is added from the right."""
        values = [value for _, value in self.branches]
        total = values.pop()
        while values:
            total = values.pop().add_(total)
        self.branches = [((self.units.bit_length(), 0), total)]
        return total


def _tried(call: Callable[[], T]) -> tuple[T | None, SQSError | None]:
    """Return what a call gives, or the error that other ranks are to be told of."""
    try:
        return call(), None
    except SQSError as error:
        return None, error


def owners_of(costs: Mapping[str, float], ranks: int) -> dict[str, int]:
    """Return which rank something goes to: the dearest first, to the rank that has least so far.

    Args:
        costs: by name, in any unit.
        ranks: how many there are.
    """
    loads, found = [0.0] * ranks, {}
    for name in sorted(costs, key=lambda each: -costs[each]):  # stable: all ranks deal alike
        found[name] = loads.index(min(loads))
        loads[found[name]] += costs[name]
    return found


def _all_gather(into: Tensor, own: Tensor) -> None:
    # Its older name, which warns from torch 2.13 on.
    all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
    all_gather(into, own)


def _share(rank: int, size: int, units: int) -> range:
    return range(rank * units // size, (rank + 1) * units // size)


@cache  # for each of thousands of small sums it is asked anew
def _branches(units: range) -> list[tuple[int, int]]:
    """Return which branches summing these units leaves."""
    places = OrderedSum(len(units))
    for unit in units:
        places.add(unit, torch.zeros(()))
    return [place for place, _ in places.branches]


@cache
def numbers_sent(numbers: int, units: int, ranks: int) -> int:
    """Return how many numbers the rank that sends most sends for one sum of tensors, see :meth:`Ranks.summed`.

    Args:
        numbers: of the tensor.
        units: that give one each, on all ranks together.
        ranks: how many there are.
    """
    most = max(len(_branches(_share(rank, ranks, units))) for rank in range(ranks))
    if numbers <= _SMALL:
        return (ranks - 1) * most * numbers
    return (ranks - 1) * (most + 1) * -(-numbers // ranks)  # its slices of branches, and of the sum one


class RankWarning(UserWarning):
    """A rank holds the others up."""


def slow_rank(seconds: list[float]) -> tuple[int, float] | None:
    """Return the rank that takes longest for the same work, and how many times the median of the others.

    None if that is less than one and a half times, or there is no other rank.
    """
    slowest = max(range(len(seconds)), key=seconds.__getitem__)
    others = seconds[:slowest] + seconds[slowest + 1 :]
    if not others or not (usual := statistics.median(others)) or seconds[slowest] < _SLOW * usual:
        return None
    return slowest, seconds[slowest] / usual


def check_alike(values: list[Any], differ: str) -> None:
    """Check that what ranks have gathered is the same of all.

    Args:
        values: of each rank.
        differ: what it means if they are not: a clause, behind which it is said which differ.

    Raises:
        RankError: they are not.
    """
    others = [str(rank) for rank, value in enumerate(values) if value != values[0]]
    if others:
        raise RankError(f"{differ} (rank{'s' * (len(others) > 1)} {', '.join(others)} and rank 0 differ).")


def ranks() -> Ranks:
    """Return which rank this process is; one alone where torch.distributed has not been started."""
    if not dist.is_available() or not dist.is_initialized():
        return ALONE
    return Ranks(dist.get_rank(), dist.get_world_size())


def number_started() -> int:
    """Return how many processes `torchrun` has started, this one and others like it; 1 without it."""
    return int(os.environ.get("WORLD_SIZE", "1")) if "MASTER_ADDR" in os.environ else 1


@contextmanager
def started() -> Iterator[Ranks]:
    """Join the ranks that `torchrun` has started, if it has started this process; else be alone.

    Raises:
        RankError: the others cannot be reached.
    """
    if dist.is_initialized() or "WORLD_SIZE" not in os.environ or "MASTER_ADDR" not in os.environ:
        yield ranks()
        return
    backend = "gloo"
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
        backend = "cpu:gloo,cuda:nccl"
    with failing_together():
        dist.init_process_group(backend, timeout=_PATIENCE)
    try:
        yield ranks()
    finally:
        dist.destroy_process_group()


@contextmanager
def failing_together() -> Iterator[None]:
    """Say in one sentence that another rank is gone, where a message to it fails."""
    try:
        yield
    except (RuntimeError, dist.DistError) as error:
        if isinstance(error, RankError):
            raise
        raise RankError(
            f"Rank {os.environ.get('RANK', '?')} can no longer reach the others ({first_line(error, 120)}): one "
            "of them has ended, and says above why. The same command goes on from what is finished, with another "
            "number of ranks too."
        ) from error
