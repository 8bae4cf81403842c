"""The page of a benchmark: how fast products or whole networks are, method by method."""

from collections.abc import Mapping, Sequence

from sqs_pyro.reporting.bench_tables import machine_line, model_groups
from sqs_pyro.reporting.page.again import command_lines
from sqs_pyro.reporting.page.axis import Axis, axis
from sqs_pyro.reporting.page.chart import Frame, chart, colour, legend
from sqs_pyro.reporting.page.document import Section, document
from sqs_pyro.reporting.page.markup import Child, Markup, element
from sqs_pyro.reporting.page.plain import Document
from sqs_pyro.reporting.page.table import Cell, table

_BAR, _ROOM = 13, 34  # height of a bar, and of two with the space below them


def bench_page(figures: Document) -> str:
    """Return the page of a benchmark.

    Args:
        figures: what ``sqs bench --out`` writes, of kernels or of models.
    """
    of_models = any("network" in row for row in figures["rows"])
    parts = _models(figures) if of_models else _products(figures)
    missing = [element("li", element("strong", name), " ", str(why)) for name, why in figures["missing"].items()]
    command = figures.get("command")
    sections = [
        *parts,
        Section("missing", "What is missing", element("ul", missing, class_="findings")) if missing else None,
        Section("again", "Make it again", command_lines([command])) if command else None,
    ]
    what = "networks" if of_models else "products"
    how = f"medians of {figures['rounds']} calls, methods in turn"
    if of_models:
        how += ", torch.compile" if figures["compiled"] else ", eager"
    return document(f"Speed of {what}", f"{machine_line(figures['machine'])}; {how}", None, sections)


def _models(figures: Document) -> list[Section]:
    sections = []
    for index, (title, rows) in enumerate(model_groups(figures).items()):
        cells: list[list[Child | Cell]] = [_model_row(row) for row in rows]
        columns = [
            "method",
            "weights",
            "µs",
            "lower quartile",
            "upper",
            "times as fast",
            "MB held",
            "outputs differ",
        ]
        inner = table(f"{title}: a call", columns, cells, words=2, sorts=True)
        content = element("div", _bars(rows), inner, class_="columns")
        sections.append(Section(f"group-{index}", title, content))
    return sections


def _model_row(row: Document) -> list[Child | Cell]:
    times = (row["microseconds"], row.get("lower_quartile"), row.get("upper_quartile"))
    return [
        Cell(row["method"]),
        Cell("cold" if row["cold"] else "warm"),
        *(Cell("–" if time is None else f"{time:,.0f}", time) for time in times),
        Cell(f"{row['times_as_fast']:.2f}", row["times_as_fast"]),
        Cell(f"{row['bytes'] / 1e6:.2f}", row["bytes"]),
        Cell(f"{row['relative_error']:.1e}", row["relative_error"]),
    ]


def _bars(rows: Sequence[Document]) -> Markup:
    """Return bars of milliseconds; pale: weights that are still in the caches."""
    methods = list(dict.fromkeys(row["method"] for row in rows))
    most = max(row["microseconds"] for row in rows) / 1e3
    x = axis((), "milliseconds a call", start=0.0, stop=1.05 * most)
    height = _ROOM * len(methods)
    frame = Frame(x, Axis(0.0, 1.0, "", blank=True), width=460, height=height + 50, left=12)
    marks = []
    for row in rows:
        number = methods.index(row["method"])
        top = frame.top + number * _ROOM + (0 if row["cold"] else _BAR)
        right, _ = frame.place(row["microseconds"] / 1e3, 0)
        class_ = f"bar {colour(number)}" + ("" if row["cold"] else " pale")
        warm = "cold" if row["cold"] else "warm"
        said = f"{row['microseconds'] / 1e3:.3g} ms, {row['times_as_fast']:.2f} times as fast"
        tip = f"{row['method']}, {warm}: {said}"
        marks.append(
            element(
                "rect", x=frame.left, y=top, width=right - frame.left, height=_BAR - 1, class_=class_, data_tip=tip
            )
        )
    names = [(colour(number), name) for number, name in enumerate(methods)]
    drawn = chart(frame, marks, f"Milliseconds a call of {len(methods)} methods; the table has its figures.")
    note = element("p", "Pale bars: weights are still in the caches.", class_="note")
    return element("figure", legend(names), drawn, note)


def _products(figures: Document) -> list[Section]:
    shapes = dict.fromkeys((row["outputs"], row["inputs"]) for row in figures["rows"])
    sections = []
    for index, (outputs, inputs) in enumerate(shapes):
        title = f"{outputs} × {inputs}"
        rows = [row for row in figures["rows"] if (row["outputs"], row["inputs"]) == (outputs, inputs)]
        sections.append(Section(f"group-{index}", title, _shape(title, rows)))
    return sections


def _shape(title: str, rows: Sequence[Document]) -> list[Markup]:
    counts = sorted({row["rows"] for row in rows})
    times: Mapping[tuple[str, int], float] = {(row["method"], row["rows"]): row["microseconds"] for row in rows}
    methods = list(dict.fromkeys(row["method"] for row in rows))
    base = next(name for name in ("float32", "bfloat16") if name in methods)  # GPUs are not measured in float32
    speeds = {m: [(count, times[base, count] / times[m, count]) for count in counts] for m in methods}
    x = axis(counts, "M, rows of x", log=True)
    y = axis((speed for curve in speeds.values() for _, speed in curve), "times as fast", log=True)
    frame = Frame(x, y, width=460, height=300)
    marks = []
    for number, (method, curve) in enumerate(speeds.items()):
        marks.append(frame.line(curve, colour(number)))
        for count, speed in curve:
            tip = f"{method}, M = {count}: {times[method, count]:,.1f} µs, {speed:.2f} times as fast"
            marks.append(frame.dot((count, speed), colour(number), tip))
    said = f"Speed of {len(methods)} methods over the rows of x, relative to {base}; the table has its figures."
    caption = element("figcaption", f"times as fast as {base}")
    cells: list[list[Child | Cell]] = [
        [Cell(method), *(Cell(f"{times[method, count]:,.1f}", times[method, count]) for count in counts)]
        for method in methods
    ]
    columns = ["method", *(f"M = {count}" for count in counts)]
    inner = table(f"Microseconds a product, {title}", columns, cells, sorts=True)
    return [
        legend([(f"line {colour(number)}", name) for number, name in enumerate(methods)]),
        element("div", element("figure", caption, chart(frame, marks, said)), inner, class_="columns"),
    ]
