"""Where to look for the smallest file that loses at most so much, from a few that were measured.

How small a file is, x, has a unit in which its loss grows exponentially: ``log r`` of its ratio, or bits a weight
that were left away.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor

Result = TypeVar("Result")

_FARTHEST = 5.0  # times what is allowed: losses above tell no more than that they are


@dataclass(frozen=True)
class LossLaw:
    """How a loss grows with how small a file is, ``points exp(s (x - x₀))``, before anything is measured.

    Attributes:
        growth: mean of s.
        uncertainty: standard deviation of s.
        width: standard deviation of x₀ around the first attempt's x; three times that is the farthest it may be.
        noise: of the loss from place to place, as a share of what is allowed.
        whole: x of the network as it is, or of what is sure to lose nothing.
        enough: expected gain of x that is worth an attempt; nearer to each other than that places are the same.
    """

    growth: float
    uncertainty: float
    width: float
    noise: float
    whole: float
    enough: float


def next_place(
    tried: Sequence[float],
    lost: Sequence[float],
    points: float,
    law: LossLaw,
    *,
    lowest: float = -math.inf,
    highest: float = math.inf,
) -> float | None:
    """Return the x to try next; None: none is expected to be worth its time.

    From what was measured follows the posterior of s and of x₀, which is looked for, by enumeration. What is tried
    is the place of the largest expected improvement: how much smaller the file becomes, times the probability that
    it is good enough. Noise is from place to place: where a file was not good enough the same one would be made
    again.

    Args:
        tried: x of the attempts so far, at least one.
        lost: by each.
        points: that may be lost.
        law: what is expected.
        lowest, highest: x that can be asked for.
    """
    noise = law.noise * points
    about, spread = tried[0], 3 * law.width
    places = torch.linspace(about - spread, about + spread, 121, dtype=torch.double)  # x₀: [P]
    low, high = law.growth - 2.4 * law.uncertainty, law.growth + 4.6 * law.uncertainty  # growth has a long tail
    growth = torch.linspace(low, high, 15, dtype=torch.double)  # s: [S]

    def loss(x: Tensor) -> Tensor:  # [N] -> [N, S, P]; a loss that is far too large is only that
        return points * (growth[:, None] * (x[:, None, None] - places)).clamp(max=math.log(_FARTHEST)).exp()

    measured = torch.tensor([min(each, _FARTHEST * points) for each in lost], dtype=torch.double)
    x = torch.tensor(tried, dtype=torch.double)
    log_p = -0.5 * ((measured[:, None, None] - loss(x)) / noise).square().sum(0)
    log_p -= 0.5 * ((growth[:, None] - law.growth) / law.uncertainty).square()
    log_p -= 0.5 * ((places - about) / law.width).square()
    posterior = log_p.flatten().softmax(0).view_as(log_p)  # [S, P]

    start, end = max(about - spread, lowest), min(about + spread, highest)
    candidates = torch.linspace(start, max(start, end), 241, dtype=torch.double)
    enough = torch.special.ndtr((points - loss(candidates)) / noise)
    probability = (enough * posterior).sum((1, 2))  # [N]
    good = max((each for each, own in zip(tried, lost, strict=True) if own <= points), default=law.whole)
    gain = (candidates - good) * probability
    gain[((candidates[:, None] - x).abs() < law.enough).any(1)] = 0  # known: the same file, or as good as that
    best = int(gain.argmax())
    return float(candidates[best]) if gain[best] > law.enough else None


@dataclass(frozen=True)
class Attempt:
    """What one compression came to.

    Attributes:
        target: the ratio, or the bits a weight, that was asked for.
        ratio: of the file.
        bytes: of the file.
        points: lost on validation data, hundredths; below zero where the file is better than the fp32 network.
        epochs: that it took; None where nothing is trained.
    """

    target: float
    ratio: float
    bytes: int
    points: float
    epochs: float | None = None


@dataclass(frozen=True)
class Found(Generic[Result]):
    """What a search has found.

    Attributes:
        result: the smallest that was good enough; if none was, the one that lost least.
        attempts: all, in their order.
        chosen: index of the result among them.
        met: whether it is good enough.
        seconds: of all, as of the results.
        repair: what else there is to do where none is.
    """

    result: Result
    attempts: list[Attempt]
    chosen: int
    met: bool
    seconds: float
    repair: str

    def document(self, points: float) -> dict[str, Any]:
        """Return the search as ``metrics.json`` holds it; ``unmet`` says why, where nothing was good enough."""
        best = self.attempts[self.chosen]
        why = (
            f"{points:g} points cannot be met; {best.points:.2g} at ratio {best.ratio:.3g} was the best of "
            f"{len(self.attempts)}: {self.repair}."
        )
        return {
            "points": points,
            "attempts": [asdict(attempt) for attempt in self.attempts],
            "chosen": self.chosen,
            "unmet": None if self.met else why,
        }


def smallest(
    attempt: Callable[[int, float], tuple[Result, Attempt, float]],
    first: float,
    following: Callable[[Sequence[Attempt]], float | None],
    points: float,
    repair: str,
) -> Found[Result]:
    """Make one attempt after the other, keep the best result of them, and return it.

    Args:
        attempt: makes the one of a number, from 1, and a target; returns what it is, what it came to, and seconds.
        first: target.
        following: gives the next target, of all attempts so far; None ends the search.
        points: that may be lost.
        repair: as of :class:`Found`.
    """
    attempts: list[Attempt] = []
    seconds = 0.0
    chosen: tuple[int, Result] | None = None
    target: float | None = first
    while target is not None:
        result, own, took = attempt(len(attempts) + 1, target)
        attempts.append(own)
        seconds += took
        if (best := _best(attempts, points)) == len(attempts) - 1:
            chosen = best, result
        target = following(attempts)
    assert chosen is not None
    index, kept = chosen
    return Found(kept, attempts, index, attempts[index].points <= points, seconds, repair)


def _best(attempts: Sequence[Attempt], points: float) -> int:
    good = [i for i, each in enumerate(attempts) if each.points <= points]
    if good:
        return min(good, key=lambda i: attempts[i].bytes)
    return min(range(len(attempts)), key=lambda i: attempts[i].points)
