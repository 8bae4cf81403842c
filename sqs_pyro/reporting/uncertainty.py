"""Pictures of uncertainty: reliability, risk over coverage, predictive bands. Plain numbers in."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from sqs_pyro.extras import needed_for
from sqs_pyro.reporting.layers import Floats
from sqs_pyro.reporting.style import (
    BLUE,
    GREEN,
    GREY,
    INK,
    ORANGE,
    PURPLE,
    SKY,
    VERMILION,
    new_figure,
    tidy,
    write_figure,
)

with needed_for("Pictures"):
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_COLOURS = (BLUE, VERMILION, GREEN, ORANGE, PURPLE, SKY)


@dataclass(frozen=True)
class Curves:
    """What is drawn of one predictor.

    Attributes:
        confidence, accuracy, counts: of bins of the top class's probability.
        coverage, risk: share of the surest examples, and share of errors among them.
    """

    confidence: Sequence[float]
    accuracy: Sequence[float]
    counts: Sequence[int]
    coverage: Sequence[float]
    risk: Sequence[float]


def write_uncertainty_pictures(directory: Path, curves: Mapping[str, Curves]) -> None:
    """Draw ``reliability.png`` and ``risk_coverage.png`` into a directory."""
    write_figure(reliability_figure(curves), directory / "reliability.png")
    write_figure(risk_coverage_figure(curves), directory / "risk_coverage.png")


def reliability_figure(curves: Mapping[str, Curves]) -> Figure:
    """Accuracy over confidence, a panel a predictor: on the diagonal it is right as often as it says.

    Bars below are the examples of each bin, in shares; points of bins without any are left out.
    """
    figure = new_figure(3.1 * len(curves), 3.9)
    panels = figure.subplots(2, len(curves), squeeze=False, sharex=True, sharey="row", height_ratios=(4, 1))
    for number, (name, own) in enumerate(curves.items()):
        top, bottom = panels[:, number]
        colour = _COLOURS[number % len(_COLOURS)]
        counts = np.asarray(own.counts, dtype=float)
        some = counts > 0
        top.plot([0, 1], [0, 1], color=GREY, linestyle="--", linewidth=0.8)
        top.plot(
            np.asarray(own.confidence)[some],
            np.asarray(own.accuracy)[some],
            color=colour,
            marker="o",
            markersize=3.5,
        )
        edges = np.linspace(0, 1, counts.size + 1)
        bottom.stairs(counts / max(counts.sum(), 1), edges, fill=True, color=colour, alpha=0.55)
        for axes in (top, bottom):
            tidy(axes)
        top.set_title(name, loc="left", fontsize=9, color=INK)
        bottom.set_xlabel("confidence", fontsize=8, color=INK)
    panels[0, 0].set_ylabel("accuracy", fontsize=8, color=INK)
    panels[1, 0].set_ylabel("share", fontsize=8, color=INK)
    return figure


def risk_coverage_figure(curves: Mapping[str, Curves]) -> Figure:
    """Share of errors among the examples that a predictor is surest of, over their share."""
    figure = new_figure(5.4, 3.6)
    axes = figure.subplots()
    for number, (name, own) in enumerate(curves.items()):
        axes.plot(own.coverage, 100 * np.asarray(own.risk), color=_COLOURS[number % len(_COLOURS)], label=name)
    tidy(axes)
    axes.set_ylim(bottom=0)
    axes.set_xlabel("coverage: share of examples answered, surest first", fontsize=8, color=INK)
    axes.set_ylabel("errors among them, %", fontsize=8, color=INK)
    axes.legend(frameon=False, fontsize=8)
    return figure


def bands_figure(
    x: Floats,
    mean: Floats,
    bands: Mapping[float, tuple[Floats, Floats]],
    observed: tuple[Floats, Floats] | None = None,
    truth: Floats | None = None,
) -> Figure:
    """Predictive mean and central intervals of a regression over its one input.

    Args:
        x: inputs, ``[n]``, in any order.
        mean: predictive means, ``[n]``.
        bands: by level the lower and upper ends, ``[n]`` each.
        observed: inputs and values of the training data, drawn as points.
        truth: the function that is looked for, ``[n]``, if it is known.
    """
    figure = new_figure(6.4, 3.6)
    axes = figure.subplots()
    _draw_bands(axes, np.asarray(x), bands)
    order = np.argsort(x)
    axes.plot(np.asarray(x)[order], np.asarray(mean)[order], color=BLUE, label="predictive mean")
    if truth is not None:
        place, values = np.asarray(x)[order], np.asarray(truth)[order]
        axes.plot(place, values, color=INK, linestyle="--", linewidth=0.9, label="truth")
    if observed is not None:
        axes.plot(*observed, ".", color=VERMILION, markersize=3.5, label="data")
    tidy(axes)
    axes.set_xlabel("x", fontsize=8, color=INK)
    axes.set_ylabel("y", fontsize=8, color=INK)
    axes.legend(frameon=False, fontsize=8)
    return figure


def _draw_bands(axes: Axes, x: Floats, bands: Mapping[float, tuple[Floats, Floats]]) -> None:
    order = np.argsort(x)
    for number, level in enumerate(sorted(bands, reverse=True)):  # the widest first, others upon it
        lower, upper = (np.asarray(end)[order] for end in bands[level])
        alpha = 0.18 + 0.14 * number
        axes.fill_between(
            x[order], lower, upper, color=SKY, alpha=min(alpha, 0.7), linewidth=0, label=f"{100 * level:g} %"
        )
