"""What a compression tells while it goes on, in one line."""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from sqs_pyro.compression.finetune.loop import StepRecord
from sqs_pyro.reporting.terminal import Tell, progress_display

TellStep = Callable[[StepRecord], None]


def step_teller(tell: Tell) -> Callable[[str, StepRecord], None]:
    """Return what tells of a stage's steps, the most important figure first: the last validation."""
    judged = ""

    def tell_step(stage: str, record: StepRecord) -> None:
        nonlocal judged
        if record.score is not None:  # only at the end of an epoch; the line keeps it until the next
            judged = f"validation {record.score:.2%}, "
        text = f"{judged}loss {record.loss:.3f}, non-zero {record.nonzero_rate:.1%}, {record.stage}"
        tell(stage, record.step, record.total_steps, text)

    return tell_step


@contextmanager
def told(progress: bool | TellStep | None) -> Iterator[TellStep | None]:
    """Yield what is called with the record of a step: the caller's own, a bar on stderr, or nothing.

    Args:
        progress: a function of records; whether there is a bar; None: where somebody looks at it.
    """
    shown = _is_watched() if progress is None else progress
    if callable(shown):
        yield shown
    elif shown:
        with progress_display() as tell:
            tell_step = step_teller(tell)
            yield lambda record: tell_step("compression", record)
    else:
        yield None


def _is_watched() -> bool:
    """Whether stderr is a terminal, or this is a notebook."""
    return sys.stderr.isatty() or "ipykernel" in sys.modules
