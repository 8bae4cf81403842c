"""Tables that sort by a column and filter by a name, and are plain tables without the script."""

from collections.abc import Sequence
from dataclasses import dataclass

from sqs_pyro.reporting.page.markup import Child, Markup, element


@dataclass(frozen=True)
class Cell:
    """A cell.

    Attributes:
        shown: what it shows.
        value: the number that it is sorted by; None: its text, or it has nothing.
    """

    shown: Child
    value: float | None = None


def table(
    caption: str,
    columns: Sequence[str],
    rows: Sequence[Sequence[Child | Cell]],
    *,
    words: int = 1,
    sorts: bool = False,
    id_: str | None = None,
) -> Markup:
    """Return a table in a frame that scrolls where it is too wide.

    Args:
        caption: what it shows.
        columns: their titles, the first of them that of the rows' names.
        rows: cells of each.
        words: how many columns, the first, are of words; the others are of numbers, and flush right.
        sorts: whether a title is a button that sorts.
        id_: of the table.
    """
    head = [_title(name, index >= words, sorts) for index, name in enumerate(columns)]
    inner = element(
        "table",
        element("caption", caption),
        element("thead", element("tr", head)) if any(columns) else None,
        element("tbody", [_row(row, words) for row in rows]),
        id=id_,
        class_="sorts" if sorts else None,
    )
    return element("div", inner, class_="scroll", tabindex="0", role="region", aria_label=caption)


def pairs(caption: str, rows: Sequence[tuple[Child, ...]], columns: Sequence[str] = ("", "")) -> Markup:
    """Return a small table of names and what belongs to each, in words; rows without anything are left out."""
    shown = [row for row in rows if any(cell not in (None, "") for cell in row[1:])]
    return table(caption, columns, shown, words=len(columns))


def _title(name: str, number: bool, sorts: bool) -> Markup:
    class_ = "number" if number else None
    if not name:
        return element("td", class_=class_)
    if not sorts:
        return element("th", name, scope="col", class_=class_)
    return element("th", element("button", name, type="button"), scope="col", class_=class_, aria_sort="none")


def _row(row: Sequence[Child | Cell], words: int) -> Markup:
    cells = []
    for index, each in enumerate(row):
        cell = each if isinstance(each, Cell) else Cell(each)
        value = None if cell.value is None else f"{cell.value:.10g}"
        class_ = "number" if index >= words else None
        if index == 0:
            cells.append(element("th", cell.shown, scope="row", data_value=value))
        else:
            cells.append(element("td", cell.shown, class_=class_, data_value=value))
    return element("tr", cells)
