"""Is a classifier right as often as it says? Reliability diagrams of the network before and after."""

from collections.abc import Mapping

from sqs_pyro.reporting.page.axis import Axis
from sqs_pyro.reporting.page.chart import Frame, chart, colour
from sqs_pyro.reporting.page.markup import Child, Markup, element
from sqs_pyro.reporting.page.plain import Document
from sqs_pyro.reporting.page.table import table

_PERCENT = "{:.0f} %".format


def calibration(networks: Mapping[str, Document]) -> list[Markup]:
    """Return a reliability diagram of each network.

    Args:
        networks: by name ``confidence``, ``accuracy`` and ``counts`` of equal bins of the top class's probability.
    """
    drawn = [_diagram(name, own, index) for index, (name, own) in enumerate(networks.items())]
    note = "On the dashed line a network is right as often as it says; areas of dots are shares of the examples."
    tables = [
        element("details", element("summary", f"Bins as a table: {name}"), _bins(name, own))
        for name, own in networks.items()
    ]
    return [element("p", note, class_="note"), element("div", drawn, class_="panels"), *tables]


def _diagram(name: str, own: Document, index: int) -> Markup:
    side = Axis(0, 100, "confidence, %")
    frame = Frame(side, Axis(0, 100, "accuracy, %"), width=300, height=270)
    total = max(sum(own["counts"]), 1)
    rows = [row for row in zip(own["confidence"], own["accuracy"], own["counts"], strict=True) if row[2]]
    points = [(100 * confidence, 100 * accuracy) for confidence, accuracy, _ in rows]
    marks = [frame.line([(0, 0), (100, 100)], "stage"), frame.line(points, colour(index))]
    for point, (_, _, count) in zip(points, rows, strict=True):
        marks.append(frame.dot(point, colour(index), radius=round(2 + 8 * (count / total) ** 0.5, 1)))
    reading = [
        (*point, f"says {point[0]:.1f} %, is right {point[1]:.1f} % of {count:,}")
        for point, (_, _, count) in zip(points, rows, strict=True)
    ]
    error = sum(count * abs(accuracy - confidence) for confidence, accuracy, count in rows) / total
    said = f"Reliability diagram, {name}: accuracy over confidence, calibration error {100 * error:.2f} %."
    title = element(
        "figcaption", f"{name}: accuracy, %", element("span", f"ECE {100 * error:.2f} %", class_="last")
    )
    return element("figure", title, chart(frame, marks, said, reading))


def _bins(name: str, own: Document) -> Markup:
    rows: list[list[Child]] = [
        [f"{100 * confidence:.2f}", f"{100 * accuracy:.2f}", f"{count:,}"]
        for confidence, accuracy, count in zip(own["confidence"], own["accuracy"], own["counts"], strict=True)
        if count
    ]
    return table(f"Reliability, {name}", ["confidence, %", "accuracy, %", "examples"], rows)
