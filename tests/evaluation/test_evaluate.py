"""Evaluation against scikit-learn, torchmetrics and a calibration error written anew in numpy."""

import copy

import numpy as np
import pytest
import scipy.stats
import torch
from hypothesis import given
from hypothesis import strategies as st
from sklearn.metrics import accuracy_score, log_loss
from torch import nn

from sqs_pyro.errors import DataError
from sqs_pyro.evaluation.averaging import evaluate_averaged
from sqs_pyro.evaluation.classification import evaluate, expected_calibration_error, largest_difference
from sqs_pyro.inference.guides.spike_gmm import SpikeGMMGuide
from sqs_pyro.models import BayesianNetwork


def batches(n: int = 230, classes: int = 4, size: int = 50):
    x, y = torch.randn(n, 6), torch.randint(classes, (n,))
    return list(zip(x.split(size), y.split(size), strict=True))


def mlp(classes: int = 4) -> nn.Sequential:
    net = nn.Sequential(nn.Linear(6, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Dropout(0.5), nn.Linear(16, classes))
    with torch.no_grad():
        net[4].weight.mul_(5)
        net[1].running_mean.normal_()
        net[1].running_var.uniform_(0.5, 2)
    return net


def calibration_error(p: np.ndarray, y: np.ndarray, bins: int = 15) -> float:
    """Guo et al. 2017, equation 5, bin by bin as the paper writes it."""
    confidence, right = p.max(1), p.argmax(1) == y
    total = 0.0
    for m in range(1, bins + 1):
        inside = (confidence > (m - 1) / bins) & (confidence <= m / bins)
        if inside.any():
            total += inside.sum() / len(y) * abs(right[inside].mean() - confidence[inside].mean())
    return float(total)


@pytest.mark.parametrize("classes", [2, 4, 10])
def test_against_scikit_learn(classes):
    net, loader = mlp(classes), batches(classes=classes)
    found = evaluate(net, loader)
    x, y = (torch.cat(part) for part in zip(*loader, strict=True))
    p = net.eval()(x).softmax(1).double().detach().numpy()
    one_hot = np.eye(classes)[y.numpy()]
    assert found.num_examples == 230
    assert found.accuracy == pytest.approx(accuracy_score(y, p.argmax(1)))
    assert found.nll == pytest.approx(log_loss(y, p / p.sum(1, keepdims=True), labels=range(classes)), rel=1e-5)
    assert found.brier == pytest.approx(((p - one_hot) ** 2).sum(1).mean(), rel=1e-5)
    assert found.entropy == pytest.approx(scipy.stats.entropy(p, axis=1).mean(), rel=1e-5)
    assert found.ece == pytest.approx(calibration_error(p, y.numpy()), abs=1e-6)


@given(st.integers(0, 10_000), st.integers(1, 60), st.integers(2, 6), st.floats(0.1, 20))
def test_calibration_error(seed, n, classes, sharpness):
    rng = np.random.default_rng(seed)
    logits = rng.normal(size=(n, classes)) * sharpness
    p = np.exp(logits - logits.max(1, keepdims=True))
    p /= p.sum(1, keepdims=True)
    y = rng.integers(classes, size=n)
    found = expected_calibration_error(torch.from_numpy(p), torch.from_numpy(y))
    assert found == pytest.approx(calibration_error(p, y), abs=1e-9)


@pytest.mark.slow  # importing torchmetrics takes seconds
def test_calibration_error_against_torchmetrics():
    metrics = pytest.importorskip("torchmetrics.functional.classification")
    p, y = (3 * torch.randn(500, 5)).softmax(1), torch.randint(5, (500,))
    expected = metrics.multiclass_calibration_error(p, y, num_classes=5, n_bins=15)
    assert expected_calibration_error(p, y) == pytest.approx(float(expected), abs=1e-5)


def test_limits_of_calibration():
    y = torch.randint(3, (100,))
    certain = torch.nn.functional.one_hot(y, 3).double()
    assert expected_calibration_error(certain, y) == 0
    assert expected_calibration_error(certain, (y + 1) % 3) == 1
    uniform = torch.full((99, 3), 1 / 3)
    assert expected_calibration_error(uniform, torch.arange(99) % 3) == pytest.approx(0, abs=1e-6)


def test_leaves_the_mode_and_statistics_as_they_were():
    for training in (True, False):
        net = mlp().train(training)
        before = net[1].running_mean.clone()
        evaluate(net, batches())
        assert net.training == net[3].training == training
        assert torch.equal(net[1].running_mean, before)


def test_minibatch_sizes_do_not_matter():
    net, loader = mlp(), batches()
    x, y = (torch.cat(part) for part in zip(*loader, strict=True))
    one, many = evaluate(net, [(x, y)]), evaluate(net, loader)
    assert one.accuracy == many.accuracy
    assert (one.nll, one.ece, one.brier) == pytest.approx((many.nll, many.ece, many.brier), rel=1e-5)


def test_labels_of_other_integer_types():
    net, loader = mlp(), batches()
    assert evaluate(net, [(x, y.to(torch.int32)) for x, y in loader]) == evaluate(net, loader)


def test_largest_difference_between_two_networks():
    net = mlp()
    shifted = copy.deepcopy(net)
    with torch.no_grad():
        shifted[4].bias[2] -= 0.75  # one logit of every example
    assert largest_difference(net, net, batches()) == 0
    assert largest_difference(net, shifted, batches()) == pytest.approx(0.75, rel=1e-5)
    assert net.training and shifted.training


def test_mapping_inputs():
    class Keywords(nn.Linear):
        def forward(self, *, features):
            return {"logits": super().forward(features)}

    net = Keywords(6, 4)
    loader = batches()
    plain = nn.Linear(6, 4)
    plain.load_state_dict(net.state_dict())
    assert evaluate(net, [({"features": x}, y) for x, y in loader]) == evaluate(plain, loader)


@pytest.mark.parametrize("evaluation", ["evaluate", "evaluate_averaged"])
class TestErrors:
    def run(self, evaluation, loader):
        if evaluation == "evaluate":
            return evaluate(mlp(), loader)
        model = BayesianNetwork(mlp(), num_data=10)
        return evaluate_averaged(
            model, SpikeGMMGuide(model, 3, estimator="straight_through"), loader, num_samples=2
        )

    def test_no_example(self, evaluation):
        with pytest.raises(DataError, match="no example to evaluate on: the loader is empty"):
            self.run(evaluation, [])

    @pytest.mark.parametrize(("labels", "range_"), [([0, 4], "from 0 to 4"), ([-1, 2], "from -1 to 2")])
    def test_labels_out_of_range(self, evaluation, labels, range_):
        loader = [(torch.randn(2, 6), torch.tensor(labels))]
        with pytest.raises(
            DataError, match=rf"Labels run {range_}, but the network has 4 classes \(labels 0 to 3\)"
        ):
            self.run(evaluation, loader)
