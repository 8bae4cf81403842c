"""Progress on stderr: a bar on a terminal, a line now and then elsewhere.

At any width from 60 characters on there are the bar, the percentage, the time that remains and the first figures
of the stage's text: it puts the most important one first, and those that do not fit are left out whole.
"""

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TextIO

from rich.console import Console
from rich.progress import (
    BarColumn,
    Progress,
    ProgressColumn,
    Task,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.text import Text

from sqs_pyro.reporting.characters import written
from sqs_pyro.reporting.fitted import fold
from sqs_pyro.reporting.printed import line_width

LINE_EVERY = 15.0  # seconds between two lines of one stage where there is no terminal
_WIDE = 100  # characters of a line from which there is room for a long bar and the time it has taken

Tell = Callable[[str, int, int, str], None]


@contextmanager
def progress_display(stream: TextIO | None = None) -> Iterator[Tell]:
    """Yield ``tell(stage, done, total, text)``, which shows how far a stage is on ``stream`` (stderr)."""
    stream = stream or sys.stderr
    if stream.isatty():
        with _bars(Console(file=stream, width=line_width(stream))) as bars:
            yield _on_terminal(bars)
    else:
        yield _in_lines(stream)


def _bars(console: Console) -> Progress:
    wide = console.width >= _WIDE
    bar = 28 if wide else 10
    columns = [TextColumn("{task.description:<11}"), BarColumn(bar), TextColumn("{task.percentage:>3.0f}%")]
    elapsed = [TimeElapsedColumn()] if wide else []
    # Widths of the columns above: description, bar, percentage, elapsed, remaining; rest for figures.
    left = console.width - sum((11, bar, 4, 7 * len(elapsed), 7)) - len(columns) - len(elapsed) - 1  # gaps
    return Progress(*columns, *elapsed, TimeRemainingColumn(), _Figures(left, console.encoding), console=console)


class _Figures(ProgressColumn):
    """As many of the figures of a stage's text as fit."""

    def __init__(self, width: int, encoding: str) -> None:
        super().__init__()
        self.width, self.encoding = width, encoding

    def render(self, task: Task) -> Text:
        text = written(task.fields["text"], self.encoding)
        return Text(first_figures(text, self.width), no_wrap=True)


def first_figures(text: str, width: int) -> str:
    """Return the first of the figures of a text, with commas between, that fit into ``width`` characters."""
    shown, *figures = text.split(", ")
    for figure in figures:
        longer = f"{shown}, {figure}"
        if len(longer) > width:
            break
        shown = longer
    return fold(shown, max(1, width))[0]  # the first figure alone may be too long


def _on_terminal(bars: Progress) -> Tell:
    tasks: dict[str, TaskID] = {}

    def tell(stage: str, done: int, total: int, text: str) -> None:
        if stage not in tasks:
            tasks[stage] = bars.add_task(stage, total=total, text=text)
        elif done < bars.tasks[tasks[stage]].completed:  # the same stage of another run
            bars.reset(tasks[stage])
        bars.update(tasks[stage], completed=done, total=total, text=text)

    return tell


def _in_lines(stream: TextIO) -> Tell:
    last: dict[str, float] = {}

    def tell(stage: str, done: int, total: int, text: str) -> None:
        now = time.monotonic()
        # The last one of a stage is always told: a log must not end at 97 %.
        if done < total and now - last.get(stage, -LINE_EVERY) < LINE_EVERY:
            return
        last[stage] = now
        print(f"{stage} {done}/{total} {text}".rstrip(), file=stream, flush=True)

    return tell
