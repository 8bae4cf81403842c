"""GLUE's metrics beside their formulas and torchmetrics."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import pearsonr, spearmanr

from sqs_pyro.tasks.glue import GLUE, metric


@st.composite
def two_classes(draw):
    pairs = draw(st.lists(st.tuples(st.integers(0, 1), st.integers(0, 1)), min_size=1, max_size=40))
    return np.array(pairs).T


def counts(predicted, true):
    return [int(((predicted == p) & (true == t)).sum()) for p, t in ((1, 1), (1, 0), (0, 1), (0, 0))]


@given(two_classes())
def test_two_classes(pair):
    predicted, true = pair
    tp, fp, fn, tn = counts(predicted, true)
    assert metric("accuracy", predicted, true) == pytest.approx((tp + tn) / len(true))
    assert metric("f1", predicted, true) == pytest.approx(2 * tp / (2 * tp + fp + fn) if tp else 0)
    below = ((tp + fp) * (tp + fn) * (tn + fp) * (tn + fn)) ** 0.5
    assert metric("matthews", predicted, true) == pytest.approx((tp * tn - fp * fn) / below if below else 0)


def test_more_classes_beside_torchmetrics():
    from torchmetrics.functional.classification import multiclass_f1_score, multiclass_matthews_corrcoef

    predicted, true = torch.randint(3, (2, 200))
    as_arrays = predicted.numpy(), true.numpy()
    f1 = multiclass_f1_score(predicted, true, 3, average="macro")
    assert metric("f1", *as_arrays) == pytest.approx(float(f1), abs=1e-6)
    matthews = multiclass_matthews_corrcoef(predicted, true, 3)
    assert metric("matthews", *as_arrays) == pytest.approx(float(matthews), abs=1e-6)


def test_correlations_beside_scipy():
    g = np.random.default_rng(0)
    true = g.integers(0, 6, 100).astype(float)  # with ties
    predicted = true + g.normal(size=100).round(1)
    assert metric("pearson", predicted, true) == pytest.approx(pearsonr(predicted, true).statistic)
    assert metric("spearman", predicted, true) == pytest.approx(spearmanr(predicted, true).statistic)
    assert metric("pearson", -2 * true + 1, true) == pytest.approx(-1)
    assert metric("pearson", np.ones(100), true) == metric("spearman", true, np.ones(100)) == 0


def test_the_official_metrics():
    """The table on gluebenchmark.com."""
    official = {
        "cola": {"matthews"},
        "sst2": {"accuracy"},
        "mrpc": {"f1", "accuracy"},
        "stsb": {"pearson", "spearman"},
        "qqp": {"f1", "accuracy"},
        "mnli": {"accuracy"},
        "qnli": {"accuracy"},
        "rte": {"accuracy"},
        "wnli": {"accuracy"},
    }
    assert {name: set(task.metrics) for name, task in GLUE.items()} == official
    assert {name for name, task in GLUE.items() if not task.labels} == {"stsb"}
    assert len(GLUE["mnli"].labels) == 3
