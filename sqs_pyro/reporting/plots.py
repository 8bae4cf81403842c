"""Pictures of a compressed network: its layers, its bits, and how training went."""

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Protocol

import numpy as np

from sqs_pyro.extras import needed_for
from sqs_pyro.reporting.layers import Floats, LayerPicture
from sqs_pyro.reporting.style import BLUE, GREEN, GREY, INK, LIGHT, ORANGE, VERMILION, write_figure
from sqs_pyro.reporting.style import new_figure as _figure
from sqs_pyro.reporting.style import tidy as _tidy

with needed_for("Pictures"):
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch
    from matplotlib.ticker import MaxNLocator

LAYERS_A_PAGE = 20
_BINS = 72
_erf = np.vectorize(math.erf, otypes=[float])


class Step(Protocol):
    """One record of a training history, as far as the curves need it."""

    @property
    def step(self) -> int: ...  # noqa: D102
    @property
    def stage(self) -> str: ...  # noqa: D102
    @property
    def loss(self) -> float: ...  # noqa: D102
    @property
    def nll(self) -> float: ...  # noqa: D102
    @property
    def kl(self) -> float: ...  # noqa: D102
    @property
    def nonzero_rate(self) -> float: ...  # noqa: D102
    @property
    def temperature(self) -> float: ...  # noqa: D102
    @property
    def score(self) -> float | None: ...  # noqa: D102


def write_pictures(
    directory: Path, layers: Sequence[LayerPicture], history: Sequence[Step], judged_by: str = "accuracy"
) -> list[Path]:
    """Draw every picture of a run into ``directory`` as PNG files, and return their paths.

    ``judged_by`` is the name of what the history has as ``score``.

    Networks of more than :data:`LAYERS_A_PAGE` layers get several pages ``layers-1.png``, ``layers-2.png``...
    """
    pages = layer_figures(layers)
    names = ["layers"] if len(pages) == 1 else [f"layers-{number + 1}" for number in range(len(pages))]
    figures = dict(zip(names, pages, strict=True)) | {"bits": bits_figure(layers)}
    if history:
        figures["curves"] = curves_figure(history, judged_by)
    paths = []
    for name, figure in figures.items():
        paths.append(directory / f"{name}.png")
        write_figure(figure, paths[-1])
    return paths


def layer_figures(layers: Sequence[LayerPicture]) -> list[Figure]:
    """Histograms of the weights of every layer, with components, zeros and windows drawn in.

    Counts are on a logarithmic axis. A component's curve is the number of surviving weights that it expects
    in a bin centred there, ``nonzeros · πₖ · P(bin; μₖ, σₖ)``, so curves and bars are in the same unit.
    """
    pages = [layers[start : start + LAYERS_A_PAGE] for start in range(0, len(layers), LAYERS_A_PAGE)]
    return [_layer_page(page) for page in pages]


def _layer_page(layers: Sequence[LayerPicture]) -> Figure:
    columns = min(4, max(1, math.ceil(math.sqrt(len(layers)))))
    rows = math.ceil(len(layers) / columns)
    figure = _figure(3.6 * columns, 2.45 * rows + 0.5)
    panels = figure.subplots(rows, columns, squeeze=False)
    for axes, layer in zip(panels.flat, layers, strict=False):
        _draw_layer(axes, layer)
    for axes in panels.flat[len(layers) :]:
        axes.axis("off")
    for row in panels:
        row[0].set_ylabel("weights a bin", fontsize=8, color=INK)
    has_windows = any(layer.window_edges.size for layer in layers)
    handles = _layer_legend(has_windows, any(layer.bulk is not None for layer in layers))
    figure.legend(handles=handles, loc="outside upper left", ncols=5, frameon=False, fontsize=8)
    return figure


def _layer_legend(has_windows: bool, has_outliers: bool) -> list[Patch | Line2D]:
    handles: list[Patch | Line2D] = [
        Patch(facecolor=LIGHT, label="pruned to zero"),
        Patch(facecolor=BLUE, alpha=0.55, label="kept"),
        Line2D([], [], color=ORANGE, label="components"),
        Line2D([], [], color=VERMILION, marker="^", linestyle="none", markersize=4, label="codebook values"),
    ]
    if has_windows:
        handles.append(Line2D([], [], color=GREY, linestyle=":", label="window edges"))
    if has_outliers:
        handles.append(Patch(facecolor=VERMILION, alpha=0.08, label="windows of outliers"))
    return handles


def _draw_layer(axes: Axes, layer: LayerPicture) -> None:
    edges = _bin_edges(layer)
    pruned = np.histogram(layer.weights[~layer.nonzero], bins=edges)[0]
    kept = np.histogram(layer.weights[layer.nonzero], bins=edges)[0]
    axes.stairs(pruned, edges, fill=True, color=LIGHT)
    axes.stairs(kept, edges, fill=True, color=BLUE, alpha=0.55)
    if layer.bulk is not None:
        for start, end in ((edges[0], layer.bulk[0]), (layer.bulk[1], edges[-1])):
            if start < end:
                axes.axvspan(start, end, color=VERMILION, alpha=0.08, linewidth=0)
    for edge in layer.window_edges[(layer.window_edges > edges[0]) & (layer.window_edges < edges[-1])]:
        axes.axvline(edge, color=GREY, linestyle=":", linewidth=0.7)
    grid = np.linspace(edges[0], edges[-1], 600)
    for loc, scale, mixing in zip(layer.loc, layer.scale, layer.mixing, strict=True):
        expected = layer.num_nonzeros * mixing * _bin_mass(grid, edges[1] - edges[0], loc, scale)
        axes.plot(grid, expected, color=ORANGE, linewidth=1.0 if layer.loc.size <= 8 else 0.6)
    axes.set_yscale("log")
    axes.set_xlim(edges[0], edges[-1])
    # From below one weight, so that a bin with a single outlier has a bar on the logarithmic axis.
    axes.set_ylim(0.45, 2.0 * max(pruned.max(initial=1), kept.max(initial=1)))
    _draw_codebook(axes, layer)
    _tidy(axes)
    axes.xaxis.set_major_locator(MaxNLocator(5))
    axes.set_title(_short(layer.name, 30), loc="left", fontsize=8.5, fontweight="bold", color=INK, pad=14)
    axes.text(
        0.0,
        1.025,
        f"{layer.num_weights:,} weights   {1 - layer.nonzero_rate:.1%} zeros   {layer.bits:.2f} bits each",
        transform=axes.transAxes,
        fontsize=7.5,
        color=INK,
    )


def _draw_codebook(axes: Axes, layer: LayerPicture) -> None:
    values = np.unique(layer.values[layer.nonzero])
    size = 4 if values.size <= 32 else 2  # a codebook a channel has hundreds of values
    foot = axes.get_xaxis_transform()  # x in data, y in shares of the axis: on the ground at any scale
    axes.plot(values, np.full(values.size, 0.03), "^", transform=foot, color=VERMILION, markersize=size)


def _bin_edges(layer: LayerPicture) -> Floats:
    # Zero is always in the picture: pruned weights are drawn where they were, and it is where they go.
    everything = np.concatenate([layer.weights, layer.values, np.zeros(1)])
    low, high = float(everything.min()), float(everything.max())
    margin = 0.03 * (high - low) or 1e-3  # a constant layer still gets a picture
    return np.linspace(low - margin, high + margin, _BINS + 1)


def _bin_mass(x: Floats, width: float, loc: float, scale: float) -> Floats:
    """Return what N(loc, scale²) gives to a bin of this width centred at x; finite for any scale > 0."""
    spread = max(float(scale), 1e-12) * math.sqrt(2)
    return 0.5 * (_erf((x + width / 2 - loc) / spread) - _erf((x - width / 2 - loc) / spread))


def bits_figure(layers: Sequence[LayerPicture]) -> Figure:
    """Bars of the non-zero rate and of the stored bits a weight, a row a layer; dashed: all layers."""
    figure = _figure(8.4, 0.24 * len(layers) + 1.1)
    left, right = figure.subplots(1, 2, sharey=True)
    weights = np.array([layer.num_weights for layer in layers], dtype=float)
    rates = np.array([layer.nonzero_rate for layer in layers])
    bits = np.array([layer.bits for layer in layers])
    _bars(left, 100 * rates, weights, BLUE, "non-zero weights, %", "{:.1f}")
    _bars(right, bits, weights, GREEN, "stored bits a weight", "{:.2f}")
    left.set_yticks(range(len(layers)), [_short(layer.name, 38) for layer in layers], fontsize=8)
    left.invert_yaxis()
    return figure


def _bars(axes: Axes, values: Floats, weights: Floats, colour: str, title: str, form: str) -> None:
    rows = np.arange(values.size)
    axes.barh(rows, values, color=colour, height=0.66, alpha=0.8)
    for row, value in zip(rows, values, strict=True):
        axes.annotate(
            form.format(value),
            (value, row),
            xytext=(3, 0),
            textcoords="offset points",
            va="center",
            fontsize=7.5,
            color=INK,
            bbox={"facecolor": "white", "edgecolor": "none", "pad": 0.6},
        )
    # Of all weights, not of layers: a bias-sized layer must not count as much as the largest.
    mean = float(np.average(values, weights=weights)) if values.size else 0.0
    axes.axvline(mean, color=INK, linestyle="--", linewidth=0.8, zorder=0.5)
    axes.set_title(f"{title} (dashed, all layers: {form.format(mean)})", loc="left", fontsize=9, color=INK)
    axes.set_xlim(0, 1.14 * max(float(values.max(initial=0.0)), 1e-9))
    _tidy(axes)
    axes.tick_params(axis="y", length=0)
    axes.spines["left"].set_visible(False)


def curves_figure(history: Sequence[Step], judged_by: str = "accuracy") -> Figure:
    """Loss, ELBO parts, non-zero rate, temperature and validation score over steps; dashed: stages."""
    figure = _figure(9.6, 7.2)
    panels = figure.subplots(3, 2, sharex=True)
    steps = np.array([record.step for record in history], dtype=float)
    curves: list[tuple[str, str, Callable[[Step], float | None]]] = [
        ("loss", VERMILION, lambda record: record.loss),
        (f"validation {judged_by}, %", GREEN, lambda record: _percent(record.score)),
        ("ELBO part: negative log likelihood", BLUE, lambda record: record.nll),
        ("ELBO part: KL to the prior", BLUE, lambda record: record.kl),
        ("non-zero weights, %", ORANGE, lambda record: _percent(record.nonzero_rate)),
        ("temperature τ", GREY, lambda record: record.temperature),
    ]
    for axes, (title, colour, value) in zip(panels.flat, curves, strict=True):
        values = np.array([_number(value(record)) for record in history])
        _curve(axes, steps, values, colour)
        _tidy(axes)
        if title.endswith("%"):
            # Percentages end at 100, with room for the line.
            axes.set_ylim(top=min(axes.get_ylim()[1], 101))
        axes.set_title(title, loc="left", fontsize=9, color=INK, pad=16 if axes in panels[0] else 6)
        for boundary in _stage_starts(history)[1:]:
            axes.axvline(boundary[0], color=GREY, linestyle="--", linewidth=0.8)
    for axes in panels[0]:
        _name_stages(axes, history)
    for axes in panels[-1]:
        axes.set_xlabel("step", fontsize=8, color=INK)
    return figure


def _curve(axes: Axes, steps: Floats, values: Floats, colour: str) -> None:
    known = np.isfinite(values)  # validation is measured at some steps only
    steps, values = steps[known], values[known]
    if not values.size:
        axes.text(0.5, 0.5, "not recorded", transform=axes.transAxes, ha="center", color=GREY, fontsize=8)
        return
    window = len(values) // 60
    # A curve that goes up and down more than four times its range is drawn pale, under its mean.
    noisy = window > 1 and np.abs(np.diff(values)).sum() > 4 * np.ptp(values)
    axes.plot(steps, values, color=colour, alpha=0.25 if noisy else 1.0, linewidth=1.2)
    if noisy:
        values = _running_mean(values, window)
        axes.plot(steps, values, color=colour, linewidth=1.6)
    if len(values) <= 40:
        axes.plot(steps, values, "o", color=colour, markersize=3.5)
    axes.annotate(
        f"{values[-1]:.4g}",
        (steps[-1], values[-1]),
        xytext=(5, 0),
        textcoords="offset points",
        fontsize=8,
        va="center",
        color=colour,
        annotation_clip=False,
    )


def _running_mean(values: Floats, window: int) -> Floats:
    """Return the mean of the last ``window`` values (fewer at the start); same length as ``values``."""
    total = np.cumsum(np.concatenate([np.zeros(1), values]))
    ends = np.arange(1, len(values) + 1)
    starts = np.maximum(ends - window, 0)
    return (total[ends] - total[starts]) / (ends - starts)


def _stage_starts(history: Sequence[Step]) -> list[tuple[int, str]]:
    starts: list[tuple[int, str]] = []
    for record in history:
        if not starts or starts[-1][1] != record.stage:
            starts.append((record.step, record.stage))
    return starts


def _name_stages(axes: Axes, history: Sequence[Step]) -> None:
    starts = _stage_starts(history)
    ends = [start for start, _ in starts[1:]] + [history[-1].step]
    for (start, name), end in zip(starts, ends, strict=True):
        place = axes.get_xaxis_transform()
        axes.text(
            (start + end) / 2, 1.0, name, transform=place, ha="center", va="bottom", fontsize=7.5, color=GREY
        )


def _number(value: float | None) -> float:
    return math.nan if value is None else float(value)


def _percent(value: float | None) -> float | None:
    return None if value is None else 100 * value


def _short(name: str, limit: int) -> str:
    """Cut a dotted name at its front: its end is what tells layers apart."""
    return name if len(name) <= limit else "…" + name[-limit + 1 :]
