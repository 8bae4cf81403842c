"""A claim of README or a page, the committed figures that it comes from, and the tests of them.

* ``seeds``: figures of both at the same seeds, splits or data sets, by a paired t-test
  (:func:`sqs_pyro.reporting.paired.paired_difference`): chance is that of seeds, examples are the same;
* ``crossed``: losses by seed and example, both drawn at random, as ``paired_losses.py`` wrote them;
* ``examples``: shares of n examples of one run each. Which examples both have right is not kept: the interval is
  McNemar's for the most that they may disagree, the sum of their errors, so that the true one is never wider;
* ``medians``: times of calls in turn, by medians and quartiles. A median of n times has a standard deviation of
  1.253 σ/√n, σ = (q₃ - q₁)/1.349, here of logarithms: chance is that of a call on this machine;
* ``run``: one run, of which nothing is said but that;
* ``counted``: bytes, and errors of fixed weights, which are exact.
"""

import json
import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

from sqs_pyro.reporting.paired import LEVEL, paired_difference

HERE = Path(__file__).parent

#: A file of this directory, then keys: of a mapping, a position of a list, a mapping that one entry of a list
#: contains, :class:`Those` entries that contain it, or ``EACH``.
Place = tuple[Any, ...]
EACH = "*"


class Those(dict[str, Any]):
    """All entries of a list that contain this."""


@dataclass(frozen=True)
class Found:
    """What a test says of n seeds, examples or calls: the difference, its interval and p, where there are any."""

    n: int | None
    of: str
    difference: float
    interval: list[float] | None = None
    p: float | None = None


Test = Callable[[Any, Any, Any], Found]


@dataclass(frozen=True)
class Claim:
    """A difference that a page claims.

    Attributes:
        says: page (README.md, or a file of docs/) to its sentence, verbatim but for line breaks.
        what: ours, theirs and the figure, for the table.
        test: of what stands at both places, and of the whole file of ours.
        ours, theirs: places of figures; ``theirs`` may be a number.
        claimed: 1: ours has more, -1: less, 0: that no difference was found.
        unit, scale: of the difference in the table.
    """

    says: dict[str, str]
    what: str
    test: Test
    ours: Place
    theirs: Place | float
    claimed: int
    unit: str = ""
    scale: float = 1.0


@cache
def document(file: str) -> Any:
    return json.loads((HERE / file).read_text(encoding="utf-8"))


def at(place: Place) -> Any:
    """Return what stands at a place.

    Raises:
        SystemExit: nothing does.
    """
    file, *keys = place
    try:
        return _below(document(file), keys)
    except (KeyError, IndexError, TypeError, OSError, ValueError) as error:
        raise SystemExit(f"{file} has nothing at {keys}: {error!r}. Has it been measured anew?") from error


def _below(value: Any, keys: Sequence[Any]) -> Any:
    if not keys:
        return value
    key, *further = keys
    if key == EACH:
        return [_below(entry, further) for entry in (value.values() if isinstance(value, Mapping) else value)]
    if isinstance(key, Mapping):
        found = [entry for entry in value if key.items() <= entry.items()]
        if isinstance(key, Those):
            return [_below(entry, further) for entry in found]
        if len(found) != 1:
            raise KeyError(key)
        key, value = 0, found
    return _below(value[key], further)


def seeds(ours: Any, theirs: Any, _: Any, *, of: str = "seeds") -> Found:
    found = paired_difference(ours, theirs if isinstance(theirs, list) else [theirs] * len(ours))
    return Found(len(ours), of, found.mean, found.interval, found.p)


def crossed(ours: Any, _: Any, whole: Any) -> Found:
    of = f"{whole['seeds']} seeds, {whole['images']} images"
    return Found(None, of, ours["mean"], ours["interval"], ours["p"])


def examples(ours: Any, theirs: Any, _: Any, *, n: int) -> Found:
    difference, disagree = ours - theirs, min((1 - ours) + (1 - theirs), 1.0)
    return _normal(n, "examples", difference, math.sqrt((disagree - difference**2) / n))


def medians(ours: Any, theirs: Any, whole: Any) -> Found:
    """How many times as fast ours is."""
    rounds, error = whole["rounds"], 0.0
    for times in (ours, theirs):
        sigma = math.log(times["upper_quartile"] / times["lower_quartile"]) / 1.349
        error = math.hypot(error, math.sqrt(math.pi / 2) * sigma / math.sqrt(rounds))
    found = _normal(rounds, "calls", math.log(theirs["microseconds"] / ours["microseconds"]), error)
    return replace(
        found, difference=math.exp(found.difference), interval=[math.exp(end) for end in found.interval or []]
    )


def _normal(n: int, of: str, difference: float, error: float) -> Found:
    normal = statistics.NormalDist()
    half = normal.inv_cdf(0.5 + LEVEL / 2) * error
    return Found(
        n, of, difference, [difference - half, difference + half], 2 * normal.cdf(-abs(difference) / error)
    )


def run(ours: Any, theirs: Any, _: Any) -> Found:
    return Found(1, "run", ours / theirs)


def counted(ours: Any, theirs: Any, _: Any) -> Found:
    return Found(None, "exact", ours / theirs)
