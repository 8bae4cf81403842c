"""Laplace's approximation of a linear model with normal noise is its posterior, exactly."""

import sys

import pytest
import torch
from torch import nn

from sqs_pyro.errors import ArgumentError, MissingPackageError, NetworkError
from sqs_pyro.evaluation.peers.laplace import laplace
from sqs_pyro.models.likelihoods import Gaussian


@pytest.fixture
def available():
    pytest.importorskip("laplace", reason="laplace-torch is in the extra `peers`", exc_type=ImportError)


def linear_model() -> tuple[nn.Module, list, torch.Tensor, torch.Tensor]:
    """A network, data, and the posterior's mean and covariance under noise 0.5 and a prior of precision 2."""
    x = torch.randn(80, 3)
    y = x @ torch.tensor([[0.5], [-1.0], [0.2]]) + 0.5 * torch.randn(80, 1)
    precision = x.T @ x / 0.25 + 2 * torch.eye(3)
    mean = torch.linalg.solve(precision, x.T @ y / 0.25)[:, 0]
    net = nn.Sequential(nn.Identity(), nn.Linear(3, 1, bias=False))
    net[1].weight.data = mean[None].clone()
    return net, list(zip(x.split(40), y.split(40), strict=True)), mean, precision.inverse()


@pytest.mark.usefixtures("available")
@pytest.mark.parametrize("weights", ["last_layer", "all"])
@pytest.mark.parametrize("structure", ["full", "kron", "diag"])
def test_the_exact_posterior(weights, structure):
    net, loader, mean, covariance = linear_model()
    options = {"likelihood": Gaussian(0.5), "weights": weights, "structure": structure, "prior_precision": 2.0}
    average = laplace(net, loader, 20_000, **options)
    if structure == "diag":
        covariance = covariance.inverse().diagonal().reciprocal().diag()
    (drawn,) = average.draws().values()
    drawn, scale = drawn[:, 0], covariance.diagonal().sqrt()
    assert float(((drawn.mean(0) - mean) / scale).abs().max()) < 5 / 20_000**0.5
    correlation = drawn.T.cov() / scale.outer(scale)
    torch.testing.assert_close(correlation, covariance / scale.outer(scale), atol=0.05, rtol=0)


@pytest.mark.usefixtures("available")
def test_the_last_layer_of_a_classifier():
    y = torch.randint(3, (60,))
    x = 2 * torch.eye(3)[y] + torch.randn(60, 3)
    net = nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 3))
    before = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    average = laplace(net, [(x, y)], 5)
    assert set(average.draws()) == {"2.weight", "2.bias"} and average(x).shape == (60, 3)
    assert all(torch.equal(tensor, before[name]) for name, tensor in net.state_dict().items()) and net.training
    assert torch.equal(laplace(net, [(x, y)], 5).draws()["2.bias"], average.draws()["2.bias"])
    with pytest.raises(NetworkError, match=r"is a Bernoulli.*give 'categorical', 'gaussian'"):
        laplace(net, [(x, y)], likelihood="bernoulli")


def test_without_the_package(monkeypatch):
    monkeypatch.setitem(sys.modules, "laplace", None)
    with pytest.raises(MissingPackageError, match=r"'laplace'.*pip install 'sqs-pyro\[peers\]'"):
        laplace(nn.Linear(3, 3), [])
    with pytest.raises(ArgumentError, match="num_samples is 0"):
        laplace(nn.Linear(3, 3), [], 0)
