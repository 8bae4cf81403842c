"""A table of the paper beside what came of it here: figures, losses, and ratios in both ways of counting."""

from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import RenderableType

from sqs_pyro.reporting.fitted import FittedTable, Line
from sqs_pyro.reporting.paired import FEWEST, LEVEL
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
        "difference",
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
            _difference(line),
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
    parts += _explained(document["rows"])
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


def _difference(line: Document) -> str:
    found = line.get("difference")  # a document of an older version has none
    if found is None:
        return "-"
    shown = f"{100 * found['mean']:+.2f}"
    if found["interval"] is None:
        return shown
    low, high = found["interval"]
    stars = sum(p < 1 - LEVEL for p in (found["p"], found["p_holm"]))
    return f"{shown}±{50 * (high - low):.2f}" + "*" * stars


def _explained(lines: Sequence[Document]) -> list[RenderableType]:
    """Say what differences are of, and from how many seeds."""
    compared = [line for line in lines if line.get("difference")]
    if not compared:
        return []
    usual = compared[0]["against"]
    others = {line["method"]: line["against"] for line in compared if line["against"] != usual}
    own = "".join(f"; of {method} from {against}" for method, against in others.items())
    if not any(line["difference"]["interval"] for line in compared):
        return [Line(f"Difference: from {usual}{own}; from {FEWEST} seeds on it can be told from chance.", "dim")]
    text = (
        f"Difference: from {usual} at the same seeds{own}, ±half of the {100 * LEVEL:.0f} % interval (paired t)."
    )
    return [Line(f"{text} * it excludes 0; ** with Holm's correction for the row's methods, too.", "dim")]
