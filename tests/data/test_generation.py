"""Sequences that a network says, against chains whose law is known and against its own probabilities."""

import types

import pytest
import scipy.stats
import torch
from torch import nn

from sqs_pyro.data import generate_calibration
from sqs_pyro.errors import DataError, NetworkError
from sqs_pyro.testing.statistics import FAILURE_RATE

transformers = pytest.importorskip("transformers")


def llama(**more) -> nn.Module:
    config = transformers.LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        max_position_embeddings=32, **more,
    )  # fmt: skip
    torch.manual_seed(0)
    net = transformers.LlamaForCausalLM(config)
    with torch.no_grad():
        net.lm_head.weight.mul_(20)  # sure enough of itself that a wrong token shows
    return net


class Chain(nn.Module):
    """A Markov chain that calls itself a language model; ``tokens`` in its cache is all that it has seen."""

    def __init__(self, probabilities: torch.Tensor) -> None:
        super().__init__()
        self.logits = nn.Parameter(probabilities.log())
        self.seen: list[list[int]] = []

    def forward(self, input_ids, past_key_values=None, use_cache=None):
        assert use_cache and input_ids.shape[1] == 1 and not self.training
        tokens = input_ids if past_key_values is None else torch.cat([past_key_values, input_ids], 1)
        return types.SimpleNamespace(logits=self.logits[input_ids], past_key_values=tokens)


def test_every_token_follows_the_networks_law():
    """Each transition's frequencies against its row, by a chi-squared test."""
    law = torch.tensor([[0.7, 0.2, 0.1, 0.0], [0.1, 0.1, 0.8, 0.0], [0.3, 0.3, 0.3, 0.1], [0.0, 0.5, 0.5, 0.0]])
    tokens = generate_calibration(Chain(law), 4, count=400, length=21, seed=1)
    counts = torch.zeros(4, 4)
    counts.index_put_((tokens[:, :-1].flatten(), tokens[:, 1:].flatten()), torch.tensor(1.0), accumulate=True)
    for row, p in zip(counts, law, strict=True):
        assert row[p == 0].sum() == 0
        expected = p[p > 0] / p.sum() * row.sum()
        assert scipy.stats.chisquare(row[p > 0], expected).pvalue > FAILURE_RATE
    first = tokens[:, 0].bincount(minlength=4)
    assert scipy.stats.chisquare(first).pvalue > FAILURE_RATE


def test_temperature():
    law = torch.tensor([[0.8, 0.2], [0.8, 0.2]])
    share = {
        t: float((generate_calibration(Chain(law), 2, 200, 26, seed=0, temperature=t)[:, 1:] == 0).float().mean())
        for t in (0.05, 0.5, 1.0, 100.0)
    }
    for t, found in share.items():
        expected = float((law[0].log() / t).softmax(0)[0])
        assert found == pytest.approx(expected, abs=0.03)


def test_the_cache_changes_nothing():
    """Every token again, by a whole forward pass of all before it and the cumulated probabilities."""
    net = llama().eval()
    tokens = generate_calibration(net, 64, count=3, length=12, seed=5)
    generator = torch.Generator().manual_seed(5)
    assert torch.equal(tokens[:, :1], torch.randint(64, (3, 1), generator=generator))
    u = torch.rand(3, 11, generator=generator, dtype=torch.float64)
    with torch.no_grad():
        cumulated = net(input_ids=tokens).logits[:, :-1].double().softmax(-1).cumsum(-1)
    below = cumulated.gather(-1, (tokens[:, 1:, None] - 1).clamp(min=0)).squeeze(-1) * (tokens[:, 1:] > 0)
    above = cumulated.gather(-1, tokens[:, 1:, None]).squeeze(-1)
    assert (u > below - 1e-5).all() and (u < above + 1e-5).all()


def test_deterministic_for_a_seed_whatever_the_minibatch():
    net = llama()
    state = torch.get_rng_state()
    first = generate_calibration(net, 64, 5, 9, seed=0)
    assert first.shape == (5, 9) and first.dtype == torch.int64
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(generate_calibration(net, 64, 5, 9, seed=0, batch_size=2), first)
    assert not torch.equal(generate_calibration(net, 64, 5, 9, seed=1), first)
    assert net.training


def test_the_tokenizer_says_what_may_be_drawn():
    class Tokenizer:
        all_special_ids = (0, 1)

        def __len__(self):
            return 40

    tokens = generate_calibration(llama(), Tokenizer(), 200, 3)
    assert tokens[:, 0].min() >= 2 and tokens.max() < 40
    assert set(tokens[:, 0].tolist()) == set(range(2, 40))


def test_one_token_is_no_call_of_the_network():
    assert generate_calibration(llama(), 64, 2, 1).shape == (2, 1)


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ({"length": 33}, "Sequences of 33 tokens .* LlamaForCausalLM takes at most 32: give a smaller length"),
        ({"count": 0}, "count=0, length=4 and batch_size=16 .* at least 1"),
        ({"temperature": 0.0}, "temperature=0.0 was given, but it must be positive"),
        ({"tokenizer_or_vocab": 65}, "65 tokens may be drawn, but the network knows 64"),
        ({"tokenizer_or_vocab": 0}, "A vocabulary of 0 tokens"),
    ],
)
def test_impossible_wishes(arguments, sentence):
    with pytest.raises(DataError, match=sentence):
        generate_calibration(llama(), **{"tokenizer_or_vocab": 64, "count": 2, "length": 4, **arguments})


def test_networks_that_cannot():
    with pytest.raises(NetworkError, match="Linear has no key-value cache: give a causal language model"):
        generate_calibration(nn.Linear(2, 2), 2, 2, 2)
    with pytest.raises(NetworkError, match="logits are NaN or infinite"):
        generate_calibration(Chain(torch.full((2, 2), float("nan"))), 2, 2, 2)
