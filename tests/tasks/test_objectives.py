"""What is learned: figures against scikit-learn and by hand, losses, and outputs that do not fit."""

import numpy as np
import pytest
import torch
from sklearn import metrics
from torch import nn
from torch.nn import functional as F

from sqs_pyro.data import Data
from sqs_pyro.data.tensor_loader import TensorLoader
from sqs_pyro.errors import NetworkError
from sqs_pyro.tasks.objectives import average_precision, mean_iou, objective

G = torch.Generator().manual_seed(0)


def data(task, classes, y, x=None, **about):
    loader = TensorLoader(torch.zeros(len(y), 1) if x is None else x, y, 7)
    return Data(loader, loader, loader, classes, (1,), "mine", task, about)


class Says(nn.Module):
    """Says what it was told, whatever its inputs are: minibatches count the examples."""

    def __init__(self, output):
        super().__init__()
        self.output, self.weight = output, nn.Parameter(torch.zeros(1))

    def forward(self, x):
        return self.output[x.long().flatten()]


def measured(task, output, y, classes, ignore_index=-100, **about):
    of = data(task, classes, y, torch.arange(len(y))[:, None].float(), **about)
    judged = objective(of, ignore_index)
    return judged, judged.measure(Says(output), of.test)


def test_numbers_are_judged_in_their_own_units():
    y, output = torch.randn(40, 2, generator=G), torch.randn(40, 2, generator=G)
    judged, found = measured("regression", output, y, 2, target_std=[10.0, 0.1])
    scale = np.array([10.0, 0.1])
    assert judged.headline == "r2" and found["num_examples"] == 40
    assert found["r2"] == pytest.approx(metrics.r2_score(y, output), rel=1e-6)
    error = (output - y).numpy() * scale
    assert found["rmse"] == pytest.approx(np.sqrt((error**2).mean()), rel=1e-5)
    assert found["mae"] == pytest.approx(np.abs(error).mean(), rel=1e-5)
    assert judged.loss(output, y) == pytest.approx(float(F.mse_loss(output, y)))
    assert judged.likelihood(output).batch_shape == (40,)


def test_one_number_may_come_without_a_dimension():
    y, output = torch.randn(20, 1, generator=G), torch.randn(20, generator=G)
    judged, found = measured("regression", output, y, 1)
    assert found["r2"] == pytest.approx(metrics.r2_score(y[:, 0], output), rel=1e-6)
    assert judged.loss(output, y) == pytest.approx(float((output - y[:, 0]).square().mean()))
    judged.check(output[:2], data("regression", 1, y))


def test_labels_are_judged_by_average_precision():
    y, output = (torch.rand(50, 4, generator=G) < 0.3).float(), torch.randn(50, 4, generator=G)
    y[:, 2] = 0  # a label that does not occur says nothing
    judged, found = measured("multilabel", output, y, 4)
    each = [metrics.average_precision_score(y[:, i], output[:, i]) for i in (0, 1, 3)]
    assert found[judged.headline] == pytest.approx(np.mean(each)) == pytest.approx(average_precision(output, y))
    assert found["accuracy"] == pytest.approx(((output > 0) == (y > 0)).float().mean().item())
    assert found["nll"] == pytest.approx(
        float(F.binary_cross_entropy_with_logits(output, y, reduction="none").sum(1).mean()), rel=1e-6
    )
    assert judged.loss(output, y) == pytest.approx(found["nll"], rel=1e-6)


@pytest.mark.parametrize("last", [False, True])
def test_pixels_are_judged_by_intersection_over_union(last):
    y = torch.randint(3, (12, 4, 5), generator=G)
    y[:, 0] = 255
    output = torch.randn(12, 3, 4, 5, generator=G)
    judged, found = measured("segmentation", output.movedim(1, -1) if last else output, y, 3, 255)
    known = y != 255
    expected = metrics.jaccard_score(y[known], output.argmax(1)[known], average="macro")
    assert found["mean_iou"] == pytest.approx(expected) and found["num_examples"] == int(known.sum())
    loss = F.cross_entropy(output, y, ignore_index=255)
    assert judged.loss(output.movedim(1, -1) if last else output, y) == pytest.approx(float(loss), rel=1e-5)
    assert found["nll"] == pytest.approx(float(loss), rel=1e-5)


def test_classes_that_are_never_met_nor_predicted_do_not_count():
    assert mean_iou(torch.tensor([0, 0, 1]), torch.tensor([0, 1, 1]), 5) == pytest.approx((1 / 2 + 1 / 2) / 2)


@pytest.mark.parametrize(
    ("task", "classes", "output", "sentence"),
    [
        ("classification", 3, torch.zeros(2, 4), r"outputs of shape \(4,\), but the data has 3 classes"),
        ("regression", 2, torch.zeros(2, 1), r"outputs of shape \(1,\), but the data has 2 numbers to learn"),
        ("regression", 2, torch.zeros(2), r"outputs of shape \(\), but the data has 2 numbers"),
        ("multilabel", 2, torch.zeros(2, 3), r"the data has 2 labels"),
        ("segmentation", 3, torch.zeros(2, 3), "3 classes for each pixel or token"),
        ("segmentation", 3, torch.zeros(2, 2, 4, 4), "3 classes for each pixel or token"),
    ],
)
def test_outputs_that_do_not_fit(task, classes, output, sentence):
    of = data(task, classes, torch.zeros(2, 1))
    with pytest.raises(NetworkError, match=sentence):
        objective(of).check(output, of)


@pytest.mark.parametrize(
    ("task", "classes", "shape"),
    [
        ("classification", 3, (2, 3)),
        ("regression", 2, (2, 2)),
        ("segmentation", 3, (2, 3, 4, 4)),
        ("segmentation", 3, (2, 9, 3)),
    ],
)
def test_outputs_that_fit(task, classes, shape):
    of = data(task, classes, torch.zeros(2, 1))
    objective(of).check(torch.zeros(shape), of)
