"""A table of the paper beside what came of it here: figures, losses, and ratios in both ways of counting."""

from collections.abc import Mapping
from typing import Any

from rich.console import RenderableType

from sqs_pyro.reporting.fitted import FittedTable, Line
from sqs_pyro.reporting.printed import Report

Document = Mapping[str, Any]

NOT_AT_HAND = "not at hand"
_FIGURES = {"accuracy": "accuracy", "f1": "F1"}
_SCALES = {
    "tiny": "made data and next to no training: that it runs is all that it says",
    "here": "data and networks of this machine in place of the paper's",
    "full": "the paper's data and networks",
}


def reproduced_tables(document: Document) -> Report:
    """Return a table with a line for each row and method.

    Args:
        document: what ``table.json`` holds.
    """
    figures = list(dict.fromkeys(_FIGURES[line["figure"]] for line in document["rows"]))
    what = " or ".join(figures)
    table = FittedTable(
        "",
        f"paper's {what}",
        "lost",
        "ratio",
        f"{what}, %",
        "below fp32",
        "ratio, its formula",
        "of the file",
        "bytes",
    )
    row = None
    for line in document["rows"]:
        if line["title"] != row:
            row = line["title"]
            table.add_row(row)
        said = line["published"] or {}
        table.add_row(
            f"  {line['method']}",
            _cell(said, "figure", 100, ".2f"),
            _cell(said, "lost", 100, ".2f"),
            _cell(said, "ratio", 1, ".1f"),
            _cell(line, "ours", 100, ".2f") + _spread(line),
            _cell(line, "lost", 100, ".2f"),
            _cell(line, "paper_ratio", 1, ".1f"),
            _cell(line, "file_ratio", 1, ".1f"),
            _cell(line, "file_bytes", 1, ",.0f"),
        )
    parts: list[RenderableType] = [
        Line(f"{document['title']}, scale {document['scale']}: {_SCALES[document['scale']]}", style="bold"),
        table,
    ]
    sources = dict.fromkeys(line["published"]["source"] for line in document["rows"] if line["published"])
    if sources:
        parts.append(Line(f"Paper: {'; '.join(sources)}. What is in none of them is {NOT_AT_HAND} ('-').", "dim"))
    parts.append(
        Line("Its formula, 32 / (log2 K x rate), leaves out masks, codebooks and all else in a file.", "dim")
    )
    failed = [(line, *failure) for line in document["rows"] for failure in line["errors"].items()]
    parts += [
        Line(f"{line['method']} of {line['title']}, seed {seed}: {text}", "red") for line, seed, text in failed
    ]
    return Report(*parts)


def _cell(values: Document, key: str, factor: float, form: str) -> str:
    value = values.get(key)
    return "-" if value is None else f"{factor * value:{form}}"


def _spread(line: Document) -> str:
    return "" if line["sd"] is None else f"±{100 * line['sd']:.2f}"
