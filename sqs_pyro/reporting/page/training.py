"""How training went: curves of loss, ELBO, zeros, temperature and validation over the steps."""

from collections.abc import Sequence
from itertools import groupby

from sqs_pyro.reporting.page.axis import axis
from sqs_pyro.reporting.page.chart import Frame, Point, chart, colour, legend, smoothed, thinned
from sqs_pyro.reporting.page.markup import Markup, element
from sqs_pyro.reporting.page.numbers import finite
from sqs_pyro.reporting.page.plain import Document
from sqs_pyro.reporting.page.table import table

_CURVES = (  # column of history.csv, what it is, factor
    ("loss", "loss", 1),
    ("accuracy", "on validation data, %", 100),
    ("nll", "ELBO part: negative log likelihood", 1),
    ("kl", "ELBO part: KL to the prior", 1),
    ("nonzero_rate", "non-zero weights, %", 100),
    ("temperature", "temperature τ", 1),
)


def training(history: Sequence[Document]) -> list[Markup]:
    """Return the curves of a run's history, and a table of its validations.

    Args:
        history: rows of ``history.csv``, whose cells are texts.
    """
    stages = [(name, [finite(row["step"]) or 0.0 for row in rows]) for name, rows in groupby(history, _stage)]
    panels = [_panel(history, stages, *curve) for curve in _CURVES]
    shown = [panel for panel in panels if panel is not None]
    judged = [row for row in history if finite(row.get("accuracy")) is not None]
    words = [f"{name} from step {steps[0]:.0f}" for name, steps in stages]
    return [
        element("p", "Stages: " + ", ".join(words) + ". Dashed lines are where they begin.", class_="note"),
        element("div", shown, class_="panels"),
        *([_validations(judged)] if judged else []),
    ]


def _stage(row: Document) -> str:
    return str(row.get("stage", ""))


def _panel(
    history: Sequence[Document], stages: Sequence[tuple[str, list[float]]], key: str, label: str, factor: float
) -> Markup | None:
    points = _points(history, key, factor)
    if not points:
        return None
    last = max(finite(row["step"]) or 0.0 for row in history)
    y = axis((value for _, value in points), label)
    frame = Frame(axis((), "step", start=0.0, stop=last or 1.0), y)
    begins = [steps[0] for _, steps in stages[1:]]
    marks = [frame.line([(step, y.low), (step, y.high)], "stage") for step in begins]
    means = smoothed(points)
    marks += [frame.line(points, "c0 pale"), frame.line(means, "c0")] if means else [frame.line(points, "c0")]
    if len(points) <= 40:
        marks += [frame.dot(point, "c0", radius=2.5) for point in points]
    reading = [(x, value, f"step {x:.0f}: {value:.4g}") for x, value in points]
    said = f"{label} over {last:.0f} steps, at the end {points[-1][1]:.4g}."
    title = element("figcaption", label, element("span", f"{points[-1][1]:.4g}", class_="last"))
    return element("figure", title, chart(frame, marks, said, reading))


def _points(history: Sequence[Document], key: str, factor: float) -> list[Point]:
    found = [(finite(row.get("step")), finite(row.get(key))) for row in history]
    return thinned([(step, factor * value) for step, value in found if step is not None and value is not None])


def _validations(judged: Sequence[Document]) -> Markup:
    rows = [
        [
            row["step"],
            *(f"{100 * (finite(row[key]) or 0.0):.2f}" for key in ("accuracy", "nonzero_rate")),
            f"{finite(row['loss']) or 0.0:.4f}",
        ]
        for row in judged
    ]
    inner = table("Validation during training", ["step", "validation, %", "non-zero, %", "loss"], rows)
    return element("details", element("summary", "Validations as a table"), inner)


def overlaid(histories: Sequence[tuple[str, Sequence[Document]]]) -> list[Markup]:
    """Return loss and validation of several runs, a curve each."""
    panels = []
    for key, label, factor in _CURVES[:2]:
        curves = [(name, _points(history, key, factor), history) for name, history in histories]
        curves = [curve for curve in curves if curve[1]]
        if not curves:
            continue
        y = axis((value for _, points, _ in curves for _, value in points), label)
        frame = Frame(axis((), "step", start=0.0, stop=max(points[-1][0] for _, points, _ in curves)), y)
        marks = [frame.line(points, colour(index)) for index, (_, points, _) in enumerate(curves)]
        said = f"{label} over the steps of {len(curves)} runs."
        panels.append(element("figure", element("figcaption", label), chart(frame, marks, said)))
    names = [(f"line {colour(index)}", name) for index, (name, _) in enumerate(histories)]
    return [legend(names), element("div", panels, class_="panels")] if panels else []
