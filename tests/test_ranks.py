"""Sums that do not depend on how many ranks there are."""

from pathlib import Path

import pytest
import torch
from kits.ranks import run_on_ranks, start_ranks

from sqs_pyro.errors import RecipeError
from sqs_pyro.ranks import OrderedSum, Ranks, slow_rank

UNITS = 7


def _unit(number: int) -> torch.Tensor:
    # Magnitudes that differ: another order of additions gives other last bits.
    generator = torch.Generator().manual_seed(number)
    return torch.randn(5, 3, generator=generator) * 10.0 ** (number % 4)


def _recursive(first: int, units: int) -> torch.Tensor:
    """Return the sum by the definition of the tree: the largest power of two on the left."""
    if units == 1:
        return _unit(first)
    left = 1 << (units - 1).bit_length() - 1
    return _recursive(first, left) + _recursive(first + left, units - left)


@pytest.mark.parametrize("units", [1, 2, 3, 5, 7, 8, 13])
def test_the_order_is_that_of_the_tree(units: int):
    parts = OrderedSum(units)
    for number in range(units):
        parts.add(number, _unit(number))
    assert torch.equal(parts.total(), _recursive(0, units))


def test_few_tensors_are_held():
    parts = OrderedSum(1024)
    for number in range(1023):
        parts.add(number, torch.ones(()))
        assert len(parts.branches) <= 10
    assert parts.total() == 1023


@pytest.mark.parametrize(("size", "units"), [(1, 4), (3, 7), (4, 4), (5, 23)])
def test_each_unit_has_one_rank(size: int, units: int):
    shares = [list(Ranks(rank, size).share(units)) for rank in range(size)]
    assert [unit for share in shares for unit in share] == list(range(units))
    assert max(map(len, shares)) - min(map(len, shares)) <= 1


def test_ranks_without_a_unit_are_refused():
    Ranks(0, 4).check(4, "compression.shards")
    with pytest.raises(
        RecipeError, match=r"8 ranks share the 4 units of compression.shards: start as many, or set"
    ):
        Ranks(0, 8).check(4, "compression.shards")


@pytest.mark.parametrize(
    ("seconds", "found"),
    [([1.0], None), ([1.0, 1.4], None), ([1.0, 1.6], (1, 1.6)), ([3.0, 1.0, 2.0, 1.0], (0, 3.0)), ([0, 0], None)],
)
def test_a_slow_rank_is_one_that_takes_half_as_long_again(seconds: list[float], found: tuple[int, float] | None):
    assert slow_rank(seconds) == found


SUMS = """
import sys
import torch
import sqs_pyro.ranks
from sqs_pyro.ranks import OrderedSum, started

with started() as ranks:
    units = torch.load(sys.argv[1])
    for small in (sqs_pyro.ranks._SMALL, 0):  # sent whole, and in slices
        sqs_pyro.ranks._SMALL = small
        parts = OrderedSum(len(units))
        for number in ranks.share(len(units)):
            parts.add(number, units[number].clone())
        torch.save(ranks.summed(parts), f"{sys.argv[1]}.{ranks.rank}.{small}")
    assert ranks.gathered(ranks.rank) == list(range(ranks.size))
    assert ranks.from_rank({"of": ranks.rank}, ranks.size - 1) == {"of": ranks.size - 1}
    ranks.wait()
"""


@pytest.mark.parametrize("size", [2, 3])
def test_the_sum_is_the_same_bit_for_bit(size: int, tmp_path: Path):
    units = tmp_path / "units.pt"
    torch.save([_unit(number) for number in range(7)], units)
    run_on_ranks(size, SUMS, units)
    files = sorted(tmp_path.glob("units.pt.*"))
    assert len(files) == 2 * size
    assert all(torch.equal(torch.load(path), _recursive(0, 7)) for path in files)


LOSS = """
import os
import sys
from sqs_pyro.errors import RankError
from sqs_pyro.ranks import started

try:
    with started() as ranks:
        ranks.wait()
        if ranks.rank == 1:
            os._exit(9)
        ranks.wait()
except RankError as error:
    print(error)
    sys.exit(1)
"""


def test_a_rank_that_is_lost_is_told_at_once():
    ended = [started.wait() for started in start_ranks(2, LOSS)]
    assert [each.returncode for each in ended] == [1, 9]
    assert "Rank 0 can no longer reach the others" in ended[0].stdout
    assert "goes on from what is finished" in ended[0].stdout
