"""How good networks are, before and after: a table of a task's figures, or of perplexities; and how fast."""

from collections.abc import Mapping

from sqs_pyro.reporting.figures import figures_of
from sqs_pyro.reporting.latency import slower
from sqs_pyro.reporting.page.markup import Child, Markup, element
from sqs_pyro.reporting.page.numbers import written
from sqs_pyro.reporting.page.plain import Document, is_language_model
from sqs_pyro.reporting.page.table import table
from sqs_pyro.reporting.tables import search_cell, search_column


def quality(metrics: Document) -> list[Markup]:
    """Return tables of all networks of a run."""
    if is_language_model(metrics):
        return [_perplexities(metrics)]
    networks = {"fp32": metrics["baseline"], "packed file": metrics["compressed"]}
    if "averaged" in metrics:
        networks["posterior mean"] = metrics["posterior_mean"]
        networks[f"average of {metrics['averaged']['samples']}"] = metrics["averaged"]
    if "validation" in metrics:
        networks["packed, validation"] = metrics["validation"]
    return [figures("Figures on the test data, and of the packed file on the validation data", networks)]


def search(metrics: Document) -> list[Markup]:
    """Return what was tried on the way to a size, and why none was good enough, if none was."""
    found = metrics["search"]
    rows: list[list[Child]] = [
        [
            f"try {i + 1}",
            f"{own['ratio']:.1f}",
            f"{own['points']:+.2f}".replace("-", "−"),
            f"{own['bytes']:,}",
            search_cell(own),
            "chosen" if i == found["chosen"] else "",
        ]
        for i, own in enumerate(found["attempts"])
    ]
    columns = ["", "ratio", "points lost", "bytes", search_column(found), ""]
    caption = f"Files on the way to the smallest that loses at most {found['points']:g} points on validation data"
    unmet = element("p", str(found["unmet"]), class_="note") if found.get("unmet") else None
    return [table(caption, columns, rows), *([unmet] if unmet else [])]


def figures(caption: str, networks: Mapping[str, Document]) -> Markup:
    """Return a table with a row a figure, a column a network."""
    known = {
        key: told
        for key, told in figures_of(networks.values()).items()
        if any(network.get(key) is not None for network in networks.values())
    }
    rows: list[list[Child]] = [[known[key][0], *(figure(own, key) for own in networks.values())] for key in known]
    counts = [network.get("num_examples") for network in networks.values()]
    rows.append(["examples", *(written(count, ",") for count in counts)])
    return table(caption, ["", *networks], rows)


def figure(network: Document, key: str) -> str:
    """Return a figure of a network as it is written."""
    _, factor, form = figures_of([network]).get(key, (key, 1, ".4f"))
    value = network.get(key)
    return written(None if value is None else factor * value, form)


def _perplexities(metrics: Document) -> Markup:
    rows: list[list[Child]] = []
    for name, packed in metrics["compressed"].items():
        before, ratio = metrics["baseline"][name]["perplexity"], metrics["perplexity_ratio"][name]
        cells = [written(before, ".3f"), written(packed["perplexity"], ".3f"), written(ratio, ".4f")]
        rows.append([name, *cells, *(written(packed.get(key), ",") for key in ("tokens", "window", "stride"))])
    columns = ["text", "fp32", "packed file", "ratio", "tokens", "window", "stride"]
    return table("Perplexity by text", columns, rows)


def latency(metrics: Document) -> list[Markup]:
    """Return how long a call takes before and after, by batch; nothing where it was not measured.

    ``metrics["latency"]`` is ``{"batch": {"1": {"dense_ms": 1.2, "packed_ms": 0.9}}}``, medians in milliseconds,
    and may have a text ``how``.
    """
    times = (metrics.get("latency") or {}).get("batch") or {}
    if not times:
        return []
    rows = [
        [batch, f"{own['dense_ms']:.3f}", f"{own['packed_ms']:.3f}", f"{own['dense_ms'] / own['packed_ms']:.2f}×"]
        for batch, own in times.items()
    ]
    said = [metrics["latency"].get("how"), slower(metrics["latency"])]
    notes = [element("p", str(text), class_="note") for text in said if text]
    columns = ["batch", "dense, ms", "packed, ms", "times as fast"]
    return [table("Milliseconds a call on the machine of this run", columns, rows), *notes]
