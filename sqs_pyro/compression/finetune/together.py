"""What ranks must be agreed on: what they were given, what they have come to, and when they stop."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from sqs_pyro.compression.interruption import deferred_interrupt
from sqs_pyro.errors import RankError
from sqs_pyro.fingerprint import Fingerprint, described, first_difference
from sqs_pyro.ranks import Ranks, check_alike


def check_same_call(among: Ranks, of_this: Fingerprint) -> None:
    """Check that ranks were given the same network, data, recipe and seed.

    Raises:
        RankError: they were not; the sentence names the first thing that differs.
    """
    for rank, of_rank in enumerate(among.gathered(of_this)):
        if (difference := first_difference(of_rank, of_this)) is not None:
            part, what = difference
            raise RankError(
                f"Rank {among.rank} was given another {part} than rank {rank} ({what}): give all of them the same."
            )


def check_same_state(among: Ranks, state: Callable[[], Mapping[str, Any]], step: int) -> None:
    """Check that ranks have computed the same: everything follows from it without a word between them.

    Args:
        among: the ranks.
        state: returns what a checkpoint of this rank would hold.
        step: for the sentence.

    Raises:
        RankError: they have not.
    """
    if among.size > 1:
        own = described({key: value for key, value in state().items() if key != "seconds"})
        differ = f"Ranks have come to different states by step {step}: start them on processors of one kind, with "
        check_alike(among.gathered(own), f"{differ}equal numbers of threads")


@contextmanager
def stopping_together(among: Ranks) -> Iterator[Callable[[], int | None]]:
    """Let Ctrl-C and SIGTERM stop all ranks at the same place, whichever of them has heard it.

    Until then a signal waits, however often it comes: a terminal sends it to all, and torchrun then sends another.

    Yields:
        A function for all ranks to call where they can stop: it returns the signal that has come to any, or None.
        A process alone is stopped as it always is.
    """
    if among.size == 1:
        yield lambda: None
        return
    with deferred_interrupt(insistent=False) as signals:
        yield lambda: next((heard[0] for heard in among.gathered(list(signals)) if heard), None)
