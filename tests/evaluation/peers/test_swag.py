"""SWAG's moments against numpy, its draws against the covariance they are said to have."""

import numpy as np
import pytest
import torch
from torch import nn

from sqs_pyro.errors import ArgumentError, DataError, DivergenceError
from sqs_pyro.evaluation.classification import evaluate
from sqs_pyro.evaluation.peers.swag import WeightMoments, swag
from sqs_pyro.models.likelihoods import Gaussian


def seen(count: int = 7) -> tuple[np.ndarray, WeightMoments]:
    moments, weights = WeightMoments(rank=4), torch.randn(count, 6) @ torch.randn(6, 6) + 3
    for row in weights:
        moments.update([("a", row[:2]), ("b", row[2:].reshape(2, 2))])
    return weights.double().numpy(), moments


def test_moments_are_numpys():
    weights, moments = seen()
    mean = torch.cat([moments.mean["a"], moments.mean["b"].flatten()])
    variance = torch.cat([moments.variance["a"], moments.variance["b"].flatten()])
    np.testing.assert_allclose(mean, weights.mean(0), rtol=1e-5)
    np.testing.assert_allclose(variance, weights.var(0), rtol=1e-4)
    assert len(moments.deviations) == 4
    for i, column in zip(range(3, 7), moments.deviations, strict=True):
        found = torch.cat([column["a"], column["b"].flatten()])
        np.testing.assert_allclose(found, weights[i] - weights[: i + 1].mean(0), atol=1e-5)


def test_small_variances_of_large_weights_are_kept():
    moments, steps = WeightMoments(rank=2), torch.tensor([0.0, 1.0, 2.0, 3.0]) * 1e-3
    for step in steps:
        moments.update([("a", 10 + step)])
    assert float(moments.variance["a"]) == pytest.approx(float(steps.double().var(correction=0)), rel=0.02)


def test_draws_have_half_of_each_covariance():
    weights, moments = seen()
    columns = np.stack([weights[i] - weights[: i + 1].mean(0) for i in range(3, 7)], 1)
    covariance = (np.diag(weights.var(0)) + columns @ columns.T / 3) / 2
    draws = [moments.draw() for _ in range(8_000)]
    flat = np.stack([torch.cat([draw["a"], draw["b"].flatten()]).numpy() for draw in draws])
    scale = np.sqrt(np.diag(covariance))
    assert (abs(flat.mean(0) - weights.mean(0)) / scale).max() < 5 / np.sqrt(8_000)
    # A correlation's standard error is at most 1/√n, a variance's √(2/n) of itself: 0.016, of which 0.08 is five.
    np.testing.assert_allclose((np.cov(flat.T) - covariance) / np.outer(scale, scale), 0, atol=0.08)


def data(n: int = 120):
    y = torch.randint(3, (n,))
    x = torch.eye(3)[y] * 2 + torch.randn(n, 3)
    return list(zip(x.split(30), y.split(30), strict=True))


def test_a_network_goes_on_and_is_averaged():
    net, loader = nn.Sequential(nn.Linear(3, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 3)), data()
    before = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    average = swag(net, loader, 5, epochs=8, learning_rate=0.1)
    assert average.num_draws == 5 and {"1.running_mean", "3.bias"} <= set(average.draws())
    assert evaluate(average, loader).nll < evaluate(net, loader).nll
    assert all(torch.equal(tensor, before[name]) for name, tensor in net.state_dict().items())
    again = swag(net, loader, 5, epochs=8, learning_rate=0.1)
    assert torch.equal(again.draws()["0.weight"], average.draws()["0.weight"])


def test_steps_between_weights():
    """Gradients of a mean that is met: the weights stay, and so do all draws."""
    net = nn.Linear(2, 1, bias=False)
    x = torch.randn(40, 2)
    loader = [(x, net(x).detach())]
    average = swag(net, loader, 3, likelihood=Gaussian(0.5), epochs=4, every=2)
    torch.testing.assert_close(average.draws()["weight"], net.weight.detach().expand(3, 1, 2))


def test_what_cannot_be():
    net, loader = nn.Linear(3, 3), data()
    with pytest.raises(ArgumentError, match="1 sets of weights were seen, but a spread needs at least two"):
        swag(net, loader, epochs=1)
    with pytest.raises(ArgumentError, match="rank is 1, but must be at least 2"):
        swag(net, loader, rank=1)
    with pytest.raises(ArgumentError, match="every is -1"):
        swag(net, loader, every=-1)
    with pytest.raises(ArgumentError, match="learning_rate is 0"):
        swag(net, loader, learning_rate=0)
    with pytest.raises(DataError, match="ends after one pass"):
        swag(net, iter(loader))
    with pytest.raises(DivergenceError, match="not finite: lower learning_rate"):
        swag(net, [(1e3 * x, y) for x, y in loader], epochs=3, learning_rate=1e38)
    with pytest.raises(DivergenceError, match="not finite: lower learning_rate"):
        swag(net, [(1e3 * x, y) for x, y in loader[:1]], epochs=2, learning_rate=1e38)
