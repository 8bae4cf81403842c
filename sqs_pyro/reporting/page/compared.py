"""The page of several runs side by side."""

import shlex
from collections.abc import Mapping, Sequence
from typing import Any

from sqs_pyro.reporting.figures import figures_of
from sqs_pyro.reporting.page.again import command_lines, findings
from sqs_pyro.reporting.page.document import Section, document
from sqs_pyro.reporting.page.frontier import Spot, frontier, frontier_legend
from sqs_pyro.reporting.page.markup import Child, Markup, element
from sqs_pyro.reporting.page.numbers import NOTHING, short_time
from sqs_pyro.reporting.page.plain import Document, headline, is_language_model
from sqs_pyro.reporting.page.quality import figure
from sqs_pyro.reporting.page.table import Cell, table
from sqs_pyro.reporting.page.training import overlaid

_MOST_TENSORS = 1000


def compared_page(runs: Mapping[str, Document]) -> str:
    """Return the page of several runs.

    Args:
        runs: by name, each as of :func:`~sqs_pyro.reporting.page.run.run_page`.
    """
    metrics = {name: run["metrics"] for name, run in runs.items()}
    keys = _differing({name: run.get("recipe") or {} for name, run in runs.items()})
    curves = overlaid([(name, run["history"]) for name, run in runs.items() if run.get("history")])
    found = {name: own["findings"] for name, own in metrics.items() if own.get("findings")}
    sections = [
        Section("figures", "Side by side", [_figures(metrics), *_picture(metrics)]),
        Section("recipes", "How their recipes differ", _recipes(keys, list(runs))) if keys else None,
        Section("findings", "Findings", [[element("h3", name), findings(own)] for name, own in found.items()])
        if found
        else None,
        Section("tensors", "Layers", _tensors(metrics)),
        Section("training", "Training", curves) if curves else None,
        Section("again", "Make this page again", command_lines([shlex.join(["sqs", "report", *runs])])),
    ]
    return document(f"{len(runs)} runs compared", ", ".join(runs), None, sections)


def _figures(metrics: Mapping[str, Document]) -> Markup:
    """Return a table with a row a run: the file's figures, how far they are below fp32, and its size."""
    measured = {name: _measured(own) for name, own in metrics.items()}
    before = {name: _measured(own, "baseline") for name, own in metrics.items()}
    figures = figures_of(measured.values())
    shown = [key for key in figures if key != "entropy"]
    known = [key for key in shown if any(own.get(key) is not None for own in measured.values())]
    models = [own for own in metrics.values() if is_language_model(own)]
    texts = list(dict.fromkeys(text for own in models for text in own["compressed"]))
    rows = []
    for name, own in metrics.items():
        row = [Cell(name), *_sizes(own)]
        for key in known:
            text = f"{figure(before[name], key)} → {figure(measured[name], key)}"
            row.append(Cell(text, measured[name].get(key)))
        for text in texts:
            ratio = (own.get("perplexity_ratio") or {}).get(text)
            row.append(Cell(NOTHING if ratio is None else f"{ratio:.4f}", ratio))
        rows.append([*row, Cell(short_time(own["seconds"]), own["seconds"])])
    titles = [*(figures[key][0] for key in known), *(f"perplexity ratio, {text}" for text in texts)]
    columns = ["run", "bytes", "ratio", "bits a weight", "zeros, %", *titles, "time"]
    return table("fp32 → packed file, on the test data of each", columns, rows, sorts=True)


def _sizes(metrics: Document) -> list[Cell]:
    size = metrics["size"]
    zeros = 100 * (1 - size["nonzero_rate"])
    return [
        Cell(f"{size['file_bytes']:,}", size["file_bytes"]),
        Cell(f"{size['ratio']:.2f}", size["ratio"]),
        Cell(f"{size['bits_per_weight']:.2f}", size["bits_per_weight"]),
        Cell(f"{zeros:.1f}", zeros),
    ]


def _measured(metrics: Document, which: str = "compressed") -> Document:
    """Return the figures of a network; a language model's are by text, and have columns of their own."""
    found: Document = {} if is_language_model(metrics) else metrics[which]
    return found


def _picture(metrics: Mapping[str, Document]) -> list[Markup]:
    """Return the headline figure over the size, where all runs have the same one."""
    names = {headline(own) for own in metrics.values()}
    key = names.pop() if len(names) == 1 else None
    figures = figures_of(own["compressed"] for own in metrics.values() if not is_language_model(own))
    if key is None or key not in figures:
        return []
    label, factor, form = figures[key]
    spots = [
        Spot(name, own["size"]["file_bytes"], factor * own["compressed"][key], name)
        for name, own in metrics.items()
    ]
    fp32 = {factor * own["baseline"][key] for own in metrics.values()}
    line = fp32.pop() if len(fp32) == 1 else None  # of several fp32 networks there is no one line
    drawn = frontier(spots, label, form, line)
    return [frontier_legend(spots, line is not None), element("div", drawn, class_="panels")]


def _differing(recipes: Mapping[str, Document]) -> dict[str, list[str]]:
    """Return the keys at which recipes differ, and the value of each recipe there."""
    flat = {name: _flat(recipe) for name, recipe in recipes.items()}
    keys = dict.fromkeys(key for own in flat.values() for key in own)
    found = {key: [own.get(key, NOTHING) for own in flat.values()] for key in keys}
    return {key: values for key, values in found.items() if len(set(values)) > 1}


def _flat(recipe: Any, prefix: str = "") -> dict[str, str]:
    if not isinstance(recipe, Mapping):
        return {prefix: NOTHING if recipe is None else str(recipe)}  # keys that came later are as None
    inner = [_flat(value, f"{prefix}.{key}" if prefix else str(key)) for key, value in recipe.items()]
    return {key: value for each in inner for key, value in each.items()}


def _recipes(keys: Mapping[str, Sequence[str]], names: Sequence[str]) -> Markup:
    rows = [[key, *values] for key, values in keys.items()]
    return table("Keys of the recipes", ["key", *names], rows, words=len(names) + 1)


def _tensors(metrics: Mapping[str, Document]) -> list[Markup]:
    """Return bytes of each tensor, by run."""
    found = {name: {row["name"]: row for row in own["size"]["tensors"]} for name, own in metrics.items()}
    tensors = list(dict.fromkeys(tensor for own in found.values() for tensor in own))[:_MOST_TENSORS]
    rows: list[list[Child | Cell]] = []
    for tensor in tensors:
        sizes = [own[tensor]["bytes"] if tensor in own else None for own in found.values()]
        rows.append([Cell(tensor), *(Cell(NOTHING if size is None else f"{size:,}", size) for size in sizes)])
    return [table("Bytes of each tensor", ["tensor", *metrics], rows, sorts=True, id_="layers")]
