"""Metrics by name: torchmetrics' and users' own, against scikit-learn, and what becomes of what is none."""

import numpy as np
import pytest
import torch
from sklearn import metrics
from torch import nn

from sqs_pyro.data import Data, DataRecipe
from sqs_pyro.data.tensor_loader import TensorLoader
from sqs_pyro.errors import NetworkError, RecipeError, SQSError
from sqs_pyro.evaluation.judging import judged
from sqs_pyro.recipes import parse
from sqs_pyro.tasks.metrics import data_objective
from sqs_pyro.tasks.task import Scored, judge, lost

OWN = """
def share_of_first(outputs, labels, of=0):
    return ((outputs.argmax(1) == of) == (labels == of)).float().mean()

def error(outputs, labels):
    return (outputs - labels).abs().max()

error.higher_is_better = False

def large(outputs, labels):
    return 7.5

def several(outputs, labels):
    return outputs

def none(outputs, labels):
    return float("nan")

def failing(outputs, labels):
    raise ValueError("no such thing")

class Counted:
    higher_is_better = None

    def __init__(self, num_classes):
        self.num_classes = num_classes
        self.reset()

    def reset(self):
        self.right, self.seen = 0, 0

    def update(self, probabilities, labels):
        assert probabilities.shape[1] == self.num_classes and bool((probabilities >= 0).all())
        self.right += int((probabilities.argmax(1) == labels).sum())
        self.seen += len(labels)

    def compute(self):
        return self.right / self.seen
"""
G = torch.Generator().manual_seed(0)


class Says(nn.Module):
    """Says what it was told, whatever its inputs are: minibatches count the examples."""

    def __init__(self, output):
        super().__init__()
        self.output, self.weight = output, nn.Parameter(torch.zeros(1))

    def forward(self, x):
        return self.output[x.long().flatten()]


@pytest.fixture
def own(tmp_path):
    (tmp_path / "mine.py").write_text(OWN)
    return lambda name: f"{tmp_path}/mine.py:{name}"


def objective_of(metric, task, output, y, classes, *, options=None, about=None, **values):
    loader = TensorLoader(torch.arange(len(y))[:, None].float(), y, 7)
    data = Data(loader, loader, loader, classes, (1,), "mine", task, about or {})
    values = {"name": "x.npz", "task": task, "metric": metric, "metric_options": options or {}, **values}
    return data_objective(parse(DataRecipe, values), data), Says(output), loader


CLASSES = torch.randn(60, 4, generator=G), torch.randint(4, (60,), generator=G)


@pytest.mark.parametrize(
    ("metric", "options", "expected"),
    [
        ("MulticlassF1Score", {}, "macro"),
        ("F1Score", {"average": "macro"}, "macro"),
        ("torchmetrics/F1Score", {"average": "weighted"}, "weighted"),
    ],
)
def test_of_classes(metric, options, expected):
    pytest.importorskip("torchmetrics")
    output, y = CLASSES
    task, net, loader = objective_of(metric, "classification", output, y, 4, options=options)
    found = task.measure(net, loader)
    assert found[metric] == pytest.approx(metrics.f1_score(y, output.argmax(1), average=expected), rel=1e-5)
    assert found["accuracy"] == pytest.approx(metrics.accuracy_score(y, output.argmax(1)))
    assert found["metric"] == {"name": metric, "higher_is_better": True} and task.headline == metric
    assert judge(task)(net, loader) == found[metric] and isinstance(task, Scored)


def test_of_probabilities():
    pytest.importorskip("torchmetrics")
    output, y = CLASSES
    task, net, loader = objective_of("AUROC", "classification", output, y, 4)
    expected = metrics.roc_auc_score(y, output.softmax(1), multi_class="ovr")
    assert task.value(net, loader) == pytest.approx(expected, rel=1e-5)


def test_of_pixels_those_that_count_are_judged():
    pytest.importorskip("torchmetrics")
    output, y = torch.randn(9, 3, 4, 4, generator=G), torch.randint(3, (9, 4, 4), generator=G)
    y[:, 0] = 255
    task, net, loader = objective_of("MulticlassJaccardIndex", "segmentation", output, y, 3, ignore_index=255)
    counts = y.flatten() != 255
    labels, predicted = y.flatten()[counts], output.argmax(1).flatten()[counts]
    expected = metrics.jaccard_score(labels, predicted, average="macro")
    found = task.measure(net, loader)
    assert found["MulticlassJaccardIndex"] == pytest.approx(expected, rel=1e-5)
    assert found["mean_iou"] == pytest.approx(expected, rel=1e-5)


def test_of_several_labels():
    pytest.importorskip("torchmetrics")
    # Logits between 0 and 1, which torchmetrics would take for probabilities.
    output, y = torch.rand(40, 3, generator=G), (torch.rand(40, 3, generator=G) > 0.5).float()
    task, net, loader = objective_of("F1Score", "multilabel", output, y, 3, options={"average": "macro"})
    expected = metrics.f1_score(y, output > 0, average="macro")
    assert task.value(net, loader) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("targets", [1, 2])
def test_of_numbers_in_their_units(targets, own):
    pytest.importorskip("torchmetrics")
    output, y = torch.randn(30, targets, generator=G), torch.randn(30, targets, generator=G)
    about = {"target_mean": [5.0, -2.0][:targets], "target_std": [3.0, 0.5][:targets]}
    task, net, loader = objective_of("MeanAbsoluteError", "regression", output, y, targets, about=about)
    error = (output - y).abs().numpy() * np.array(about["target_std"])
    found = task.measure(net, loader)
    assert found["MeanAbsoluteError"] == pytest.approx(error.mean(), rel=1e-5)
    # The less the better: networks are compared by what is below zero.
    assert judge(task)(net, loader) == -found["MeanAbsoluteError"]
    assert lost(task, {task.headline: 2.0}, {task.headline: 5.0}) == 3.0
    mine, net, loader = objective_of(own("error"), "regression", output, y, targets, about=about)
    assert mine.value(net, loader) == pytest.approx(error.max(), rel=1e-5) and not mine.higher_is_better


def test_a_function_and_a_class_of_one_s_own(own):
    output, y = CLASSES
    task, net, loader = objective_of(own("share_of_first"), "classification", output, y, 4, options={"of": 2})
    expected = ((output.argmax(1) == 2) == (y == 2)).double().mean()
    assert task.value(net, loader) == pytest.approx(float(expected), rel=1e-5)
    task, net, loader = objective_of(own("Counted"), "classification", output, y, 4)
    for _ in range(2):  # each time anew
        assert judge(task)(net, loader) == pytest.approx(metrics.accuracy_score(y, output.argmax(1)))
    assert judged(judge(task), net, loader) <= 1


def test_without_a_metric_the_task_is_as_it_was():
    output, y = CLASSES
    task, *_ = objective_of(None, "classification", output, y, 4)
    assert task.headline == "accuracy" and not isinstance(task, Scored)
    assert lost(task, {"accuracy": 0.9}, {"accuracy": 0.7}) == pytest.approx(0.2)


@pytest.mark.parametrize(
    ("name", "error", "sentence"),
    [
        ("large", NetworkError, "is 7.5, but networks are chosen by a number of at most 1"),
        ("several", NetworkError, r"gives .*, but should give one finite number"),
        ("none", NetworkError, "gives nan, but should give one finite number"),
        ("failing", NetworkError, r"fails on outputs \(.*\) and labels \(.*\) with ValueError: no such thing"),
        ("nothing", RecipeError, "Metric .* is not there: .* has no 'nothing'"),
    ],
)
def test_what_is_no_metric(name, error, sentence, own):
    with pytest.raises(error, match=sentence) as refused:
        task, net, loader = objective_of(own(name), "classification", *CLASSES, 4)
        judge(task)(net, loader)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("metric", "options", "sentence"),
    [
        ("F1Scor", {}, r"'data.metric' is 'F1Scor', which torchmetrics has not: did you mean '.*F1Score'"),
        ("qqqqqqqq", {}, "which torchmetrics has not: give one of its classes or module:function"),
        ("Metric", {}, "cannot be made with the options"),
        ("F1Score", {"avrage": "macro"}, r"cannot be made with the options .*: correct data.metric_options"),
        ("F1Score", {"average": "none"}, "gives .*, but should give one finite number"),
    ],
)
def test_what_torchmetrics_has_not(metric, options, sentence):
    pytest.importorskip("torchmetrics")
    with pytest.raises(SQSError, match=sentence) as refused:
        task, net, loader = objective_of(metric, "classification", *CLASSES, 4, options=options)
        judge(task)(net, loader)
    assert "\n" not in str(refused.value)


def test_options_go_with_a_metric():
    with pytest.raises(RecipeError, match="a section with a metric beside metric_options"):
        parse(DataRecipe, {"name": "digits", "metric_options": {"average": "macro"}})
