"""The smallest file that loses at most so much: a few compressions that share their first half.

What a file loses beside the fp32 network grows with its ratio about as a power of it, so that a few that were
measured tell where the loss that is allowed is to be expected, and how sure that is.
"""

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from pydantic import Field
from torch import nn

from sqs_pyro.compression import searching
from sqs_pyro.compression.finetune.call import CompressionResult, StepRecord, compress, reachable_ratio
from sqs_pyro.compression.finetune.loop import branching_step
from sqs_pyro.compression.finetune.recipe import CompressionRecipe
from sqs_pyro.compression.searching import Attempt, Found, LossLaw, next_place
from sqs_pyro.errors import RecipeError
from sqs_pyro.evaluation.judging import Judge, judged
from sqs_pyro.packing import size_report
from sqs_pyro.ranks import ranks
from sqs_pyro.recipes import RecipeSection

# Growth of ResNet-20 on Fashion-MNIST between ratios 16 and 45.
_LAW = LossLaw(growth=1.7, uncertainty=0.5, width=1.0, noise=0.2, whole=0.0, enough=0.02)
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
    if recipe.storage.layout not in ("auto", "entropy", "adaptive", "structured"):
        raise ValueError(
            "compression.layout 'auto', 'entropy' or 'adaptive' beside search, not "
            f"{recipe.storage.layout!r}: the size is predicted for entropy-coded weights"
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


def next_ratio(attempts: Sequence[Attempt], points: float, more: int, largest: float = math.inf) -> float | None:
    """Return the ratio to try next; None: none is expected to be worth its time.

    The loss at ratio r is ``points (r / r₀)^s`` and noise (:func:`~sqs_pyro.compression.searching.next_place`). A
    file that came out smaller than it was to be is as large as codewords let it be: none is asked to be larger.

    Args:
        attempts: so far, at least one.
        points: that may be lost.
        more: attempts that are left.
        largest: ratio that can be asked for.
    """
    if more <= 0:
        return None
    least = max((each.ratio for each in attempts if each.ratio > _SMALLER * each.target), default=1.0)
    place = next_place(
        [math.log(each.ratio) for each in attempts],
        [each.points for each in attempts],
        points,
        _LAW,
        # A little smaller than that one, which would only be made again.
        lowest=math.log(_APART * least),
        highest=math.log(largest),
    )
    return None if place is None else math.exp(place)


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
) -> Found[CompressionResult]:
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
    among = ranks()  # what is tried next follows from figures: the leader's, for all
    fp32 = among.of_leader(lambda: judged(judge, net, validation))
    largest = _REACHABLE * reachable_ratio(net, recipe, options.get("metadata"))
    if largest <= 1:
        raise RecipeError(
            f"The file can be {largest / _REACHABLE:.2g} times smaller at most, as most of it is not compressed: "
            "compress more layers."
        )
    steps = len(train_loader)
    shared = branching_step(recipe, steps) / steps
    branch = directory / "branch.pt"

    def attempt(number: int, target: float) -> tuple[CompressionResult, Attempt, float]:
        result = compress(
            net,
            train_loader,
            recipe.model_copy(update={"target_ratio": target}),
            validation=validation,
            judge=judge,
            checkpoint=directory / f"attempt-{number}.pt",
            progress=None if progress is None else _named(f"try {number}", progress),
            branch=branch,
            **options,
        )
        size = size_report(result.network)
        lost = 100 * (fp32 - among.of_leader(lambda: judged(judge, result.network, validation)))
        epochs = recipe.epochs if number == 1 else recipe.epochs - shared
        return result, Attempt(target, size.ratio, size.total, lost, epochs), result.seconds

    def following(attempts: Sequence[Attempt]) -> float | None:
        return next_ratio(attempts, search.points, search.attempts - len(attempts), largest)

    repair = "allow more points, start at a lower search.first_ratio, or give more epochs or components"
    return searching.smallest(attempt, min(search.first_ratio, largest), following, search.points, repair)


def _named(name: str, progress: Callable[[str, StepRecord], None]) -> Callable[[StepRecord], None]:
    return lambda record: progress(name, record)
