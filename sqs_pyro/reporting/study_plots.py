"""Pictures of a study: variants side by side, and curves of quality over size."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from sqs_pyro.extras import needed_for
from sqs_pyro.reporting.study_tables import ACCURACY, ECE, F1, NLL, Column, of_questions, point_name
from sqs_pyro.reporting.style import (
    BLACK,
    BLUE,
    GREEN,
    GREY,
    INK,
    LIGHT,
    ORANGE,
    PURPLE,
    SKY,
    VERMILION,
    new_figure,
    tidy,
)

with needed_for("Pictures"):
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter

Document = Mapping[str, Any]

_COLOURS = (BLUE, VERMILION, GREEN, PURPLE, ORANGE, SKY, BLACK, GREY)
_MARKERS = "osD^vPX<"
_SIZES = (
    Column("bits a weight", "bits_per_weight", "{:.2f}"),
    Column("zeros, %", "nonzero_rate", "{:.1f}", -100, 100),
)


def comparison_figure(summary: Document) -> Figure:
    """Draw a row for each point, a panel for each figure: dots are seeds, lines mean ± standard deviation.

    Points of which every run failed have a row without dots. The dashed line is the mean of the fp32 networks.
    """
    points = summary["points"]
    columns = ((F1, NLL) if of_questions(summary) else (ACCURACY, NLL, ECE)) + _SIZES
    figure = new_figure(2.3 + 2.1 * len(columns), 0.32 * len(points) + 1.0)
    panels = figure.subplots(1, len(columns), sharey=True)
    for axes, column in zip(panels, columns, strict=True):
        for row, point in enumerate(points):
            _draw_row(axes, row, point, column)
        _fp32_line(axes, points, column, vertical=True)
        axes.set_title(column.title, loc="left", fontsize=9, color=INK)
        axes.set_ylim(len(points) - 0.4, -0.6)
        axes.grid(axis="y", color=LIGHT, linewidth=0.5)
        tidy(axes)
        axes.margins(x=0.08)
        axes.xaxis.set_major_locator(MaxNLocator(4))
        axes.tick_params(axis="y", length=0)
        axes.spines["left"].set_visible(False)
    panels[0].set_yticks(range(len(points)), [point_name(point) for point in points], fontsize=8)
    figure.suptitle(str(summary["name"]), x=0.01, ha="left", fontsize=10, fontweight="bold", color=INK)
    return figure


def _draw_row(axes: Axes, row: int, point: Document, column: Column) -> None:
    seeds = [column.value(value) for value in point["by_seed"].get(column.figure, [])]
    if not seeds:
        return
    mean, sd = column.value(point["mean"][column.figure]), _spread(point, column)
    axes.plot(seeds, [row] * len(seeds), "o", color=BLUE, alpha=0.35, markersize=4, markeredgewidth=0)
    axes.errorbar(mean, row, xerr=sd, fmt="|", color=INK, markersize=9, elinewidth=1.2, capsize=0)


def sweep_figure(summary: Document) -> Figure:
    """Draw accuracy and NLL over the bytes of the file, a curve a variant; rings mark the Pareto front.

    Error bars are standard deviations over seeds, the dashed line is the fp32 networks' mean. If all networks have
    the same size, the upper axis is its ratio to the file's.
    """
    points = summary["points"]
    figure = new_figure(10.4, 4.6)
    panels = figure.subplots(1, 2)
    quality = F1 if of_questions(summary) else ACCURACY
    for axes, column in zip(panels, (quality, NLL), strict=True):
        for i, variant in enumerate(dict.fromkeys(point["variant"] for point in points)):
            curve = [point for point in points if point["variant"] == variant and point["mean"]]
            _draw_curve(axes, curve, column, i, variant)
        _draw_front(axes, points, column)
        axes.set_xscale("log")
        _fp32_line(axes, points, column, vertical=False)
        tidy(axes)
        axes.margins(x=0.05)
        axes.set_title(f"{column.title} on the test set", loc="left", fontsize=9, color=INK)
        _size_axes(axes, points)
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(
        handles, labels, loc="outside lower center", ncols=min(6, len(labels)), frameon=False, fontsize=8
    )
    figure.suptitle(str(summary["name"]), x=0.01, ha="left", fontsize=10, fontweight="bold", color=INK)
    return figure


def _draw_curve(axes: Axes, curve: Sequence[Document], column: Column, index: int, label: str) -> None:
    curve = sorted(curve, key=lambda point: point["mean"]["file_bytes"])
    axes.errorbar(
        [point["mean"]["file_bytes"] for point in curve],
        [column.value(point["mean"][column.figure]) for point in curve],
        xerr=[point["sd"]["file_bytes"] or 0.0 for point in curve],
        yerr=[_spread(point, column) for point in curve],
        label=label,
        color=_COLOURS[index % len(_COLOURS)],
        # Moved on by one after each round of colours: no pair of both comes back soon.
        marker=_MARKERS[(index + index // len(_COLOURS)) % len(_MARKERS)],
        markersize=4,
        linewidth=1.2,
        elinewidth=0.8,
    )


def _draw_front(axes: Axes, points: Sequence[Document], column: Column) -> None:
    front = [point for point in points if point["front"]["nll" if column is NLL else "accuracy"]]
    axes.plot(
        [point["mean"]["file_bytes"] for point in front],
        [column.value(point["mean"][column.figure]) for point in front],
        "o",
        markersize=10,
        markerfacecolor="none",
        markeredgecolor=INK,
        markeredgewidth=0.8,
        label="Pareto front",
    )


def _fp32_line(axes: Axes, points: Sequence[Document], column: Column, *, vertical: bool) -> None:
    key = f"baseline_{column.figure}"
    values = [column.value(value) for point in points for value in point["by_seed"].get(key, [])]
    if values:
        line = axes.axvline if vertical else axes.axhline
        line(sum(values) / len(values), color=GREY, linestyle="--", linewidth=0.8, zorder=0.5, label="fp32")


def _size_axes(axes: Axes, points: Sequence[Document]) -> None:
    axes.set_xlabel("bytes of the file", fontsize=8, color=INK)
    axes.xaxis.set_major_locator(LogLocator(base=10, subs=(1, 1.5, 2, 3, 5, 7)))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
    axes.xaxis.set_minor_formatter(NullFormatter())
    fp32 = {point["mean"]["fp32_bytes"] for point in points if point["mean"]}
    if len(fp32) != 1:
        return  # one ratio for each point of the axis there is only then
    (whole,) = fp32
    other = lambda sizes: whole / np.maximum(sizes, 1e-9)  # noqa: E731 - matplotlib asks for 0, too
    upper = axes.secondary_xaxis("top", functions=(other, other))
    upper.xaxis.set_major_locator(LogLocator(base=10, subs=(1, 1.5, 2, 3, 5, 7)))
    upper.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}×"))
    upper.xaxis.set_minor_formatter(NullFormatter())
    upper.tick_params(labelsize=7.5, colors=INK, length=2.5)
    upper.spines["top"].set_visible(False)


def _spread(point: Document, column: Column) -> float:
    sd = point["sd"].get(column.figure)
    return 0.0 if sd is None else abs(column.scale) * sd
