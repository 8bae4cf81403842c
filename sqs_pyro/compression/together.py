"""What ranks must be agreed on: what they were given, what they have come to, and when they stop."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from sqs_pyro.compression.interruption import deferred_interrupt
from sqs_pyro.errors import DataError, NetworkError, RecipeError
from sqs_pyro.fingerprint import Fingerprint, described, first_difference
from sqs_pyro.ranks import Ranks, check_alike

_ERRORS = {"recipe": RecipeError, "data": DataError}


def check_same_call(ranks: Ranks, of_this: Fingerprint) -> None:
    """Check that all ranks were called with the same network, data and recipe.

    Raises:
        RecipeError, NetworkError, DataError: naming the first thing that differs.
        RankError: another rank has ended.
    """
    first, *others = ranks.gathered(of_this)
    for rank, other in enumerate(others, 1):
        if (found := first_difference(first, other)) is not None:
            part, said = found
            raise _ERRORS.get(part, NetworkError)(
                f"Ranks 0 and {rank} were given another {part} ({said}): give all of them the same files and "
                "seeds, and install the same versions."
            )


def check_same_state(ranks: Ranks, state: Callable[[], Mapping[str, Any]], step: int) -> None:
    """Check that ranks have computed the same: everything follows from it without a word between them.

    Args:
        ranks: that share the work.
        state: returns what a checkpoint of this rank would hold.
        step: for the sentence.

    Raises:
        RankError: they have not.
    """
    if ranks.size > 1:
        own = described({key: value for key, value in state().items() if key != "seconds"})
        differ = f"Ranks have come to different states by step {step}: start them on processors of one kind, with "
        check_alike(ranks.gathered(own), f"{differ}equal numbers of threads")


@contextmanager
def stopping_together(ranks: Ranks) -> Iterator[None]:
    """Let Ctrl-C and SIGTERM take effect when the body ends, on all ranks if any has received one.

    On several ranks a second signal waits as well: a terminal sends one to all, and torchrun then sends another.

    Raises:
        RankError: another rank has ended.
    """
    with deferred_interrupt(insistent=ranks.size == 1) as received:
        yield
        received += [number for number in _heard_by_any(ranks, received) if number not in received]


@contextmanager
def stoppable_together(ranks: Ranks) -> Iterator[Callable[[], int | None]]:
    """Let signals to any of several ranks wait until all ask for them; a process alone is stopped as ever.

    Yields:
        A function for all ranks to call where they can stop: it returns a signal that has come to any, or None.
    """
    if ranks.size == 1:
        yield lambda: None
        return
    with deferred_interrupt(insistent=False) as received:
        yield lambda: next(iter(_heard_by_any(ranks, received)), None)


def _heard_by_any(ranks: Ranks, received: list[int]) -> list[int]:
    return [number for of_rank in ranks.gathered(list(received)) for number in of_rank]
