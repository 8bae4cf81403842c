"""Reports that print themselves, alike by ``print``, in a notebook, in a file and by the `sqs` command."""

import io
import os
import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, TextIO

if TYPE_CHECKING:  # rich is imported when something is printed
    from rich.console import Console, ConsoleOptions, RenderableType, RenderResult

WIDTH, NARROWEST = 80, 40  # characters of a line where nothing says so; and at least
_NOTEBOOK_WIDTH = 120
_HTML = '<pre style="white-space:pre;overflow-x:auto">{code}</pre>'


class Report:
    """Titles, tables and sentences, one below the other, that fit any width.

    As text it is as wide as the terminal, or the variable ``COLUMNS`` says, or 80 characters; characters that
    standard output cannot hold have a plain replacement.

    Args:
        *parts: of :mod:`sqs_pyro.reporting.fitted`.
    """

    def __init__(self, *parts: "RenderableType") -> None:
        self.parts = parts

    def __iter__(self) -> Iterator["RenderableType"]:
        return iter(self.parts)

    def __rich_console__(self, console: "Console", options: "ConsoleOptions") -> "RenderResult":
        for before, part in zip((None, *self.parts), self.parts, strict=False):
            yield from [""] if hasattr(before, "add_row") else []  # a line between a table and what follows
            yield part

    def text(self, width: int | None = None, encoding: str | None = None) -> str:
        """Return the report as lines of plain text.

        Args:
            width: most characters in a line; None: of the terminal.
            encoding: whose characters it may use; None: of standard output.
        """
        encoding = encoding or getattr(sys.stdout, "encoding", None) or "utf-8"
        # Through a stream of that encoding: rich asks it which characters it can write.
        page = io.BytesIO()
        file = io.TextIOWrapper(page, encoding, newline="\n", write_through=True)
        _console(file, width or line_width(sys.stdout)).print(self)
        lines = page.getvalue().decode(encoding).splitlines()
        return "\n".join(line.rstrip() for line in lines)

    def __str__(self) -> str:
        return self.text()

    __repr__ = __str__

    def _repr_html_(self) -> str:
        """For a notebook: preformatted text."""
        console = _console(io.StringIO(), _NOTEBOOK_WIDTH, record=True)
        console.print(self)
        return console.export_html(inline_styles=True, code_format=_HTML)

    def _repr_mimebundle_(self, include: Any = None, exclude: Any = None) -> dict[str, str]:
        """For IPython, in a terminal or a notebook."""
        return {"text/plain": str(self), "text/html": self._repr_html_()}


class Printed:
    """Base of what is shown as a :class:`Report`, wherever it is printed."""

    def table(self) -> Report:
        """Return what is shown."""
        raise NotImplementedError

    def __str__(self) -> str:
        return str(self.table())

    def __repr__(self) -> str:
        return str(self.table())

    def __rich__(self) -> Report:
        return self.table()

    def _repr_html_(self) -> str:
        """For a notebook."""
        return self.table()._repr_html_()

    def _repr_mimebundle_(self, include: Any = None, exclude: Any = None) -> dict[str, str]:
        """For IPython, in a terminal or a notebook."""
        return self.table()._repr_mimebundle_()


def print_report(report: Report, stream: TextIO | None = None, *, width: int = WIDTH) -> None:
    """Print to a stream, in its characters; with styles on a terminal.

    Args:
        report: what to print.
        stream: where to; None: standard output.
        width: of a line, where neither ``COLUMNS`` nor a terminal says how wide it is.
    """
    stream = stream or sys.stdout
    _console(stream, line_width(stream, width)).print(report)


def line_width(stream: TextIO, default: int = WIDTH) -> int:
    """Return the characters in a line of a stream: what ``COLUMNS`` says, or its terminal, or the default."""
    told = os.environ.get("COLUMNS", "")
    width = int(told) if told.isdecimal() and len(told) < 6 else 0  # anything may be in the environment
    if not width and stream.isatty():
        try:
            width = os.get_terminal_size(stream.fileno()).columns
        except (OSError, ValueError):  # a stream that only says that it is a terminal
            width = 0
    return max(width, NARROWEST) if width else default


def _console(file: TextIO, width: int, *, record: bool = False) -> "Console":
    from rich.console import Console

    # No markup or emoji: names of tensors have brackets and colons.
    return Console(file=file, width=width, record=record, highlight=False, markup=False, emoji=False)
