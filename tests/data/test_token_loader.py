"""Minibatches of sequences of different lengths: padding, masks, order."""

import pytest
import torch

from sqs_pyro.data.token_loader import TokenDataset, TokenLoader
from sqs_pyro.errors import DataError

LENGTHS = [3, 1, 4, 1, 5, 2, 6]


@pytest.fixture
def dataset():
    inputs = [
        {"input_ids": torch.full((n,), i + 10), "token_type_ids": torch.ones(n, dtype=torch.int64)}
        for i, n in enumerate(LENGTHS)
    ]
    return TokenDataset(inputs, torch.arange(len(LENGTHS)), source="here")


def test_padding_stands_on_the_right_and_under_the_mask(dataset):
    seen = []
    for x, y in TokenLoader(dataset, 3, pad_token=7):
        assert set(x) == {"input_ids", "token_type_ids", "attention_mask"}
        lengths = [LENGTHS[i] for i in y.tolist()]
        assert x["input_ids"].shape == (len(y), max(lengths))
        assert x["attention_mask"].sum(1).tolist() == lengths
        for i, n, row in zip(y.tolist(), lengths, x["input_ids"], strict=True):
            assert row.tolist() == [i + 10] * n + [7] * (max(lengths) - n)
        assert torch.equal(x["token_type_ids"], x["attention_mask"])
        seen += y.tolist()
    assert seen == list(range(7))


def test_every_epoch_has_its_own_order_which_follows_from_seed_and_epoch(dataset):
    def order(loader):
        return torch.cat([y for _, y in loader]).tolist()

    loader = TokenLoader(dataset, 2, 0, shuffle=True, seed=3)
    first, second = order(loader), order(loader)
    assert len(loader) == 3 and len(first) == 6 and first != second
    again = TokenLoader(dataset, 2, 0, shuffle=True, seed=3)
    again.epoch = 1
    assert order(again) == second
    assert order(TokenLoader(dataset, 2, 0, shuffle=True, seed=4)) != first
    assert len(loader.dataset) == 7 and loader.dataset.source == "here"


def test_what_is_wrong(dataset):
    with pytest.raises(DataError, match="There is no example"):
        TokenDataset([], torch.empty(0))
    with pytest.raises(DataError, match="A batch size of 8 does not fit 7 examples: give a number from 1 to 7"):
        TokenLoader(dataset, 8, 0, shuffle=True)
    assert len(TokenLoader(dataset, 8, 0)) == 1
    with pytest.raises(
        DataError, match="Tokens run from 10 to 16, but the network knows 0 to 15: use the tokenizer"
    ):
        TokenLoader(dataset, 2, 0, vocab_size=16)
