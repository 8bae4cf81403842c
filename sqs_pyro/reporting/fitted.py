"""Text and tables that fit a width: nothing is cut, and no number goes over two lines."""

import re
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass

from rich import box
from rich.cells import cell_len, chop_cells
from rich.console import Console, ConsoleOptions, RenderResult
from rich.table import Table
from rich.text import Text

from sqs_pyro.reporting.characters import written

_GAP = 2  # characters between two columns
_NARROW, _WIDEST_PIECE = 12, 24  # of a column that may fold: no narrower, nor than its longest piece up to this
_RULED = {False: box.SIMPLE_HEAD, True: box.Box("    \n    \n -- \n    \n    \n    \n    \n    \n", ascii=True)}


def fold(text: str, width: int) -> list[str]:
    """Break a text without lines of its own into lines: at spaces, long words behind ``/``, ``.``, ``_``…

    A number is broken only where it alone is wider than the whole width.
    """
    lines: list[str] = []
    line = ""
    for word in text.split(" "):
        joined = f"{line} {word}" if line else word
        if cell_len(joined) <= width:
            line = joined
            continue
        lines += [line] if line else []
        *whole, line = _in_pieces(word, width)
        lines += whole
    return [*lines, line]


def _in_pieces(word: str, width: int) -> list[str]:
    lines = [""]
    for piece in _pieces(word):
        # Only a piece wider than the line is cut within.
        for part in chop_cells(piece, width) if cell_len(piece) > width else [piece]:
            if cell_len(lines[-1] + part) <= width:
                lines[-1] += part
            else:
                lines.append(part)
    return lines


def _pieces(word: str) -> list[str]:
    # Not behind a point, a minus or a comma with a digit behind it: numbers stay whole.
    return re.split(r"(?<=[/_=])|(?<=[.\-,])(?!\d)", word)


@dataclass(frozen=True)
class Line:
    """A sentence, or a title."""

    text: str
    style: str = ""

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        lines = fold(written(self.text, options.encoding), options.max_width)
        yield Text("\n".join(lines), style=self.style, no_wrap=True, overflow="fold")


@dataclass(frozen=True)
class _Row:
    cells: tuple[str, ...]
    bold: bool


class FittedTable:
    """A table of names and figures that renders itself at any width.

    Titles, names and columns of words fold. Where that is not enough, columns go on below, beside the same names.

    Args:
        *columns: titles; the first column is of names, the others are of figures.
        words: those of the titles whose columns are of words.
    """

    def __init__(self, *columns: str, words: Collection[str] = ()) -> None:
        self.columns = columns
        self.foldable = tuple(not i or title in words for i, title in enumerate(columns))
        self._sections: list[list[_Row]] = [[]]

    def add_row(self, *cells: str, bold: bool = False) -> None:
        """Add a row; cells that are not given are empty."""
        filled = (*cells, *[""] * (len(self.columns) - len(cells)))
        self._sections[-1].append(_Row(filled, bold))

    def add_section(self) -> None:
        """Leave a space between the rows so far and the next ones."""
        self._sections.append([])

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        shown = _Shown(self, options)
        for i, band in enumerate(shown.bands()):
            yield from [""] if i else []
            yield shown.table(band)


class _Shown:
    """A table for one width and one encoding."""

    def __init__(self, table: FittedTable, options: ConsoleOptions) -> None:
        def text(cell: str) -> str:
            return written(cell, options.encoding)

        self.width, self.ascii = options.max_width, options.ascii_only
        self.titles = [text(title) for title in table.columns]
        self.sections = [
            [_Row(tuple(map(text, row.cells)), row.bold) for row in section] for section in table._sections
        ]
        self.foldable = table.foldable
        self.narrowest_name = _NARROW
        columns = list(zip(*[row.cells for section in self.sections for row in section], strict=True))
        # By column, for widths; a table without rows still has its titles.
        self.cells: list[Sequence[str]] = [*columns] if columns else [()] * len(self.titles)

    def bands(self) -> list[list[int]]:
        """Return columns that fit beside each other, without the names, which fold less if they are repeated."""
        bands = list(self._bands())
        if len(bands) > 1:  # repeated names may take up to a third of the line: then bands are counted anew
            self.narrowest_name = min(self._most(0), self.width // 3)
            bands = list(self._bands())
        return bands

    def _bands(self) -> Iterator[list[int]]:
        band: list[int] = []
        for column in range(1, len(self.titles)):
            if band and self._least_width([*band, column]) > self.width:
                yield band
                band = []
            band.append(column)
        yield band

    def table(self, band: list[int]) -> Table:
        shown = [0, *band]
        table = Table(
            box=_RULED[self.ascii], header_style="", padding=(0, 1, 0, 0), pad_edge=False, show_edge=False
        )
        widths = self._widths(shown)
        for column in shown:
            left = self.foldable[column]
            title = self._folded(self.titles[column], widths[column])
            table.add_column(title, justify="left" if left else "right", width=widths[column], no_wrap=True)
        for section in self.sections:
            for row in section:
                # A row that is empty in this band is left out, but not a heading, which is empty in all.
                if any(row.cells[column] for column in band) or not any(row.cells[1:]):
                    cells = (self._folded(row.cells[column], widths[column]) for column in shown)
                    table.add_row(*cells, style="bold" if row.bold else "")
            table.add_section()
        return table

    def _folded(self, cell: str, width: int) -> Text:
        indent = cell[: len(cell) - len(cell.lstrip(" "))]
        lines = fold(cell.strip(" "), max(1, width - len(indent)))
        return Text("\n".join(indent + line for line in lines), no_wrap=True, overflow="fold")

    def _widths(self, shown: list[int]) -> dict[int, int]:
        """Give what is left over to names first, then to titles, then to words."""
        widths = {column: self._least(column) for column in shown}
        left = self.width - self._least_width(shown[1:])
        for column in sorted(shown, key=lambda column: 2 if column and self.foldable[column] else bool(column)):
            more = max(0, min(left, self._most(column) - widths[column]))
            widths[column] += more
            left -= more
        return {column: min(width, self.width) for column, width in widths.items()}

    def _least_width(self, band: list[int]) -> int:
        return sum(self._least(column) for column in [0, *band]) + _GAP * len(band)

    def _least(self, column: int) -> int:
        title = max(map(cell_len, self.titles[column].split(" ")))
        if not self.foldable[column]:
            return max([title, *map(cell_len, self.cells[column])])
        words = [word for cell in self.cells[column] for word in cell.split(" ")]
        longest = max((cell_len(piece) for word in words for piece in _pieces(word)), default=0)
        narrow = self.narrowest_name if column == 0 else _NARROW
        return max(title, min(self._most(column), max(narrow, min(longest, _WIDEST_PIECE))))

    def _most(self, column: int) -> int:
        return max(map(cell_len, [self.titles[column], *self.cells[column]]))
