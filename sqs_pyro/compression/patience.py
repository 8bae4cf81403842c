"""When training stops because validation no longer improves, and which of its evaluations was the best."""

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Kept:
    """Which weights training with patience has kept.

    Attributes:
        best: epoch or step, from 1, whose weights were kept.
        last: epoch or step at which training stopped.
        planned: epochs or steps of the recipe.
    """

    best: int
    last: int
    planned: int


def best_of(scores: Sequence[float]) -> int:
    """Return the index of the highest score, the first of several equal ones."""
    return max(range(len(scores)), key=lambda i: scores[i])


def is_over(scores: Sequence[float], patience: int | None) -> bool:
    """Whether so many evaluations have followed the best one; without patience never."""
    return patience is not None and len(scores) > patience and len(scores) - 1 - best_of(scores) >= patience
