"""Progress on stderr: a bar on a terminal, a line now and then elsewhere."""

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TextIO

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn, TimeRemainingColumn

LINE_EVERY = 15.0  # seconds between two lines of one stage where there is no terminal

Tell = Callable[[str, int, int, str], None]


@contextmanager
def progress_display(stream: TextIO | None = None) -> Iterator[Tell]:
    """Yield ``tell(stage, done, total, text)``, which shows how far a stage is on ``stream`` (stderr)."""
    stream = stream or sys.stderr
    if stream.isatty():
        with _bars(Console(file=stream)) as bars:
            yield _on_terminal(bars)
    else:
        yield _in_lines(stream)


def _bars(console: Console) -> Progress:
    return Progress(
        TextColumn("{task.description:<12}"),
        BarColumn(bar_width=28),
        TextColumn("{task.percentage:>3.0f}%"),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[text]}"),
        console=console,
    )


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
        if done < total and now - last.get(stage, -LINE_EVERY) < LINE_EVERY:
            return
        last[stage] = now
        print(f"{stage} {done}/{total} {text}".rstrip(), file=stream, flush=True)

    return tell
