"""Packed ensembles: the average of the members run one by one, one file, honest size, strict loading."""

import copy
import pickle
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import pytest
import torch
from torch import nn

from sqs_pyro.errors import NetworkError, PackedFileError
from sqs_pyro.evaluation.averaging import AveragedNetwork
from sqs_pyro.kernels import PackedEnsemble, dense_state, load, packed_ensemble, packed_network, save
from sqs_pyro.packing import CodedTensor, layout_names, read_packed, size_report
from sqs_pyro.testing.layouts import random_coded

S = 3


class Small(nn.Module):
    """A convolution, a norm, attention, and an embedding that is the head as well."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv1d(2, 8, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm1d(8)
        self.drop = nn.Dropout(0.5)
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.words = nn.Embedding(5, 8)
        self.head = nn.Linear(8, 5)
        self.head.weight = self.words.weight

    def forward(self, x, words):
        seen = self.drop(self.norm(self.conv(x))).mean(-1)
        read = self.words(words) + seen[:, None]
        return self.head(self.attention(read, read, read)[0].mean(1))


INPUTS = torch.randn(6, 2, 9), torch.randint(0, 5, (6, 4))
NAMES = ("conv.weight", "attention.in_proj_weight", "words.weight")


@pytest.fixture
def net():
    net = Small()
    net.norm.running_mean.normal_()
    net.norm.running_var.uniform_(0.5, 2)
    return net


@pytest.fixture
def draws(net):
    """Draws with one codebook a parameter and other codes and masks each."""
    shapes = {name: tuple(net.get_parameter(name).shape) for name in NAMES}
    books = {name: random_coded(shape, 4).codebook * 40 for name, shape in shapes.items()}
    drawn = []
    for seed in range(S):
        coded = {name: random_coded(shape, 4, seed=seed) for name, shape in shapes.items()}
        drawn.append({name: CodedTensor(value.codes, value.mask, books[name]) for name, value in coded.items()})
    return drawn


def average(net, draws, *inputs):
    """Each draw as a plain network, and the mean of their probabilities."""
    p = 0.0
    for draw in draws:
        plain = copy.deepcopy(net).eval()
        with torch.no_grad():
            for name, value in draw.items():
                plain.get_parameter(name).copy_(value.dense())
        p = p + plain(*inputs).double().softmax(-1) / len(draws)
    return p


@pytest.mark.parametrize("layout", ["auto", *layout_names()])
def test_packed_and_loaded_are_the_average_of_the_draws(net, draws, layout, tmp_path):
    packed = packed_ensemble(net, draws, layout=layout, leftover_dtype="float32")
    torch.testing.assert_close(packed(*INPUTS).exp().double(), average(net, draws, *INPUTS), atol=1e-6, rtol=1e-5)
    save(packed, tmp_path / "draws")
    for again in (load(tmp_path / "draws", net), load(tmp_path / "draws", Small)):
        assert isinstance(again, PackedEnsemble) and not again.training
        assert torch.equal(again(*INPUTS), packed(*INPUTS))
    save(again, tmp_path / "again")
    assert (tmp_path / "again").read_bytes() == (tmp_path / "draws").read_bytes()


def test_vectorised_draws_agree(net, draws):
    packed = packed_ensemble(net, draws)
    one_by_one = packed(*INPUTS)
    packed.draws_at_once = 2
    torch.testing.assert_close(packed(*INPUTS), one_by_one)


def test_size_is_the_files(net, draws, tmp_path):
    packed = packed_ensemble(net, draws)
    save(packed, tmp_path / "draws")
    report = size_report(tmp_path / "draws")
    assert report == size_report(packed)
    assert report.total == (tmp_path / "draws").stat().st_size
    assert report.draws == S and report.paper_ratio is None
    single = size_report(packed_network(net, draws[0]))
    assert (report.num_weights, report.fp32_bytes) == (single.num_weights, single.fp32_bytes)
    rates = [torch.cat([value.mask.flatten() for value in draw.values()]).float().mean() for draw in draws]
    assert report.nonzero_rate == pytest.approx(float(sum(rates)) / S)
    assert report.uncompressed == single.uncompressed  # norms and biases are there once


def test_layout_for_draws_is_taken_where_they_agree(net, draws):
    alike = packed_ensemble(net, [draws[0]] * 10)
    layouts = [row.layout for row in size_report(alike).tensors]
    assert "conditional" in layouts and set(layouts) <= {"conditional", "adaptive"}
    assert size_report(alike).total < 1.3 * size_report(packed_network(net, draws[0])).total


def test_shared_parameters_stay_shared(net, draws):
    packed = packed_ensemble(net, draws)
    assert packed.network.words.packed_weight is packed.network.head.packed_weight
    assert sum("packed_weight.codes" in name for name, _ in packed.named_buffers()) == 2


def test_casting_and_evaluation_mode(net, draws):
    packed = packed_ensemble(net, draws).double().train()
    assert not packed.network.drop.training
    x = packed(INPUTS[0].double(), INPUTS[1])
    torch.testing.assert_close(x, packed_ensemble(net, draws)(*INPUTS), atol=1e-4, rtol=1e-4)


def test_what_cannot_be_packed(net, draws):
    with pytest.raises(NetworkError, match="The 0 draws to pack must be at least one"):
        packed_ensemble(net, [])
    with pytest.raises(NetworkError, match="The 2 draws to pack must be at least one, and all of the same param"):
        packed_ensemble(net, [draws[0], {"conv.weight": draws[1]["conv.weight"]}])
    other = {name: CodedTensor(v.codes, v.mask, v.codebook + 1) for name, v in draws[1].items()}
    with pytest.raises(NetworkError, match="must have one shape and one codebook"):
        packed_ensemble(net, [draws[0], other])
    with pytest.raises(NetworkError, match="leftover_dtype is 'int8'"):
        packed_ensemble(net, draws, leftover_dtype="int8")
    with pytest.raises(NetworkError, match="LSTM keeps or rewrites its weights by itself"):
        packed_ensemble(nn.LSTM(4, 3), [{"weight_hh_l0": random_coded((12, 3), 3)}])


def test_an_ensemble_is_no_checkpoint(net, draws):
    with pytest.raises(NetworkError, match="ensemble of 3 draws is no single checkpoint"):
        dense_state(packed_ensemble(net, draws))


def test_files_for_another_network(net, draws, tmp_path):
    save(packed_ensemble(net, draws), tmp_path / "draws")
    with pytest.raises(PackedFileError, match=r"no parameter 'conv\.weight'"):
        load(tmp_path / "draws", nn.Linear(3, 3))
    wide = Small()
    wide.conv = nn.Conv1d(2, 16, 3)
    with pytest.raises(PackedFileError, match=r"'conv.weight' has shape \[16, 2, 3\] .* its 3 draws"):
        load(tmp_path / "draws", wide)
    assert read_packed(tmp_path / "draws").draws == S


class TestThreads:
    """Draws are not written into the network that all calls share."""

    @pytest.mark.parametrize("at_once", [1, 2])
    def test_every_answer_is_right(self, net, draws, at_once):
        packed = packed_ensemble(net, draws)
        packed.draws_at_once = at_once
        inputs = [(x[None], words[None]) for x, words in zip(*INPUTS, strict=True)]
        expected = [packed(*each) for each in inputs]
        state, done = {name: value.clone() for name, value in packed.state_dict().items()}, threading.Event()

        def load_again():
            while not done.is_set():
                packed.load_state_dict(state)

        def answer(i):
            return torch.equal(packed(*inputs[i % 6]), expected[i % 6])

        with ThreadPoolExecutor(5) as pool, switching_often():
            loading = pool.submit(load_again)
            try:
                assert all(pool.map(answer, range(80)))
            finally:
                done.set()
            loading.result()

    def test_average_of_drawn_networks(self, net, draws):
        dense = [{name: value.dense() for name, value in draw.items()} for draw in draws]
        average = AveragedNetwork(net, dense)
        expected = average(*INPUTS)
        with ThreadPoolExecutor(4) as pool, switching_often():
            assert all(pool.map(lambda _: torch.equal(average(*INPUTS), expected), range(40)))


@contextmanager
def switching_often():
    """Python's threads change places between any two lines."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        yield
    finally:
        sys.setswitchinterval(before)


@pytest.mark.parametrize("again", [copy.deepcopy, lambda packed: pickle.loads(pickle.dumps(packed))])
def test_copies_are_independent(net, draws, again):
    packed = packed_ensemble(net, draws)
    expected = packed(*INPUTS)
    other = again(packed)
    assert torch.equal(other(*INPUTS), expected)
    assert other.network.words.packed_weight is other.network.head.packed_weight
    with torch.no_grad():
        packed.network.head.bias.add_(torch.arange(5.0))
    assert torch.equal(other(*INPUTS), expected)


@pytest.mark.slow
def test_graphs(net, draws):
    packed = packed_ensemble(net, draws)
    expected = packed(*INPUTS)
    compiled = torch.compile(packed, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(*INPUTS), expected)
    torch.testing.assert_close(torch.export.export(packed, INPUTS).module()(*INPUTS), expected)


def test_its_network_is_no_network_of_its_own(net, draws):
    packed = packed_ensemble(net, draws)
    with pytest.raises(NetworkError, match=r"'weight' of a Conv1d differs from draw to draw .* call the average"):
        packed.network(*INPUTS)
