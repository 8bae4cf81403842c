"""Perplexity against a token-by-token reference, and where it is known in closed form."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from sqs_pyro.errors import DataError, NetworkError
from sqs_pyro.evaluation.perplexity import PerplexityResult, _minibatches, perplexity
from sqs_pyro.kernels import packed_network
from sqs_pyro.packing import CodedTensor


def llama() -> nn.Module:
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        max_position_embeddings=32,
    )  # fmt: skip
    torch.manual_seed(0)
    net = transformers.LlamaForCausalLM(config)
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.mul_(5)  # so that far tokens matter too
    return net


class Bigram(nn.Module):
    """Logits of the next token given this one, ``[V, V]``; no argument but ``input_ids``, no configuration."""

    def __init__(self, logits: torch.Tensor) -> None:
        super().__init__()
        self.logits = nn.Parameter(logits)
        self.calls: list[tuple[int, ...]] = []

    def forward(self, input_ids):
        assert not self.training
        self.calls.append(tuple(input_ids.shape))
        return self.logits[input_ids]


@torch.no_grad()
def slow_nlls(net: nn.Module, stream: list[int], window: int, stride: int) -> list[float]:
    """Token by token: its context begins where the window does that is the first to foretell it."""
    found = []
    for position in range(1, len(stream)):
        start = 0
        while start + window < position:  # the window's last prediction is of the token `start + window`
            start += stride
        logits = net(input_ids=torch.tensor([stream[start:position]])).logits[0, -1]
        found.append(-float(logits.double().log_softmax(-1)[stream[position]]))
    return found


@pytest.mark.parametrize(
    ("window", "stride"),
    [(8, 3), (8, 8), (8, 1), (5, 2), (1, 1), (24, 7), (25, 25), (31, 4), (32, 16)],
)
@pytest.mark.parametrize("batch_size", [1, 3])
def test_against_token_by_token(window, stride, batch_size):
    net = llama().eval()
    streams = torch.randint(64, (2, 26))
    expected = [nll for row in streams.tolist() for nll in slow_nlls(net, row, window, stride)]
    found = perplexity(net, streams, window=window, stride=stride, batch_size=batch_size)
    assert found.tokens == len(expected) == 50
    assert found.nll == pytest.approx(sum(expected) / 50, rel=1e-5)
    assert found.perplexity == pytest.approx(math.exp(found.nll), rel=1e-12)
    assert (found.window, found.stride) == (min(window, 25), min(stride, window, 25))


def test_context_matters_in_this_test():
    """Or the comparison above could not tell one window from another."""
    net, stream = llama(), torch.randint(64, (26,))
    nlls = {
        round(perplexity(net, stream, window=w, stride=s).nll, 4) for w, s in ((25, 25), (8, 8), (8, 3), (1, 1))
    }
    assert len(nlls) == 4


@given(st.integers(1, 40), st.integers(1, 12), st.integers(1, 12), st.integers(1, 4), st.integers(1, 5))
def test_every_token_but_the_first_is_scored_once(predictions, window, stride, rows, batch_size):
    window, stride = max(window, stride), min(window, stride)
    streams = torch.arange(rows * (predictions + 1)).view(rows, -1)
    scored = []
    for inputs, targets in _minibatches(streams, min(window, predictions), min(stride, predictions), batch_size):
        assert len(inputs) <= batch_size and inputs.shape[1] <= window
        assert torch.equal(inputs[:, -targets.shape[1] :] + 1, targets)
        assert (inputs.diff(dim=1) == 1).all()
        scored += targets.flatten().tolist()
    assert sorted(scored) == streams[:, 1:].flatten().tolist()


def test_uniform_logits_give_the_size_of_the_vocabulary():
    found = perplexity(Bigram(torch.full((50, 50), 3.0)), torch.randint(50, (3, 700)))
    assert found.perplexity == pytest.approx(50, rel=1e-6)
    assert found == PerplexityResult(found.perplexity, found.nll, 3 * 699, 512, 256)


def test_a_bigram_needs_no_context():
    """One logit table: any window gives the mean over all pairs."""
    logits, stream = torch.randn(9, 9), torch.randint(9, (1000,))
    expected = -float(logits.double().log_softmax(-1)[stream[:-1], stream[1:]].mean())
    for window, stride in ((1000, 1000), (512, 256), (7, 3)):
        found = perplexity(Bigram(logits), stream, window=window, stride=stride, batch_size=8)
        assert found.nll == pytest.approx(expected, rel=1e-6)


def test_calls():
    net = Bigram(torch.zeros(9, 9))
    perplexity(net, torch.zeros(3, 12, dtype=torch.int32), window=5, stride=2, batch_size=2)
    assert net.calls == [(2, 5), (1, 5)] + [(2, 5)] * 4 + [(1, 5)]  # a first window of 3 rows, 3 later ones
    net.calls.clear()
    perplexity(net, torch.zeros(12, dtype=torch.int64), window=5, stride=4, batch_size=2)
    assert net.calls == [(1, 5), (1, 5), (1, 3)]
    assert net.training


def test_impossible_and_nearly_impossible_tokens():
    impossible = torch.zeros(2, 2)
    impossible[0, 1] = -math.inf
    found = perplexity(Bigram(impossible), torch.tensor([0, 1]))
    assert found.nll == found.perplexity == math.inf
    unlikely = perplexity(Bigram(impossible.clamp(min=-1e4)), torch.tensor([0, 1]))
    assert unlikely.nll == pytest.approx(1e4) and unlikely.perplexity == math.inf


def test_half_precision_logits_are_summed_in_full():
    logits, stream = torch.randn(30, 30).half(), torch.randint(30, (500,))
    expected = -float(logits.double().log_softmax(-1)[stream[:-1], stream[1:]].mean())
    assert perplexity(Bigram(logits), stream).nll == pytest.approx(expected, rel=1e-6)


def test_only_scored_logits_are_made():
    net, kept = llama(), []
    net.lm_head.register_forward_pre_hook(lambda module, args: kept.append(args[0].shape[1]))
    perplexity(net, torch.randint(64, (26,)), window=8, stride=3)
    assert kept == [8, 3, 3, 3, 3, 3, 2]


def test_packed_network():
    """What a packed network gives is what its dense weights give."""
    net = llama().eval()
    coded = {}
    for name, parameter in net.named_parameters():
        if name.endswith("proj.weight"):
            codes = (parameter > 0).to(torch.uint8)
            codebook = torch.tensor([[-0.1, 0.1]])
            coded[name] = CodedTensor(codes, torch.ones_like(codes, dtype=torch.bool), codebook)
    packed = packed_network(net, coded, leftover_dtype="float32")
    with torch.no_grad():
        for name, value in coded.items():
            net.get_parameter(name).copy_(value.dense())
    stream = torch.randint(64, (26,))
    expected = perplexity(net, stream, window=8, stride=4)
    assert perplexity(packed, stream, window=8, stride=4).nll == pytest.approx(expected.nll, rel=1e-5)


class TestSaysWhatIsWrong:
    @pytest.mark.parametrize(
        ("sequences", "sentence"),
        [
            (torch.zeros(3, 1, dtype=torch.long), r"shape \[3, 1\] were given, but perplexity needs \[n, T\]"),
            (torch.zeros(0, 5, dtype=torch.long), r"shape \[0, 5\]"),
            (torch.zeros(1, 2, 3, dtype=torch.long), r"shape \[1, 2, 3\]"),
            (torch.zeros(0, dtype=torch.long), r"shape \[1, 0\]"),
            (torch.zeros(2, 3), "Tokens must be integers, but are torch.float32"),
            (torch.tensor([[0, 64]]), "Tokens run from 0 to 64, but the network knows 0 to 63: use the tokenizer"),
            (torch.tensor([[-1, 3]]), "Tokens run from -1 to 3"),
        ],
    )
    def test_sequences(self, sequences, sentence):
        with pytest.raises(DataError, match=sentence):
            perplexity(llama(), sequences)

    @pytest.mark.parametrize(("window", "stride"), [(4, 5), (4, 0), (0, 0)])
    def test_strides(self, window, stride):
        with pytest.raises(
            DataError, match=f"window={window}, stride={stride} and batch_size=1 .*at most the window"
        ):
            perplexity(llama(), torch.zeros(9, dtype=torch.long), window=window, stride=stride)

    def test_window_longer_than_the_network_takes(self):
        stream = torch.zeros(90, dtype=torch.long)
        with pytest.raises(DataError, match=r"window of 64 tokens .* LlamaForCausalLM takes at most 32"):
            perplexity(llama(), stream, window=64, stride=8)
        assert perplexity(llama(), stream[:33], window=64, stride=8).window == 32

    def test_networks(self):
        with pytest.raises(NetworkError, match="Bigram gives logits that are NaN"):
            perplexity(Bigram(torch.full((2, 2), math.nan)), torch.tensor([0, 1]))
        with pytest.raises(
            NetworkError, match=r"Bigram gives logits of the shape \[1, 3\] for .* \[1, 3\], but must"
        ):
            perplexity(Bigram(torch.zeros(5)), torch.tensor([0, 1, 2, 3]))
        with pytest.raises(DataError, match="Tokens run from 7 to 7, but the network knows 0 to 4"):
            perplexity(Bigram(torch.zeros(9, 5)), torch.tensor([0, 7]))
