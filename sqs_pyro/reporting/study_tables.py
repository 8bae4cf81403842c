"""Tables of a study: a row a point, mean±standard deviation over seeds; below, differences and what failed."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

from rich.console import RenderableType

from sqs_pyro.reporting.fitted import FittedTable, Line
from sqs_pyro.reporting.paired import FEWEST, LEVEL
from sqs_pyro.reporting.printed import Report

Document = Mapping[str, Any]


@dataclass(frozen=True)
class Column:
    """One figure of a table.

    Attributes:
        title: with its unit.
        figure: name in the summary.
        form: how a value is written.
        scale: the value is multiplied by it, 100 for percent.
        offset: and added to this.
        with_sd: whether the standard deviation over seeds is written too.
    """

    title: str
    figure: str
    form: str
    scale: float = 1.0
    offset: float = 0.0
    with_sd: bool = False

    def value(self, figure: float) -> float:
        """Return a figure in the column's unit."""
        return self.offset + self.scale * figure

    def text(self, point: Document) -> str:
        """Return the cell of a point."""
        mean, sd = point["mean"].get(self.figure), point["sd"].get(self.figure)
        if mean is None:
            return "-"
        shown = self.form.format(self.value(mean))
        if not self.with_sd or sd is None:
            return shown
        return shown + self._spread(sd)

    def difference(self, point: Document) -> str:
        """Return a point's difference from the reference; stars say that it is beyond chance."""
        found = point["difference"].get(self.figure)
        if found is None:
            return "-"
        mean = self.scale * found["mean"]
        shown = ("-" if mean < 0 else "+") + self.form.format(abs(mean))
        if found["interval"] is None:
            return shown
        low, high = found["interval"]
        stars = sum(p < 1 - LEVEL for p in (found["p"], found["p_holm"]))
        return shown + self._spread((high - low) / 2) + "*" * stars

    def _spread(self, figure: float) -> str:
        return f"±{self.form.format(abs(self.scale) * figure)}".replace("±0.", "±.")


ACCURACY = Column("accuracy, %", "accuracy", "{:.2f}", 100, with_sd=True)
DROP = Column("below fp32", "accuracy_drop", "{:.2f}", 100, with_sd=True)
F1 = Column("F1, %", "f1", "{:.2f}", 100, with_sd=True)
F1_DROP = Column("below fp32", "f1_drop", "{:.2f}", 100, with_sd=True)
NLL = Column("NLL, nats", "nll", "{:.4f}", with_sd=True)
ECE = Column("ECE, %", "ece", "{:.2f}", 100, with_sd=True)
BRIER = Column("Brier", "brier", "{:.4f}")
VALIDATION = Column("validation, %", "validation_accuracy", "{:.2f}", 100, with_sd=True)
SIZE = (
    Column("bits", "bits_per_weight", "{:.2f}"),
    Column("bytes", "file_bytes", "{:,.0f}"),
    Column("ratio", "ratio", "{:.1f}"),
    Column("zeros, %", "nonzero_rate", "{:.1f}", -100, 100),
    Column("s", "seconds", "{:.0f}"),
)
AVERAGED = (
    Column("accuracy, %", "averaged_accuracy", "{:.2f}", 100, with_sd=True),
    Column("NLL, nats", "averaged_nll", "{:.4f}", with_sd=True),
    Column("ECE, %", "averaged_ece", "{:.2f}", 100, with_sd=True),
    Column("Brier", "averaged_brier", "{:.4f}"),
)


def comparison_tables(summary: Document) -> Report:
    """Return a table of variants side by side: how good, how well calibrated, how large."""
    quality = (F1, F1_DROP, NLL) if of_questions(summary) else (ACCURACY, DROP, NLL, ECE, BRIER)
    return _tables(summary, (*quality, *SIZE))


def sweep_tables(summary: Document) -> Report:
    """Return a table of all points; a star marks those that no other beats in both size and accuracy."""
    quality = (F1, F1_DROP) if of_questions(summary) else (ACCURACY, DROP, VALIDATION)
    return _tables(summary, (*quality, NLL, *SIZE), mark_front=True)


def of_questions(summary: Document) -> bool:
    """Return whether a study's networks are judged by F1, as questions are, rather than by accuracy."""
    return any("f1" in point["mean"] for point in summary["points"])


def point_name(point: Document) -> str:
    """Return the name of a variant, and of the point of its grid if it has one."""
    return f"{point['variant']}: {point['point']}" if point["point"] else str(point["variant"])


def _tables(summary: Document, columns: Sequence[Column], *, mark_front: bool = False) -> Report:
    points = summary["points"]
    table = _table(points, columns, mark_front=mark_front)
    parts: list[RenderableType] = [Line(_heading(summary), style="bold"), table]
    if mark_front:
        parts.append(Line("* on the Pareto front of accuracy and size", style="dim"))
    if any("averaged_nll" in point["mean"] for point in points):
        parts += [Line("Average over networks drawn from the posterior", style="bold"), _table(points, AVERAGED)]
    parts += _differences(summary)
    failed = [(point, *failure) for point in points for failure in point["errors"].items()]
    parts += [Line(f"{point_name(point)}, seed {seed}: {error}", style="red") for point, seed, error in failed]
    return Report(*parts)


def _differences(summary: Document) -> list[RenderableType]:
    """Return a table of differences from the reference, where there are seeds to pair."""
    points = [point for point in summary["points"] if point.get("difference") and len(point["seeds"]) > 1]
    if not points:
        return []
    title = f"Differences from {summary['reference']} at the same seed"
    if not any(point["difference"]["nll"]["interval"] for point in points):
        return [Line(f"{title}: from {FEWEST} seeds on they can be told from chance", style="dim")]
    return [
        Line(f"{title}: mean±half of the {100 * LEVEL:.0f} % interval (paired t)", style="bold"),
        _table(
            points, (F1, NLL) if of_questions(summary) else (ACCURACY, NLL, ECE, BRIER), text=Column.difference
        ),
        Line(
            f"* the interval excludes 0; ** so it does with Holm's correction for {len(points)} comparisons", "dim"
        ),
    ]


def _table(
    points: Sequence[Document],
    columns: Sequence[Column],
    *,
    mark_front: bool = False,
    text: Callable[[Column, Document], str] = Column.text,
) -> FittedTable:
    """Return a table in which points of a grid stand below their variant's name."""
    table = FittedTable("", *(column.title for column in columns))
    for variant, of_variant in groupby(points, key=lambda point: str(point["variant"])):
        for i, point in enumerate(of_variant):
            if point["point"] and i == 0:
                table.add_row(variant)
            star = " *" if mark_front and point["front"]["accuracy"] else ""
            name = f"  {point['point']}" if point["point"] else variant
            table.add_row(name + star, *(text(column, point) for column in columns))
    return table


def _heading(summary: Document) -> str:
    counts = sorted({len(point["seeds"]) for point in summary["points"]})
    seeds = " or ".join(str(count) for count in counts)
    figure = "f1" if of_questions(summary) else "accuracy"
    fp32 = [point["mean"][f"baseline_{figure}"] for point in summary["points"] if point["mean"]]
    if not fp32:
        return f"{summary['name']}: every run failed"
    # Seeds or variants may have fp32 networks of their own.
    spread = "" if math.isclose(min(fp32), max(fp32)) else f" to {100 * max(fp32):.2f}"
    return (
        f"{summary['name']}: mean±standard deviation of {seeds} seed{'' if counts == [1] else 's'}; fp32 "
        f"{'F1' if figure == 'f1' else figure} "
        f"{100 * min(fp32):.2f}{spread} %"
    )
