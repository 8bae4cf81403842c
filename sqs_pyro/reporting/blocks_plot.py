"""Picture of a blockwise compression: bits and error of every block and of the layers in it."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from sqs_pyro.extras import needed_for
from sqs_pyro.reporting.style import (
    BLACK,
    BLUE,
    GREEN,
    INK,
    ORANGE,
    PURPLE,
    SKY,
    VERMILION,
    YELLOW,
    new_figure,
    tidy,
    write_figure,
)

with needed_for("Pictures"):
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

Record = Mapping[str, Any]
_COLOURS = (BLUE, ORANGE, GREEN, PURPLE, SKY, VERMILION, YELLOW)


def write_blocks_picture(path: Path, records: Sequence[Record]) -> None:
    """Draw the blocks as a PNG file, see :func:`blocks_figure`."""
    write_figure(blocks_figure(records), path)


def blocks_figure(records: Sequence[Record]) -> Figure:
    """Draw bits a weight and relative squared errors over the blocks: black the blocks, in colour layers.

    Args:
        records: of each block, ``block``, ``bits``, ``error`` and ``layers`` (by name: ``bits``, ``error``), as in
            ``metrics.json``.
    """
    figure = new_figure(9.6, 3.6)
    left, right = figure.subplots(1, 2)
    titles = {"bits": "bits a weight", "error": "squared error of the outputs, relative"}
    for axes, (key, title) in zip((left, right), titles.items(), strict=True):
        _draw(axes, records, key)
        axes.set_title(title, loc="left", fontsize=9, color=INK)
        axes.set_xlabel("block", fontsize=8, color=INK)
    # An error of zero, as of a layer without any, has no place on a logarithmic axis.
    if all(value > 0 for record in records for value in _values(record, "error")):
        right.set_yscale("log")
    for axes in (left, right):
        tidy(axes)
        axes.set_xlim(-0.5, len(records) - 0.5)
        axes.xaxis.set_major_locator(MaxNLocator(10, integer=True, min_n_ticks=1))
    handles, labels = left.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper left", ncols=8, frameon=False, fontsize=8)
    return figure


def _draw(axes: Axes, records: Sequence[Record], key: str) -> None:
    blocks = np.array([record["block"] for record in records])
    names = list(dict.fromkeys(name for record in records for name in record["layers"]))
    short = [name.rpartition(".")[2] for name in names]
    short = short if len(set(short)) == len(names) else names  # `dense` may be there twice
    for index, name in enumerate(names):
        values = [record["layers"].get(name, {}).get(key, np.nan) for record in records]
        colour = _COLOURS[index % len(_COLOURS)]
        axes.plot(blocks, values, "o-", color=colour, markersize=2.5, linewidth=0.9, alpha=0.8, label=short[index])
    whole = [np.nan if record[key] is None else record[key] for record in records]
    axes.plot(blocks, whole, "o-", color=BLACK, markersize=3.5, linewidth=1.6, label="block")


def _values(record: Record, key: str) -> list[float]:
    return [record[key], *(layer[key] for layer in record["layers"].values())]
