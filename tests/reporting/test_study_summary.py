"""Sums over seeds against numpy, the Pareto front against another algorithm, and a document whose keys stay."""

import csv
import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from kits.study import metrics, result

from sqs_pyro.reporting.page.study import study_page
from sqs_pyro.reporting.study_plots import comparison_figure, sweep_figure
from sqs_pyro.reporting.study_summary import FIGURES, SAME_SIZE, SCHEMA, on_front, summarise, write_csv
from sqs_pyro.reporting.study_tables import comparison_tables


def front_by_sorting(pairs):
    """Best quality first; a pair stays if it is smaller than all before it. Independent of the definition."""
    best, front = float("inf"), set()
    for size, quality in sorted(set(pairs), key=lambda pair: (-pair[1], pair[0])):
        if size < best:
            front.add((size, quality))
            best = size
    return [pair in front for pair in pairs]


PAIRS = st.lists(st.tuples(st.integers(1, 100), st.integers(0, 20)), max_size=30)  # 1 % apart or equal


@given(PAIRS)
def test_front_of_accuracy(pairs):
    assert on_front(pairs, larger_is_better=True) == front_by_sorting(pairs)


@given(PAIRS)
def test_front_of_nll(pairs):
    negated = [(size, -quality) for size, quality in pairs]
    assert on_front(pairs, larger_is_better=False) == front_by_sorting(negated)


def test_a_few_bytes_do_not_excuse_a_worse_network():
    nearly = 1000 * (SAME_SIZE - 0.001)
    assert on_front([(1000, 0.9), (nearly, 0.95)], larger_is_better=True) == [False, True]
    assert on_front([(1000, 0.9), (1000 * (SAME_SIZE + 0.001), 0.95)], larger_is_better=True) == [True, True]
    assert on_front([(1000, 0.9), (nearly, 0.9)], larger_is_better=True) == [True, False]


@given(st.lists(st.tuples(st.floats(1000, 1100), st.floats(0, 1)), min_size=1, max_size=20))
def test_the_best_and_some_point_are_always_on_the_front(pairs):
    front = on_front(pairs, larger_is_better=True)
    best = max(pairs, key=lambda pair: (pair[1], -pair[0]))
    assert front[pairs.index(best)]


def test_means_and_deviations_over_seeds():
    accuracies = [0.91, 0.93, 0.92]
    results = [result("a", seed, metrics(accuracy)) for seed, accuracy in enumerate(accuracies)]
    (point,) = summarise("study", results)["points"]
    assert point["seeds"] == [0, 1, 2]
    assert point["by_seed"]["accuracy"] == accuracies
    assert point["mean"]["accuracy"] == pytest.approx(np.mean(accuracies))
    assert point["sd"]["accuracy"] == pytest.approx(np.std(accuracies, ddof=1))
    assert point["mean"]["validation_accuracy"] == pytest.approx(np.mean(accuracies) - 0.01)
    assert point["sd"]["file_bytes"] == 0
    (alone,) = summarise("study", results[:1])["points"]
    assert set(alone["sd"].values()) == {None}


def test_a_failed_run_is_named_and_left_out_of_the_mean():
    failed = [result("a", 1, None, error="Diverged."), result("b", 0, None, error="No.")]
    first, second = summarise("study", [result("a", 0, metrics(0.9)), *failed])["points"]
    assert (first["seeds"], first["errors"], first["mean"]["accuracy"]) == ([0], {"1": "Diverged."}, 0.9)
    assert (second["seeds"], second["errors"], second["mean"]) == ([], {"0": "No."}, {})
    assert first["front"] == {"accuracy": True, "nll": True}
    assert second["front"] == {"accuracy": False, "nll": False}


def test_figures_that_a_run_lacks_are_left_out_not_guessed():
    old = metrics()
    del old["validation"]
    averaged = metrics(averaged={"accuracy": 0.91, "nll": 0.19, "ece": 0.02, "brier": 0.09})
    first, second = summarise("study", [result("old", 0, old), result("new", 0, averaged)])["points"]
    assert "validation_accuracy" not in first["mean"]
    assert "averaged_nll" not in first["mean"]
    assert second["mean"]["averaged_nll"] == 0.19


def test_the_keys_of_the_document_stay():
    """Others read this file: what is here may grow, but a change of meaning raises SCHEMA."""
    averaged = metrics(averaged={"accuracy": 0.91, "nll": 0.19, "ece": 0.02, "brier": 0.09})
    values = {"compression.kl_weight": 0.1}
    summary = summarise("study", [result(label, 0, averaged, values) for label in "ab"])
    assert json.loads(json.dumps(summary, allow_nan=False)) == summary
    assert SCHEMA == summary["schema"] == 1
    assert set(summary) == {"schema", "name", "versions", "reference", "points"}
    point, other = summary["points"]
    assert set(other["difference"]["nll"]) == {"mean", "interval", "p", "p_holm"}
    assert set(point) == {
        *("variant", "point", "values", "seeds", "errors", "mean", "sd", "by_seed", "front", "difference"),
    }
    of_questions = {name for name in FIGURES if "f1" in name} | {"exact_match"}
    assert set(point["mean"]) == set(point["sd"]) == set(point["by_seed"]) == set(FIGURES) - of_questions
    assert set(FIGURES) >= {"accuracy", "nll", "ece", "brier", "file_bytes", "ratio", "nonzero_rate", "seconds"}


def test_questions_are_compared_by_f1():
    results = []
    for label, f1, size in (("small", 0.80, 900), ("good", 0.85, 1200), ("neither", 0.79, 1100)):
        found = metrics(nll=1 - f1, file_bytes=size, f1_drop=0.9 - f1)
        for part in ("baseline", "compressed", "validation"):
            found[part] = {"f1": 0.9 if part == "baseline" else f1, "exact_match": 0.7, "nll": 1 - f1}
        del found["accuracy_drop"]
        results += [result(label, seed, found) for seed in range(3)]
    summary = summarise("study", results)
    assert [point["front"] for point in summary["points"]] == [
        {"accuracy": True, "nll": True},
        {"accuracy": True, "nll": True},
        {"accuracy": False, "nll": False},
    ]
    assert summary["points"][1]["difference"]["f1"]["mean"] == pytest.approx(0.05)
    text = comparison_tables(summary).text(160)
    assert "fp32 F1 90.00 %" in text and "85.00" in text and "accuracy" not in text
    assert len(comparison_figure(summary).axes) == len(sweep_figure(summary).axes) + 2
    assert "F1, %" in study_page(summary)


def test_csv_has_a_row_for_each_finished_run(tmp_path):
    values = {"compression.kl_weight": 0.1}
    results = [result("a", seed, metrics(0.9 + seed / 100), values) for seed in (0, 1)]
    results += [result("b", 0, metrics(0.8)), result("b", 1, None, error="Diverged.")]
    write_csv(tmp_path / "study.csv", summarise("study", results))
    with (tmp_path / "study.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [(row["variant"], row["seed"], row["compression.kl_weight"]) for row in rows] == [
        ("a", "0", "0.1"),
        ("a", "1", "0.1"),
        ("b", "0", ""),
    ]
    assert [float(row["accuracy"]) for row in rows] == [0.9, 0.91, 0.8]
