"""Pyro's AutoNormal on a linear model, whose mean-field optimum is known in closed form."""

import pyro.distributions as dist
import pytest
import torch
from torch import nn

from sqs_pyro.errors import ArgumentError
from sqs_pyro.evaluation.classification import evaluate
from sqs_pyro.evaluation.peers.auto_normal import auto_normal
from sqs_pyro.models.likelihoods import Gaussian


@pytest.mark.slow
def test_the_mean_field_optimum_of_a_linear_model():
    """Precision ``XᵀX / σ² + 1``; the mean is the posterior's, variances are one over the precision's diagonal."""
    x = torch.randn(60, 3) @ torch.tensor([[1.0, 0.4, 0.0], [0.0, 1.0, 0.3], [0.0, 0.0, 1.0]])
    y = x @ torch.tensor([[0.5], [-1.0], [0.2]]) + 0.5 * torch.randn(60, 1)
    precision = x.T @ x / 0.25 + torch.eye(3)
    mean = torch.linalg.solve(precision, x.T @ y / 0.25)[:, 0]
    net = nn.Linear(3, 1, bias=False)
    net.weight.data = mean[None] + 0.1
    options = {"prior": dist.Normal(0.0, 1.0), "likelihood": Gaussian(0.5), "initial_scale": 0.05}
    average = auto_normal(net, [(x, y)], 4000, epochs=1000, learning_rate=3e-3, **options)
    weights = average.draws()["weight"][:, 0]
    scale = precision.diagonal().rsqrt()
    # The optimiser goes on moving by some tenths of a standard deviation.
    assert float(((weights.mean(0) - mean) / scale).abs().max()) < 0.5
    torch.testing.assert_close(weights.std(0), scale, rtol=0.2, atol=0)


def test_a_classifier_with_all_parameters_random():
    y = torch.randint(3, (90,))
    x = 2 * torch.eye(3)[y] + torch.randn(90, 3)
    loader = list(zip(x.split(30), y.split(30), strict=True))
    net = nn.Sequential(nn.Linear(3, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 3))
    before = net[0].weight.detach().clone()
    average = auto_normal(net, loader, 6, epochs=15, learning_rate=0.03)
    assert set(average.draws()) == {name for name, _ in net.named_parameters()} and average.num_draws == 6
    assert evaluate(average, loader).nll < evaluate(net, loader).nll
    assert torch.equal(net[0].weight, before) and net[0].weight.requires_grad
    weights_alone = auto_normal(net, loader, 2, include=r"\.weight$", epochs=1)
    assert set(weights_alone.draws()) == {"0.weight", "1.weight", "3.weight"}


def test_what_cannot_be():
    with pytest.raises(ArgumentError, match="epochs is 0"):
        auto_normal(nn.Linear(3, 3), [], epochs=0)
