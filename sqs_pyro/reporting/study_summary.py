"""What a study measured: means, deviations and differences over seeds, and who is on the Pareto front."""

import csv
import io
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from sqs_pyro.atomic import write_text
from sqs_pyro.reporting.paired import holm, paired_difference

Document = Mapping[str, Any]

SCHEMA = 1  # of the document that `summarise` makes; raised when a key changes its meaning
SAME_SIZE = 1.005

FIGURES = {
    "accuracy": "compressed.accuracy",
    "accuracy_drop": "accuracy_drop",
    "f1": "compressed.f1",  # of questions, which have no accuracy
    "f1_drop": "f1_drop",
    "exact_match": "compressed.exact_match",
    "nll": "compressed.nll",
    "ece": "compressed.ece",
    "brier": "compressed.brier",
    "validation_accuracy": "validation.accuracy",
    "validation_f1": "validation.f1",
    "validation_nll": "validation.nll",
    "averaged_accuracy": "averaged.accuracy",
    "averaged_nll": "averaged.nll",
    "averaged_ece": "averaged.ece",
    "averaged_brier": "averaged.brier",
    "baseline_accuracy": "baseline.accuracy",
    "baseline_f1": "baseline.f1",
    "baseline_nll": "baseline.nll",
    "bits_per_weight": "size.bits_per_weight",
    "file_bytes": "size.file_bytes",
    "fp32_bytes": "size.fp32_bytes",
    "ratio": "size.ratio",
    "paper_ratio": "size.paper_ratio",
    "nonzero_rate": "nonzero_rate",
    "beta": "beta",
    "seconds": "seconds",
}
"""Names of a study's figures, and where ``metrics.json`` has them."""


def summarise(name: str, results: Sequence[Document], reference: str | None = None) -> dict[str, Any]:
    """Sum up the results of a study.

    Args:
        name: of the study.
        results: one for each run: ``variant``, ``point`` (a label), ``values`` (dotted keys), ``seed``,
            ``metrics`` (or None) and ``error`` (a sentence, or None).
        reference: label of the variant that others are compared with; None: the first.

    Returns:
        ``schema``, ``name``, ``versions``, ``reference``, and ``points``: for each variant and point of its grid
        ``seeds``, ``errors`` (seed to sentence), ``by_seed`` (figure to list), ``mean``, ``sd`` (of a sample; None
        for one seed), ``front``: whether no other point has a smaller file and a better accuracy (F1), or a better
        NLL, and ``difference`` from the reference's point of the same values, or its only one: for each figure
        ``mean``, ``interval``, ``p`` and ``p_holm`` (see :mod:`sqs_pyro.reporting.paired`).
    """
    points: dict[tuple[str, str], list[Document]] = {}
    for result in results:
        points.setdefault((result["variant"], result["point"]), []).append(result)
    summed_up = [_point(of_point) for of_point in points.values()]
    for figure, better in (("accuracy", "accuracy"), ("accuracy", "f1"), ("nll", "nll")):
        known = [point for point in summed_up if better in point["mean"]]
        pairs = [(point["mean"]["file_bytes"], point["mean"][better]) for point in known]
        for point, is_on_front in zip(known, on_front(pairs, larger_is_better=better != "nll"), strict=True):
            point["front"][figure] = is_on_front
    reference = reference or next((point["variant"] for point in summed_up), None)
    _compare(summed_up, reference)
    versions = next((result["metrics"]["versions"] for result in results if result["metrics"]), None)
    return {"schema": SCHEMA, "name": name, "versions": versions, "reference": reference, "points": summed_up}


def on_front(pairs: Sequence[tuple[float, float]], *, larger_is_better: bool) -> list[bool]:
    """Return which (size, quality) pairs no other one dominates.

    Another one dominates if it is better and no larger, or smaller and no worse; sizes within
    :data:`SAME_SIZE` count as equal when the quality differs, so that a few bytes do not excuse a worse network.
    """
    sign = -1 if larger_is_better else 1
    costs = [(size, sign * quality) for size, quality in pairs]
    return [not any((a <= SAME_SIZE * c and b < d) or (a < c and b <= d) for a, b in costs) for c, d in costs]


def _point(results: Sequence[Document]) -> dict[str, Any]:
    finished = [result for result in results if result["metrics"] is not None]
    by_seed: dict[str, list[float]] = {}
    for figure, key in FIGURES.items():
        values = [_figure(result["metrics"], key) for result in finished]
        if values and None not in values:  # a mean over some of the seeds would be compared with one over all
            by_seed[figure] = values  # type: ignore[assignment]
    return {
        "variant": results[0]["variant"],
        "point": results[0]["point"],
        "values": dict(results[0]["values"]),
        "seeds": [result["seed"] for result in finished],
        "errors": {str(result["seed"]): result["error"] for result in results if result["error"] is not None},
        "mean": {figure: statistics.fmean(values) for figure, values in by_seed.items()},
        "sd": {  # of a sample: one seed says nothing of the spread
            figure: statistics.stdev(values) if len(values) > 1 else None for figure, values in by_seed.items()
        },
        "by_seed": by_seed,
        "front": {"accuracy": False, "nll": False},
        "difference": {},
    }


def _compare(points: Sequence[dict[str, Any]], reference: str | None) -> None:
    """Write the differences from the reference into the other variants' points."""
    theirs = [point for point in points if point["variant"] == reference]
    others = [point for point in points if point["variant"] != reference]
    for figure in FIGURES:
        tested: dict[int, float] = {}  # p-values by place among the others
        for i, point in enumerate(others):
            same = [other for other in theirs if len(theirs) == 1 or other["values"] == point["values"]]
            shared = _shared(figure, point, same[0]) if same else None
            if shared is not None:
                difference = paired_difference(*shared)
                point["difference"][figure] = {**asdict(difference), "p_holm": None}
                tested |= {} if difference.p is None else {i: difference.p}
        # Holm's family is the figure's column: whoever reads it looks for the largest.
        for i, p_holm in zip(tested, holm([*tested.values()]), strict=True):
            others[i]["difference"][figure]["p_holm"] = p_holm


def _shared(figure: str, point: Document, other: Document) -> tuple[list[float], list[float]] | None:
    """Return a figure of two points at the seeds that both have."""
    seeds = [seed for seed in point["seeds"] if seed in other["seeds"]]
    if not seeds or any(figure not in each["by_seed"] for each in (point, other)):
        return None
    ours, theirs = (
        [each["by_seed"][figure][each["seeds"].index(seed)] for seed in seeds] for each in (point, other)
    )
    return ours, theirs


def _figure(metrics: Document, key: str) -> float | None:
    value: Any = metrics
    for part in key.split("."):
        value = value.get(part) if isinstance(value, Mapping) else None
    return None if value is None else float(value)


def write_csv(path: Path, summary: Document) -> None:
    """Write a row for each run that finished: variant, point, the grid's values, seed, all figures."""
    points = summary["points"]
    keys = list(dict.fromkeys(key for point in points for key in point["values"]))
    figures = [figure for figure in FIGURES if any(figure in point["by_seed"] for point in points)]
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, ["variant", "point", *keys, "seed", *figures])
    writer.writeheader()
    for point in points:
        for i, seed in enumerate(point["seeds"]):
            row = {figure: values[i] for figure, values in point["by_seed"].items()}
            writer.writerow(
                {"variant": point["variant"], "point": point["point"], **point["values"], "seed": seed, **row}
            )
    write_text(path, text.getvalue())
