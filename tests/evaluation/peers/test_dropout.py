"""Monte Carlo dropout against masks that are drawn by hand, and in its limits."""

import pytest
import torch
from torch import nn

from sqs_pyro.errors import ArgumentError, NetworkError
from sqs_pyro.evaluation.classification import predict
from sqs_pyro.evaluation.peers.dropout import MCDropout


def network(p: float = 0.5) -> nn.Sequential:
    return nn.Sequential(nn.BatchNorm1d(6), nn.Dropout(p), nn.Linear(6, 3))


def test_the_mean_over_masks_is_the_networks_and_the_variance_that_of_bernoulli():
    """Before the softmax, where the network is linear in the mask ``m / (1 - p)``."""
    net, x = network(0.3).eval().requires_grad_(False), torch.randn(4, 6)
    each, w = MCDropout(net, 2_000).each(x), net[2].weight
    variance = (w**2 @ net[0](x).square().T).T * 0.3 / 0.7
    error = (variance / 2_000).sqrt()
    assert float(((each.mean(0) - net(x)) / error).abs().max()) < 5
    torch.testing.assert_close(each.var(0), variance, rtol=0.25, atol=0)


def test_probabilities_are_averaged_and_nothing_else_is_in_training():
    net, x = network(), torch.randn(5, 6)
    dropout = MCDropout(net, 7)
    torch.manual_seed(3)
    found = dropout(x).exp()
    torch.manual_seed(3)
    torch.testing.assert_close(found, dropout.each(x).softmax(-1).mean(0))
    assert not net[0].num_batches_tracked
    assert all(module.training for module in (dropout, *net.modules()))


def test_evaluation_leaves_dropout_on_and_repeats():
    loader = [(torch.randn(20, 6), torch.randint(3, (20,)))]
    dropout = MCDropout(network(), 5)
    first, second = predict(dropout, loader)[0], predict(dropout, loader)[0]
    assert torch.equal(first, second)
    assert not torch.allclose(first, predict(dropout.net, loader)[0])


def test_what_cannot_be():
    with pytest.raises(NetworkError, match="Sequential has no dropout that could be left on"):
        MCDropout(network(0.0))
    with pytest.raises(ArgumentError, match="num_samples is 0"):
        MCDropout(network(), 0)
