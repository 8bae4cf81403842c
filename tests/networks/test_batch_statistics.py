"""Statistics of a draw's batch norms: those that torch would have kept of the minibatch, network untouched."""

import copy

import pytest
import torch
from torch import nn

from sqs_pyro.networks.batch_statistics import statistics_of


@pytest.mark.parametrize("momentum", [0.1, 0.5, None])
def test_they_are_those_of_the_minibatch(momentum):
    net = nn.Sequential(
        nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4, momentum=momentum), nn.ReLU(), nn.Dropout(0.5), nn.Conv2d(4, 3, 1),
        nn.BatchNorm2d(3, momentum=momentum),
    )  # fmt: skip
    x, weight = torch.randn(16, 2, 5, 5), torch.randn(4, 2, 3, 3)
    before = copy.deepcopy(net.state_dict())
    found = statistics_of(net, {"0.weight": weight}, x)
    hidden = nn.functional.conv2d(x, weight, net[0].bias)
    torch.testing.assert_close(found["1.running_mean"], hidden.mean((0, 2, 3)))
    torch.testing.assert_close(found["1.running_var"], hidden.var((0, 2, 3)))
    normed = nn.functional.batch_norm(hidden, None, None, net[1].weight, net[1].bias, training=True)
    second = net[4](normed.relu())  # nothing is dropped out
    torch.testing.assert_close(found["5.running_mean"], second.mean((0, 2, 3)))
    assert net.training and all(torch.equal(value, before[name]) for name, value in net.state_dict().items())


def test_statistics_that_never_change_are_kept():
    net = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4, momentum=0.0), nn.BatchNorm1d(4))
    assert set(statistics_of(net, {}, torch.randn(8, 3))) == {
        "2.running_mean", "2.running_var", "2.num_batches_tracked"
    }  # fmt: skip


def test_a_network_without_batch_norm_has_none():
    assert statistics_of(nn.Linear(3, 2), {}, torch.randn(4, 3)) == {}
