"""Compressed layers: a table that sorts and filters, and of the chosen one a histogram with its codewords."""

import math
from collections.abc import Sequence

from sqs_pyro.reporting.page.axis import Axis, axis
from sqs_pyro.reporting.page.chart import Frame, chart, legend
from sqs_pyro.reporting.page.markup import Child, Markup, element
from sqs_pyro.reporting.page.numbers import written
from sqs_pyro.reporting.page.plain import Document
from sqs_pyro.reporting.page.table import Cell, table

_MOST_ROWS = 2000  # of a page of at most 3 MB
_MOST_PICTURES = 600


def layers(size: Document, histograms: Sequence[Document]) -> list[Markup]:
    """Return the table of a file's tensors, and histograms of those that there are any of."""
    known = {layer["name"]: layer for layer in histograms[:_MOST_PICTURES]}
    tensors = size["tensors"][:_MOST_ROWS]
    columns = ["tensor", "shape", "layout", "weights", "zeros, %", "bytes", "bits each"]
    first = next((index for index, tensor in enumerate(tensors) if tensor["name"] in known), 0)
    rows = [_row(index, tensor, tensor["name"] in known, index == first) for index, tensor in enumerate(tensors)]
    left_out = len(size["tensors"]) - len(tensors)
    caption = "Compressed tensors" + (f"; {left_out:,} more are left out" if left_out else "")
    drawn = [
        _figure(index, known[tensor["name"]], index == first)
        for index, tensor in enumerate(tensors)
        if tensor["name"] in known
    ]
    parts = [_filter(len(tensors)), table(caption, columns, rows, words=3, sorts=True, id_="layers")]
    if not drawn:
        return parts
    said = "Choose a tensor in the table to see its weights just before they became codes."
    panel = element("div", element("p", said, class_="note"), _legend(), drawn, id="layer-panel")
    return [element("div", element("div", parts), panel, class_="beside")]


def _filter(count: int) -> Markup:
    return element(
        "p",
        element(
            "label", "Filter by name ", element("input", type="search", id="layer-filter", autocomplete="off")
        ),
        " ",
        element("span", f"{count:,} tensors", id="layer-count", role="status", data_total=str(count)),
        class_="filter",
    )


def _row(index: int, tensor: Document, drawn: bool, chosen: bool) -> list[Child | Cell]:
    weights = max(math.prod(tensor["shape"]), 1)
    zeros, bits = 100 * (1 - tensor["nonzeros"] / weights), 8 * tensor["bytes"] / weights
    name: Child = tensor["name"]
    if drawn:
        pressed = "true" if chosen else "false"
        name = element(
            "button", name, type="button", data_shows=f"layer-{index}", aria_pressed=pressed, class_="choice"
        )
    layout = f"{tensor['layout']}, {tensor['bits']} bits" if tensor["bits"] else tensor["layout"]
    return [
        Cell(name),
        "×".join(str(side) for side in tensor["shape"]),
        layout,
        Cell(f"{weights:,}", weights),
        Cell(f"{zeros:.1f}", zeros),
        Cell(f"{tensor['bytes']:,}", tensor["bytes"]),
        Cell(f"{bits:.2f}", bits),
    ]


def _legend() -> Markup:
    return legend([("bar pruned", "became zero"), ("bar kept", "kept"), ("codeword", "codewords")])


def _figure(index: int, layer: Document, chosen: bool) -> Markup:
    count, book = len(layer["kept"]), layer["codebook"]
    said = f"{sum(layer['kept']):,} of {sum(layer['kept']) + sum(layer['pruned']):,} weights kept"
    said += f", {len(book)} codewords" if book else ""
    low, high = layer["low"], layer["high"]
    most = max([2, *layer["kept"], *layer["pruned"]])
    # From below one weight, so that a bin of a single one has a bar on the logarithmic axis.
    frame = Frame(Axis(low, high, "weight"), Axis(0.5, 2.0 * most, "weights a bin", log=True, form=_count))
    step = (high - low) / max(count, 1)
    marks = [
        element("path", d=_stairs(frame, layer[name], low, step), class_=f"bar {name}")
        for name in ("pruned", "kept")
    ]
    ground = frame.height - frame.bottom
    for value, times in book:
        across, _ = frame.place(value, 1)
        outline = f"M{across:g} {ground - 10:g}l4 9h-8z"
        marks.append(element("path", d=outline, class_="codeword", data_tip=f"{value:.4g}: {times:,} weights"))
    reading = [
        (
            low + (i + 0.5) * step,
            max(kept, pruned),
            f"{low + i * step:.3g} to {low + (i + 1) * step:.3g}: {kept:,} kept, {pruned:,} zero",
        )
        for i, (kept, pruned) in enumerate(zip(layer["kept"], layer["pruned"], strict=True))
        if kept or pruned
    ]
    caption = element("figcaption", element("strong", layer["name"]), element("br"), said)
    drawn = chart(frame, marks, f"Histogram of the weights of {layer['name']}: {said}.", reading)
    return element("figure", caption, drawn, id=f"layer-{index}", class_="layer", hidden=not chosen)


def _stairs(frame: Frame, counts: Sequence[int], low: float, step: float) -> str:
    """Return the outline of bars side by side, from the ground to the ground."""
    ground = frame.height - frame.bottom
    across, _ = frame.place(low, 1)
    parts = [f"M{across:g} {ground:g}"]
    for i, number in enumerate(counts):
        right, top = frame.place(low + (i + 1) * step, number)
        parts.append(f"V{min(top, ground) if number else ground:g}H{right:g}")
    return "".join([*parts, f"V{ground:g}z"])


def _count(tick: float) -> str:
    if tick < 1:  # the ground, below one weight
        return ""
    return f"{tick:,.0f}" if tick < 10_000 else f"{tick / 1000:,.0f}k"


def blocks(records: Sequence[Document]) -> list[Markup]:
    """Return bits and errors of the blocks of a language model, as charts and as a table."""
    figures = []
    for key, label, form in (
        ("bits", "bits a weight", ".3f"),
        ("error", "squared error of the outputs, relative", ".5f"),
    ):
        # A block whose layers are all left uncompressed has no bits a compressed weight.
        points = [(float(record["block"]), record[key]) for record in records if record[key] is not None]
        frame = Frame(axis((x for x, _ in points), "block"), axis((y for _, y in points), label))
        marks = [frame.line(points, "c0"), *(frame.dot(point, "c0", radius=3) for point in points)]
        reading = [(x, y, f"block {x:.0f}: {y:{form}}") for x, y in points]
        drawn = chart(frame, marks, f"{label} of each of {len(points)} blocks.", reading)
        figures.append(element("figure", element("figcaption", label), drawn))
    rows: list[list[Child | Cell]] = [
        [
            Cell(str(record["block"]), record["block"]),
            Cell(written(record["bits"], ".3f"), record["bits"]),
            Cell(f"{record['error']:.5f}", record["error"]),
            Cell(f"{record['seconds']:.1f}", record["seconds"]),
        ]
        for record in records
    ]
    columns = ["block", "bits a weight", "error", "seconds"]
    return [element("div", figures, class_="panels"), table("Blocks", columns, rows, sorts=True)]
