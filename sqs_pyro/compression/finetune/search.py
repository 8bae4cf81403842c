"""The smallest file that loses at most so much: a few compressions that share their first half.

What a file loses beside the fp32 network grows with its ratio about as a power of it, so that a few that were
measured tell where the loss that is allowed is to be expected, and how sure that is.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from pydantic import Field
from torch import Tensor, nn

from sqs_pyro.compression.finetune.call import CompressionResult, StepRecord, compress, reachable_ratio
from sqs_pyro.compression.finetune.loop import branching_step
from sqs_pyro.compression.finetune.recipe import CompressionRecipe
from sqs_pyro.errors import RecipeError
from sqs_pyro.evaluation.judging import Judge, judged
from sqs_pyro.packing import size_report
from sqs_pyro.recipes import RecipeSection

_SLOPE, _SLOPE_WIDTH = 1.7, 0.5  # s: of ResNet-20 on Fashion-MNIST between ratios 16 and 45
_NOISE = 0.2  # of the loss from attempt to attempt, as a share of what is allowed
_FARTHEST = 5.0  # times what is allowed: losses above tell no more than that they are
_WIDTH, _SPREAD = 1.0, 3.0  # how far, in log r, the ratio is from the first attempt's, and may be
_ENOUGH = 0.02  # expected improvement of log r that is worth an attempt
_SMALLER, _APART = 1.01, 1.03  # times a ratio: sizes are met within half a hundredth; it is another file
_REACHABLE = 0.8  # of the ratio at which nothing would be left for weights


class SearchRecipe(RecipeSection):
    """The smallest file that loses at most so much is looked for; `compression.target_ratio` follows.

    Attributes:
        points: hundredths of the task's figure (of classes accuracy) that may be lost on validation data.
        first_ratio: of the first attempt, which takes `compression.epochs`.
        attempts: at most. Further ones begin halfway through the first.
    """

    points: float = Field(gt=0, le=100)
    first_ratio: float = Field(default=20.0, gt=1)
    attempts: int = Field(default=4, ge=1, le=100)


def check_searchable(search: SearchRecipe | None, recipe: CompressionRecipe) -> None:
    """Check that a search, if there is one, is what decides the size of a recipe's file; raises ValueError."""
    if search is None:
        return
    if recipe.target_ratio is not None:
        raise ValueError(f"no compression.target_ratio ({recipe.target_ratio:g}) beside search, which decides it")
    if recipe.storage.layout not in ("auto", "entropy", "structured"):
        raise ValueError(
            f"compression.layout 'auto' or 'entropy' beside search, not {recipe.storage.layout!r}: the size is "
            "predicted for entropy-coded weights"
        )


def check_points(search: SearchRecipe, examples: int) -> None:
    """Check that a share of so many validation examples can tell what a search asks for.

    Raises:
        RecipeError: one example is worth more.
    """
    one = 100 / examples
    if search.points < one:
        raise RecipeError(
            f"Recipe key 'search.points' is {search.points:g}, but one of {examples:,} validation examples is "
            f"worth {one:.2g}: give at least that, or more `data.validation`."
        )


@dataclass(frozen=True)
class Attempt:
    """What one compression came to.

    Attributes:
        target: the ratio that was asked for.
        ratio: of the file.
        bytes: of the file.
        points: lost on validation data, hundredths; below zero where the file is better than the fp32 network.
        epochs: that it took.
    """

    target: float
    ratio: float
    bytes: int
    points: float
    epochs: float


@dataclass(frozen=True)
class Found:
    """What a search has found.

    Attributes:
        result: the smallest that was good enough; if none was, the one that lost least.
        attempts: all, in their order.
        chosen: index of the result among them.
        met: whether it is good enough.
        seconds: of all, as of :class:`~sqs_pyro.compression.finetune.call.CompressionResult`.
    """

    result: CompressionResult
    attempts: list[Attempt]
    chosen: int
    met: bool
    seconds: float

    def document(self, points: float) -> dict[str, Any]:
        """Return the search as ``metrics.json`` holds it; ``unmet`` says why, where nothing was good enough."""
        best = self.attempts[self.chosen]
        why = (
            f"{points:g} points cannot be met; {best.points:.2g} at ratio {best.ratio:.3g} was the best of "
            f"{len(self.attempts)}: allow more points, start at a lower search.first_ratio, or give more epochs "
            "or components."
        )
        return {
            "points": points,
            "attempts": [asdict(attempt) for attempt in self.attempts],
            "chosen": self.chosen,
            "unmet": None if self.met else why,
        }


def next_ratio(attempts: Sequence[Attempt], points: float, more: int, largest: float = math.inf) -> float | None:
    """Return the ratio to try next; None: none is expected to be worth its time.

    The loss at ratio r is ``points (r / r₀)^s`` and noise. From what was measured follows the posterior of s and
    of r₀, the ratio that is looked for, by enumeration. What is tried is the ratio of the largest expected
    improvement: how much smaller the file becomes (``log r``), times the probability that it is good enough. A
    file that came out smaller than it was to be is as large as codewords let it be: none is asked to be larger.

    Args:
        attempts: so far, at least one.
        points: that may be lost.
        more: attempts that are left.
        largest: ratio that can be asked for.
    """
    if more <= 0:
        return None
    noise = _NOISE * points
    about = math.log(attempts[0].ratio)
    scale = torch.linspace(about - _SPREAD, about + _SPREAD, 121, dtype=torch.double)  # log r₀: [R]
    slope = torch.linspace(0.5, 4, 15, dtype=torch.double)  # s: [S]

    def loss(ratios: Tensor) -> Tensor:  # [N] -> [N, S, R]; a loss that is far too large is only that
        return points * (slope[:, None] * (ratios[:, None, None] - scale)).clamp(max=math.log(_FARTHEST)).exp()

    tried = torch.tensor([math.log(each.ratio) for each in attempts], dtype=torch.double)
    lost = torch.tensor([min(each.points, _FARTHEST * points) for each in attempts], dtype=torch.double)
    log_p = -0.5 * ((lost[:, None, None] - loss(tried)) / noise).square().sum(0)
    log_p -= 0.5 * ((slope[:, None] - _SLOPE) / _SLOPE_WIDTH).square() + 0.5 * ((scale - about) / _WIDTH).square()
    posterior = log_p.flatten().softmax(0).view_as(log_p)  # [S, R]

    good = max((each.ratio for each in attempts if each.points <= points), default=1.0)
    least = max((each.ratio for each in attempts if each.ratio > _SMALLER * each.target), default=1.0)
    # A little smaller than that one, which would only be made again.
    low, high = max(about - _SPREAD, math.log(_APART * least)), min(about + _SPREAD, math.log(largest))
    ratios = torch.linspace(low, max(low, high), 241, dtype=torch.double)
    enough = torch.special.ndtr((points - loss(ratios)) / noise)
    probability = (enough * posterior).sum((1, 2))  # [N]
    gain = (ratios - math.log(good)) * probability
    best = int(gain.argmax())
    return float(ratios[best].exp()) if gain[best] > _ENOUGH else None


def smallest(
    net: nn.Module,
    train_loader: Any,
    recipe: CompressionRecipe,
    search: SearchRecipe,
    *,
    validation: Any,
    judge: Judge,
    directory: Path,
    progress: Callable[[str, StepRecord], None] | None = None,
    **options: Any,
) -> Found:
    """Compress a network to several sizes, one after the other, and return the smallest that is good enough.

    Args:
        net, train_loader, recipe, validation, judge: as of :func:`~sqs_pyro.compression.finetune.call.compress`;
            the recipe's ``target_ratio`` is not looked at.
        search: what is good enough.
        directory: of the attempts' checkpoints, from which an interrupted search goes on.
        progress: called with what is being tried, and the record of a step.
        options: of :func:`~sqs_pyro.compression.finetune.call.compress`.

    Raises:
        RecipeError, NetworkError, DataError, DivergenceError: as :func:`compress`; or the network cannot become
            much smaller.
    """
    fp32 = judged(judge, net, validation)
    largest = _REACHABLE * reachable_ratio(net, recipe)
    if largest <= 1:
        raise RecipeError(
            f"The file can be {largest / _REACHABLE:.2g} times smaller at most, as most of it is not compressed: "
            "compress more layers."
        )
    steps = len(train_loader)
    shared = branching_step(recipe, steps) / steps
    branch = directory / "branch.pt"
    attempts: list[Attempt] = []
    seconds = 0.0
    chosen: tuple[int, CompressionResult] | None = None
    target: float | None = min(search.first_ratio, largest)
    while target is not None:
        number, epochs = len(attempts) + 1, recipe.epochs - shared if attempts else recipe.epochs
        name = f"try {number}"
        result = compress(
            net,
            train_loader,
            recipe.model_copy(update={"target_ratio": target}),
            validation=validation,
            judge=judge,
            checkpoint=directory / f"attempt-{number}.pt",
            progress=None if progress is None else _named(name, progress),
            branch=branch,
            **options,
        )
        size = size_report(result.network)
        lost = 100 * (fp32 - judged(judge, result.network, validation))
        attempts.append(Attempt(target, size.ratio, size.total, lost, epochs))
        seconds += result.seconds
        best = _best(attempts, search.points)
        if best == number - 1:
            chosen = best, result
        target = next_ratio(attempts, search.points, search.attempts - number, largest)
    assert chosen is not None
    return Found(chosen[1], attempts, chosen[0], attempts[chosen[0]].points <= search.points, seconds)


def _best(attempts: Sequence[Attempt], points: float) -> int:
    good = [i for i, each in enumerate(attempts) if each.points <= points]
    if good:
        return min(good, key=lambda i: attempts[i].bytes)
    return min(range(len(attempts)), key=lambda i: attempts[i].points)


def _named(name: str, progress: Callable[[str, StepRecord], None]) -> Callable[[StepRecord], None]:
    return lambda record: progress(name, record)
