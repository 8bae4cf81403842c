"""Minibatches of every form that networks take."""

import pytest
import torch

from sqs_pyro.networks.calling import split_examples, tensors_in

X, Y = torch.arange(14).view(7, 2), torch.arange(7)


@pytest.mark.parametrize("inputs", [X, (X, Y), (X, "as it is", Y), {"a": X, "b": Y, "flag": True}])
@pytest.mark.parametrize("size", [1, 3, 7, 20])
def test_parts_are_the_whole(inputs, size):
    parts = list(split_examples(inputs, size))
    assert [len(tensors_in(part)[0]) for part in parts] == [min(size, 7 - i) for i in range(0, 7, size)]
    for k, whole in enumerate(tensors_in(inputs)):
        assert torch.equal(torch.cat([tensors_in(part)[k] for part in parts]), whole)
    if not isinstance(inputs, torch.Tensor):
        assert all(len(part) == len(inputs) for part in parts)
