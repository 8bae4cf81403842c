"""Sequences of tokens as minibatches of a causal language model."""

import pytest
import torch

from sqs_pyro.data.next_token_loader import NextTokenLoader
from sqs_pyro.errors import DataError


def test_each_token_foretells_the_next():
    sequences = torch.arange(35).view(5, 7)
    batches = list(NextTokenLoader(sequences, 2))
    assert [len(y) for _, y in batches] == [2, 2, 1]
    for x, y in batches:
        assert x.keys() == {"input_ids"}
        assert torch.equal(x["input_ids"] + 1, y)
    assert torch.equal(torch.cat([x["input_ids"] for x, _ in batches]), sequences[:, :-1])


def test_an_epoch_is_the_same_when_it_is_asked_for_again():
    sequences = torch.arange(80).view(40, 2)
    loader = NextTokenLoader(sequences, 8, shuffle=True, seed=3)
    first, second = (torch.cat([y for _, y in loader]) for _ in range(2))
    assert not torch.equal(first, second)
    assert torch.equal(first.sort(0).values, second.sort(0).values)
    loader.epoch = 1
    assert torch.equal(torch.cat([y for _, y in loader]), second)
    assert not torch.equal(torch.cat([y for _, y in NextTokenLoader(sequences, 8, shuffle=True, seed=4)]), first)


@pytest.mark.parametrize("shape", [(0, 4), (3, 1), (4,)])
def test_sequences_that_foretell_nothing(shape):
    with pytest.raises(DataError, match="T of 2 or more"):
        NextTokenLoader(torch.zeros(shape, dtype=torch.int64), 2)


def test_an_impossible_batch_size():
    with pytest.raises(DataError, match="at least 1 sequence"):
        NextTokenLoader(torch.zeros(3, 4, dtype=torch.int64), 0)
