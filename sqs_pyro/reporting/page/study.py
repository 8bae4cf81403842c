"""The page of a study: variants, or a sweep, side by side."""

from collections.abc import Sequence

from sqs_pyro.reporting.page.again import command_lines, depends_on
from sqs_pyro.reporting.page.document import Section, document
from sqs_pyro.reporting.page.frontier import Spot, frontier, frontier_legend
from sqs_pyro.reporting.page.markup import Child, Markup, element
from sqs_pyro.reporting.page.plain import Document
from sqs_pyro.reporting.page.table import Cell, table
from sqs_pyro.reporting.study_tables import (
    ACCURACY,
    BRIER,
    DROP,
    ECE,
    F1,
    F1_DROP,
    NLL,
    SIZE,
    VALIDATION,
    Column,
    of_questions,
    point_name,
)

_COLUMNS = (ACCURACY, DROP, NLL, *SIZE, VALIDATION, ECE, BRIER)
_DIFFERENCES = (ACCURACY, NLL, ECE, BRIER)
_OF_QUESTIONS = (F1, F1_DROP, NLL, *SIZE)


def study_page(summary: Document) -> str:
    """Return the page of a study.

    Args:
        summary: what ``compare.json`` or ``sweep.json`` holds.
    """
    points = summary["points"]
    done = [point for point in points if point["mean"]]
    quality = F1 if of_questions(summary) else ACCURACY
    runs = sum(len(point["seeds"]) for point in points)
    different = [point for point in done if point.get("difference")]
    failed = [(point_name(point), seed, text) for point in points for seed, text in point["errors"].items()]
    command = summary.get("command")
    again = [command_lines([command]) if command else None, *depends_on(summary)]
    sections = [
        Section("curve", "Quality over size", _curves(done, quality)) if done else None,
        Section("points", "Points", _points(done, _OF_QUESTIONS if quality is F1 else _COLUMNS)),
        Section("differences", f"Differences from {summary.get('reference')}", _differences(different, quality))
        if different
        else None,
        Section("failed", "What failed", _failed(failed)) if failed else None,
        Section("again", "Make it again", again) if any(again) else None,
    ]
    subtitle = f"A study of {len(points)} points, {runs} finished runs"
    return document(str(summary["name"]), subtitle, None, sections)


def _curves(points: Sequence[Document], quality: Column) -> list[Markup]:
    panels = []
    for column, form in ((quality, ".2f"), (NLL, ".4f")):
        fp32 = [value for point in points for value in point["by_seed"].get(f"baseline_{column.figure}", [])]
        mean = column.value(sum(fp32) / len(fp32)) if fp32 else None
        panels.append(frontier(_spots(points, column), f"{column.title} on the test data", form, mean))
    names = frontier_legend(_spots(points, quality), True)
    return [names, element("div", panels, class_="panels")]


def _spots(points: Sequence[Document], column: Column) -> list[Spot]:
    return [
        Spot(
            point_name(point),
            point["mean"]["file_bytes"],
            column.value(point["mean"][column.figure]),
            str(point["variant"]),
            None if (sd := point["sd"].get(column.figure)) is None else abs(column.scale) * sd,
            bool(point["front"]["nll" if column is NLL else "accuracy"]),
        )
        for point in points
    ]


def _points(points: Sequence[Document], columns: Sequence[Column]) -> list[Markup]:
    rows: list[list[Child | Cell]] = []
    for point in points:
        cells = [Cell(column.text(point), point["mean"].get(column.figure)) for column in columns]
        rows.append([Cell(point_name(point)), Cell(str(len(point["seeds"])), len(point["seeds"])), *cells])
    titles = ["point", "seeds", *(column.title for column in columns)]
    return [table("Mean ± standard deviation over seeds", titles, rows, sorts=True)]


def _differences(points: Sequence[Document], quality: Column) -> list[Markup]:
    columns = (F1, NLL) if quality is F1 else _DIFFERENCES
    rows: list[list[Child | Cell]] = [
        [point_name(point), *(column.difference(point) for column in columns)] for point in points
    ]
    caption = "Mean ± half of the 95 % interval at the same seed (paired t); * it excludes 0, ** Holm's, too"
    return [table(caption, ["point", *(column.title for column in columns)], rows)]


def _failed(failed: Sequence[tuple[str, str, str]]) -> Markup:
    items = [element("li", element("strong", f"{name}, seed {seed}"), " ", text) for name, seed, text in failed]
    return element("ul", items, class_="findings")
