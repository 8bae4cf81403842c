"""Bounds on the KL and the ELBO of a posterior, over temperatures."""

from collections.abc import Sequence

from sqs_pyro.reporting.page.axis import axis
from sqs_pyro.reporting.page.chart import Frame, chart, legend
from sqs_pyro.reporting.page.markup import Child, Markup, element
from sqs_pyro.reporting.page.numbers import written
from sqs_pyro.reporting.page.plain import Document
from sqs_pyro.reporting.page.table import Cell, table

_KEYS = ("lower", "monte_carlo", "jensen", "dominant")


def bracket(bounds: Document) -> list[Markup]:
    """Return the bracket of the KL a weight, a table by temperature, and one by site.

    Args:
        bounds: what ``bounds.json`` holds.
    """
    by_temperature = bounds["temperatures"]
    first = by_temperature[0]
    weights = f"{first['total']['num_weights']:,}"
    note = (
        f"KL to the prior in nats a weight, {weights} weights: it lies certainly between the ends of the bracket. "
        "The dominant value is no bound."
    )
    entries = [
        ("area c0", "certified bracket"),
        ("line c0", "Jensen"),
        ("dot c5", "Monte Carlo"),
        ("line c1 dashed", "dominant"),
    ]
    sites: list[list[Child | Cell]] = [_site(site) for site in first["sites"]]
    by_site = table(
        f"Sites at τ = {written(first['temperature'])}, nats a weight",
        ["site", "weights", "lower", "Monte Carlo", "Jensen", "dominant", "bits"],
        sites,
        sorts=True,
    )
    by_temperature_table = table(
        "By temperature: KL in nats a weight, ELBO in nats",
        ["τ", "lower", "Monte Carlo", "Jensen", "dominant", "ELBO from", "to"],
        [_row(at) for at in by_temperature],
    )
    return [
        element("p", note, class_="note"),
        legend(entries),
        element("div", _picture(by_temperature), by_temperature_table, class_="columns"),
        element("details", element("summary", f"{len(sites)} sites as a table"), by_site),
    ]


def _each(kl: Document, key: str) -> float | None:
    value = kl[key]
    return None if value is None else value / max(kl["num_weights"], 1)


def _row(at: Document) -> list[Child]:
    cells = [written(_each(at["total"], key), ".4f") for key in _KEYS]
    return [written(at["temperature"]), *cells, written(at["elbo_low"], ",.0f"), written(at["elbo_high"], ",.0f")]


def _site(site: Document) -> list[Child | Cell]:
    cells = [Cell(written(_each(site, key), ".4f"), _each(site, key)) for key in _KEYS]
    bits = site["bits_per_weight"]
    weights = site["num_weights"]
    return [Cell(site["name"]), Cell(f"{weights:,}", weights), *cells, Cell(written(bits, ".3f"), bits)]


def _picture(by_temperature: Sequence[Document]) -> list[Markup]:
    ordered = sorted((at for at in by_temperature if at["temperature"]), key=lambda at: at["temperature"])
    points = {
        key: [(at["temperature"], value) for at in ordered if (value := _each(at["total"], key)) is not None]
        for key in _KEYS
    }
    values = [value for curve in points.values() for _, value in curve]
    if not values:
        return []
    x = axis((at["temperature"] for at in ordered), "temperature τ", log=True)
    frame = Frame(x, axis(values, "KL, nats a weight"), width=440, height=260)
    marks = [frame.area(points["lower"], points["jensen"], "c0"), frame.line(points["jensen"], "c0")]
    marks += [frame.line(points["lower"], "c0 thin"), frame.line(points["dominant"], "c1 dashed")]
    marks += [frame.dot(point, "c5") for point in points["monte_carlo"]]
    reading = [
        (tau, value, f"τ = {tau:.3g}: KL {value:.4f} nats a weight, between {low:.4f} and {high:.4f}")
        for (tau, value), (_, low), (_, high) in zip(
            points["monte_carlo"] or points["jensen"], points["lower"], points["jensen"], strict=False
        )
    ]
    said = "The KL a weight over the temperature: bracket, Monte Carlo estimate and dominant value."
    return [element("figure", element("figcaption", "KL, nats a weight"), chart(frame, marks, said, reading))]
