"""Tables of several runs side by side."""

from collections.abc import Mapping
from typing import Any

from sqs_pyro.reporting.figures import figures_of
from sqs_pyro.reporting.fitted import FittedTable, Line
from sqs_pyro.reporting.printed import Report

Document = Mapping[str, Any]


def compared_tables(runs: Mapping[str, Document]) -> Report:
    """Return a table with a row a run: the packed file's figures on its test data, and its size.

    Args:
        runs: what ``metrics.json`` holds, by name.
    """
    measured = {name: {} if "perplexity_ratio" in own else own["compressed"] for name, own in runs.items()}
    figures = figures_of(measured.values())
    known = [key for key in figures if any(key in own for own in measured.values())]
    texts = list(dict.fromkeys(text for own in runs.values() for text in own.get("perplexity_ratio", ())))
    titles = [*(figures[key][0] for key in known), *(f"perplexity ratio, {text}" for text in texts)]
    table = FittedTable("run", *titles, "bytes", "ratio", "bits", "zeros, %", "findings")
    for name, own in runs.items():
        cells = [_cell(measured[name].get(key), *figures[key][1:]) for key in known]
        cells += [_cell(own.get("perplexity_ratio", {}).get(text), 1, ".4f") for text in texts]
        size = own["size"]
        sizes = [f"{size['file_bytes']:,}", f"{size['ratio']:.2f}", f"{size['bits_per_weight']:.2f}"]
        zeros = f"{100 * (1 - size['nonzero_rate']):.1f}"
        table.add_row(name, *cells, *sizes, zeros, str(len(own.get("findings", ()))))
    return Report(Line(f"{len(runs)} runs: packed files on the test data of each", style="bold"), table)


def _cell(value: float | None, factor: float, form: str) -> str:
    return "-" if value is None else f"{factor * value:{form}}"
