"""Pictures of benchmarks: how fast products and whole networks are, method by method."""

import math
from collections.abc import Mapping
from typing import Any

from sqs_pyro.extras import needed_for
from sqs_pyro.reporting.bench_tables import machine_line, model_groups
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
    from matplotlib.patches import Patch
    from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

Document = Mapping[str, Any]

_PEERS = {"float32": BLACK, "bfloat16": GREY, "int4": ORANGE, "NF4": PURPLE}
_PACKED = (BLUE, GREEN, VERMILION, SKY)  # of numbers of bits, in their order of appearance
_IN_A_ROW = 3  # panels


def kernels_figure(document: Document) -> Figure:
    """Draw how many times as fast as a dense product methods are over M, a panel a shape; dashed: packed, float32.

    The dense product is that in float32, where it was measured (GPUs are not), else in bfloat16.

    Args:
        document: of :func:`sqs_pyro.bench.kernels.bench_kernels`.
    """
    shapes = list(dict.fromkeys((row["outputs"], row["inputs"]) for row in document["rows"]))
    methods = list(dict.fromkeys(row["method"] for row in document["rows"]))
    base = next(name for name in ("float32", "bfloat16") if name in methods)
    figure, panels = _panels(len(shapes), 3.4, 3.4, machine_line(document["machine"]), sharey=True)
    for axes, shape in zip(panels, shapes, strict=False):
        rows = [row for row in document["rows"] if (row["outputs"], row["inputs"]) == shape]
        counts = sorted({row["rows"] for row in rows})
        times = {(row["method"], row["rows"]): row["microseconds"] for row in rows}
        axes.set_xscale("log", base=2)
        axes.set_yscale("log", base=2)
        for method in methods:
            if (method, counts[0]) not in times:
                continue  # a peer that does not take this shape
            speeds = [times[base, count] / times[method, count] for count in counts]
            dashed = method.startswith("packed") and method.endswith("float32")
            axes.plot(
                counts,
                speeds,
                "o--" if dashed else "o-",
                color=_colour(method, methods),
                markersize=3,
                linewidth=1.0 if dashed else 1.5,
                label=method.replace("packed, ", "packed "),
            )
        axes.grid(axis="y", color=LIGHT, linewidth=0.5)
        tidy(axes)
        axes.margins(x=0.06)
        axes.xaxis.set_ticks(counts)
        axes.xaxis.set_minor_locator(NullLocator())
        axes.yaxis.set_major_locator(LogLocator(base=2))
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axes.set_title(f"{shape[0]} × {shape[1]}", loc="left", fontsize=9, fontweight="bold", color=INK)
        axes.set_xlabel("M, rows of x", fontsize=8, color=INK)
    panels[0].set_ylabel(f"times as fast as {base}", fontsize=8, color=INK)
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper left", ncols=5, frameon=False, fontsize=8)
    return figure


def model_figure(document: Document) -> Figure:
    """Draw milliseconds a call, a panel a network, input and batch: bars medians, lines quartiles, warm pale.

    Behind each bar stands its time, and how many times as fast as float32 that is.

    Args:
        document: of :func:`sqs_pyro.bench.model.bench_model`.
    """
    groups = model_groups(document)
    most = max(len({row["method"] for row in rows}) for rows in groups.values())
    figure, panels = _panels(len(groups), 4.6, 0.42 * most + 0.9, machine_line(document["machine"]))
    for axes, (title, rows) in zip(panels, groups.items(), strict=False):
        methods = list(dict.fromkeys(row["method"] for row in rows))
        for row in rows:
            place = methods.index(row["method"]) + (-0.2 if row["cold"] else 0.2)
            _bar(axes, place, row, _colour(row["method"], methods))
        tidy(axes)
        axes.set_ylim(len(methods) - 0.4, -0.6)  # the first method on top
        axes.set_xlim(0, 1.35e-3 * max(row["upper_quartile"] for row in rows))
        axes.set_xlabel("milliseconds a call", fontsize=8, color=INK)
        axes.set_yticks(range(len(methods)), methods, fontsize=8)
        axes.tick_params(axis="y", length=0)
        shown = title if len(title) <= 56 else "…" + title[-55:]
        axes.set_title(shown, loc="left", fontsize=9, fontweight="bold", color=INK)
    handles = [Patch(facecolor=INK, label="weights cold"), Patch(facecolor=INK, alpha=0.35, label="warm")]
    figure.legend(handles=handles, loc="outside upper left", ncols=2, frameon=False, fontsize=8)
    return figure


def _bar(axes: Axes, place: float, row: Document, colour: str) -> None:
    middle, low, high = (row[key] / 1e3 for key in ("microseconds", "lower_quartile", "upper_quartile"))
    axes.barh(place, middle, height=0.38, color=colour, alpha=1.0 if row["cold"] else 0.35)
    axes.plot([low, high], [place, place], color=VERMILION, linewidth=0.9)
    axes.annotate(
        f"{middle:.3g} ({row['times_as_fast']:.2g}×)",
        (max(middle, high), place),
        xytext=(3, 0),
        textcoords="offset points",
        va="center",
        fontsize=7,
        color=INK,
    )


def _panels(
    count: int, width: float, height: float, made_on: str, *, sharey: bool = False
) -> tuple[Figure, list[Axes]]:
    """Return a figure with panels of a size in inches, in rows, and below them what it was measured on."""
    columns = count if count <= _IN_A_ROW else min(_IN_A_ROW, math.ceil(math.sqrt(count)))
    lines = math.ceil(count / columns)
    figure = new_figure(width * columns, height * lines + 0.6)
    figure.supxlabel(made_on, x=0.01, ha="left", fontsize=7, color=GREY)
    panels = list(figure.subplots(lines, columns, squeeze=False, sharey=sharey).flat)
    for axes in panels[count:]:  # places of the last row that stay empty
        axes.remove()
    return figure, panels[:count]


def _colour(method: str, methods: list[str]) -> str:
    """Return a method's colour: peers have their own, numbers of bits of packed weights one each."""
    name = method.replace(",", " ").split()[0]
    if name in _PEERS:
        return _PEERS[name]
    kinds = list(dict.fromkeys(_bits(each) for each in methods if each.startswith("packed")))
    return _PACKED[kinds.index(_bits(method)) % len(_PACKED)]


def _bits(method: str) -> str:
    return method.rpartition(", ")[0]
