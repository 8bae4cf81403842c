"""The tasks of GLUE (Wang et al. 2019, https://arxiv.org/abs/1804.07461) as a table, and their metrics."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from sqs_pyro.extras import needed_for

Metric = Literal["accuracy", "f1", "matthews", "pearson", "spearman"]
Values = NDArray[Any]


@dataclass(frozen=True)
class GlueTask:
    """A task of GLUE.

    Attributes:
        columns: with the one or two texts.
        labels: names of the classes in the order of their numbers; none where the label is a number to predict.
        metrics: the official ones, the one to compare by first.
        judged_on: split with public labels; those of ``test`` are hidden.
    """

    columns: tuple[str, ...]
    labels: tuple[str, ...]
    metrics: tuple[Metric, ...] = ("accuracy",)
    judged_on: str = "validation"


_ENTAILED = ("entailment", "not_entailment")
_PAIR = ("sentence1", "sentence2")

GLUE = {
    "cola": GlueTask(("sentence",), ("unacceptable", "acceptable"), ("matthews",)),
    "sst2": GlueTask(("sentence",), ("negative", "positive")),
    "mrpc": GlueTask(_PAIR, ("not_equivalent", "equivalent"), ("f1", "accuracy")),
    "qqp": GlueTask(("question1", "question2"), ("not_duplicate", "duplicate"), ("f1", "accuracy")),
    "stsb": GlueTask(_PAIR, (), ("pearson", "spearman")),
    "mnli": GlueTask(
        ("premise", "hypothesis"),
        ("entailment", "neutral", "contradiction"),
        judged_on="validation_matched",
    ),
    "qnli": GlueTask(("question", "sentence"), _ENTAILED),
    "rte": GlueTask(_PAIR, _ENTAILED),
    "wnli": GlueTask(_PAIR, ("not_entailment", "entailment")),
}


def metric(name: Metric, predicted: Values, true: Values) -> float:
    """Return a metric, from -1 (accuracy and F1: 0) to 1.

    Args:
        name: F1 is that of class 1 of two, or the mean over more classes. Correlations with a constant are 0.
        predicted, true: ``[n]``, classes or, for correlations, numbers.
    """
    return float(_METRICS[name](predicted, true))


def _accuracy(predicted: Values, true: Values) -> float:
    return float((predicted == true).mean())


def _f1(predicted: Values, true: Values) -> float:
    with needed_for("GLUE's figures"):
        from sklearn.metrics import f1_score  # heavy

    classes = int(max(predicted.max(), true.max())) + 1  # those that occur: two of them are GLUE's case
    return float(f1_score(true, predicted, average="binary" if classes <= 2 else "macro", zero_division=0.0))


def _matthews(predicted: Values, true: Values) -> float:
    with needed_for("GLUE's figures"):
        from sklearn.metrics import matthews_corrcoef

    if np.ptp(predicted) == 0 or np.ptp(true) == 0:
        return 0.0  # as sklearn says, too, but with a warning
    return float(matthews_corrcoef(true, predicted))


def _pearson(predicted: Values, true: Values) -> float:
    if np.ptp(predicted) == 0 or np.ptp(true) == 0:
        return 0.0  # not defined there; NaN could not be compared
    return float(np.corrcoef(predicted, true)[0, 1])


def _spearman(predicted: Values, true: Values) -> float:
    from scipy.stats import rankdata

    return _pearson(rankdata(predicted), rankdata(true))  # its definition, ties at their mean rank


_METRICS: dict[str, Callable[[Values, Values], float]] = {
    "accuracy": _accuracy,
    "f1": _f1,
    "matthews": _matthews,
    "pearson": _pearson,
    "spearman": _spearman,
}
