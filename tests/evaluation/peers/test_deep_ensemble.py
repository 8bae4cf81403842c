"""A deep ensemble is its members, one by one."""

import copy

import pytest
import torch
from torch import nn

from sqs_pyro.errors import ArgumentError, NetworkError
from sqs_pyro.evaluation.peers.ensemble import deep_ensemble


def train(number: int, width: int = 8) -> nn.Module:
    torch.manual_seed(number)
    net = nn.Sequential(nn.Linear(5, width), nn.BatchNorm1d(width), nn.ReLU(), nn.Linear(width, 3))
    net(3 * torch.randn(100, 5))  # statistics of its own
    return net


def test_members_and_their_average():
    ensemble, x = deep_ensemble(train, 3), torch.randn(7, 5)
    members = [copy.deepcopy(train(number)).eval()(x) for number in range(3)]
    torch.testing.assert_close(ensemble.each(x), torch.stack(members))
    torch.testing.assert_close(ensemble(x).exp(), sum(member.softmax(-1) for member in members) / 3)


def test_one_module_may_be_trained_again_and_again():
    net = train(0)

    def again(number):
        net.load_state_dict(train(number).state_dict())
        return net

    x = torch.randn(7, 5)
    torch.testing.assert_close(deep_ensemble(again, 3).each(x), deep_ensemble(train, 3).each(x))


def test_members_are_of_one_architecture():
    with pytest.raises(NetworkError, match="shape"):
        deep_ensemble(lambda number: train(number, 8 + number), 2)
    with pytest.raises(NetworkError, match="Members 0 and 2 of the ensemble are the same network"):
        deep_ensemble(lambda number: train(number % 2), 3)
    with pytest.raises(ArgumentError, match="num_samples is 0"):
        deep_ensemble(train, 0)
