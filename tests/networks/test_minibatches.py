"""What a minibatch may look like, and what is read from it; how many examples an epoch yields."""

import collections
import dataclasses
import random
from typing import NamedTuple

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.utils.rnn import PackedSequence, pack_sequence
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    IterableDataset,
    RandomSampler,
    SubsetRandomSampler,
    TensorDataset,
    WeightedRandomSampler,
)

from sqs_pyro.errors import DataError
from sqs_pyro.evaluation.classification import evaluate
from sqs_pyro.networks.calling import call_arguments, move_to, tensors_in
from sqs_pyro.networks.loaders import check_training_loader, examples_an_epoch, undisturbed
from sqs_pyro.networks.minibatches import minibatches, split_minibatch

X, V, Y = torch.randn(4, 3), torch.randn(4, 2), torch.tensor([0, 1, 2, 0])


class One(nn.Module):
    def forward(self, x):
        return x


class Two(nn.Module):
    def forward(self, u, v):
        return u, v


class OneOrTwo(nn.Module):
    def forward(self, x, mask=None):
        return x


class Keywords(nn.Module):
    def forward(self, input_ids=None, attention_mask=None):
        return input_ids


class Pair(NamedTuple):
    x: torch.Tensor
    label: torch.Tensor


class LabelFirst(NamedTuple):
    y: torch.Tensor
    u: torch.Tensor
    v: torch.Tensor


@dataclasses.dataclass(frozen=True)
class Example:
    u: torch.Tensor
    v: torch.Tensor
    target: torch.Tensor


class Graph:
    def __init__(self, x, y=None):
        self.x, self.y = x, y

    def to(self, device):
        return Graph(self.x.to(device), self.y)


def called(net, batch):
    """Arguments and labels as a network and a likelihood get them, on a device."""
    inputs, y = split_minibatch(batch, net)
    return *call_arguments(move_to(inputs, torch.device("cpu")), net), y


def same(found, expected) -> bool:
    if isinstance(expected, torch.Tensor):
        return isinstance(found, torch.Tensor) and torch.equal(found, expected)
    if isinstance(expected, dict):
        return found.keys() == expected.keys() and all(same(found[key], expected[key]) for key in expected)
    if isinstance(expected, (tuple, list)):
        return type(found) is type(expected) and all(map(same, found, expected))
    return found is expected


FORMS = {
    "pair": (One(), (X, Y), (X,), {}),
    "list": (One(), [X, Y], (X,), {}),
    "two inputs": (Two(), ((X, V), Y), (X, V), {}),
    "two inputs as a list": (Two(), [[X, V], Y], (X, V), {}),
    "triple": (Two(), (X, V, Y), (X, V), {}),
    "triple as a list": (Two(), [X, V, Y], (X, V), {}),
    "keywords": (Two(), ({"v": V, "u": X}, Y), (), {"u": X, "v": V}),
    "labels by name": (Two(), {"v": V, "u": X, "labels": Y}, (), {"u": X, "v": V}),
    "labels of a data set": (Keywords(), {"input_ids": X, "label": Y}, (), {"input_ids": X}),
    "ordered": (Two(), collections.OrderedDict(u=X, v=V, y=Y), (), {"u": X, "v": V}),
    "named tuple": (One(), Pair(X, Y), (), {"x": X}),
    "named tuple, label first": (Two(), LabelFirst(Y, X, V), (), {"u": X, "v": V}),
    "dataclass": (Two(), Example(X, V, Y), (), {"u": X, "v": V}),
    "a mapping as it is": (One(), ({"a": X}, Y), ({"a": X},), {}),
    "a mapping in a tuple": (One(), (({"a": X},), Y), ({"a": X},), {}),
    "a list of tensors as it is": (One(), ([X, V], Y), ([X, V],), {}),
    "with None": (OneOrTwo(), ((X, None), Y), (X, None), {}),
    "arrays": (One(), (X.numpy(), Y.numpy()), (X,), {}),
    "arrays by name": (Two(), ({"u": X.numpy(), "v": V.numpy()}, Y.tolist()), (), {"u": X, "v": V}),
    "lists of numbers": (One(), (X.tolist(), Y.tolist()), (X,), {}),
    "labels one by one": (One(), (X, tuple(Y)), (X,), {}),
}


@pytest.mark.parametrize("form", FORMS)
def test_reading(form):
    net, batch, args, kwargs = FORMS[form]
    found_args, found_kwargs, y = called(net, batch)
    assert same(found_args, args) and same(found_kwargs, kwargs) and torch.equal(y, Y)


def test_sequences_of_several_lengths_and_objects_are_one_argument():
    packed, graph = pack_sequence([torch.randn(3, 2), torch.randn(1, 2)]), Graph(X, Y)
    (found,), _, _ = called(One(), (packed, Y))
    assert isinstance(found, PackedSequence) and tensors_in(found)[0] is found.data
    assert isinstance(called(One(), (Graph(X), Y))[0][0], Graph)
    (found,), _, y = called(One(), graph)
    assert isinstance(found, Graph) and torch.equal(y, Y) and torch.equal(tensors_in(found)[0], X)


@pytest.mark.parametrize(
    ("batch", "net"),
    [
        (X, One()),
        (None, One()),
        ("text", One()),
        ((X,), One()),
        ((X, Y, torch.rand(4)), One()),
        ((X, torch.tensor([3, 1, 2, 2]), Y), OneOrTwo()),  # lengths, or labels and indices
        ((X, None), One()),
        ((None, Y), One()),
        ((X, 3), One()),
        ((X, ["cat", "dog"]), One()),
        ((X, {"a": Y}), One()),
        ((X, torch.tensor(3)), One()),
        ({"u": X, "v": V}, Two()),
        ({"u": X, "v": V, "y": Y, "labels": Y}, Two()),
        ((X[:0], Y[:0]), One()),
        ((np.array([object()]), Y), One()),
        (Graph(X), One()),
    ],
)
def test_what_cannot_be_told_is_one_sentence(batch, net):
    with pytest.raises(DataError) as raised:
        list(minibatches([(X, Y), batch], net, "training"))
    assert str(raised.value).startswith("Training minibatch 2 ") and "\n" not in str(raised.value)


@pytest.mark.parametrize("kind", [KeyError, ValueError, IndexError, RuntimeError])
def test_errors_of_a_loader_name_the_minibatch_and_stay_the_cause(kind):
    mine = kind("file 7 is gone")

    def loader():
        yield X, Y
        raise mine

    with pytest.raises(
        DataError, match=r"validation data failed at minibatch 2 with \w+: '?file 7 is gone"
    ) as raised:
        list(minibatches(loader(), One(), "validation"))
    assert raised.value.__cause__ is mine


class TestCausalLanguageModels:
    class TinyForCausalLM(nn.Module):
        def forward(self, input_ids):
            return input_ids

    tokens = torch.tensor([[4, 5, 6, 7], [1, 2, 3, 3]])

    def labels(self, batch, net=None):
        return split_minibatch(batch, net or self.TinyForCausalLM())[1].tolist()

    def test_labels_that_repeat_the_tokens_are_moved_as_transformers_moves_them(self):
        moved = [[5, 6, 7, -100], [2, 3, 3, -100]]
        assert self.labels({"input_ids": self.tokens, "labels": self.tokens}) == moved
        assert self.labels((self.tokens, self.tokens)) == moved
        padded = self.tokens.clone()
        padded[1, 2:] = -100
        assert self.labels({"input_ids": self.tokens, "labels": padded}) == [
            [5, 6, 7, -100],
            [2, -100, -100, -100],
        ]

    def test_labels_that_were_moved_already_stay(self):
        moved = torch.cat([self.tokens[:, 1:], torch.tensor([[8], [9]])], 1)
        assert self.labels((self.tokens, moved)) == moved.tolist()
        assert self.labels({"input_ids": self.tokens, "labels": moved}) == moved.tolist()

    def test_other_networks_labels_stay(self):
        assert self.labels((self.tokens, self.tokens), One()) == self.tokens.tolist()


class TestContainersOnTheirWayToADevice:
    @pytest.mark.parametrize(
        "value",
        [
            (X, V),
            [X, [V]],
            Pair(X, Y),
            {"a": X, "b": {"c": V}},
            collections.OrderedDict(a=X),
            collections.defaultdict(list, a=X),
            Example(X, V, Y),
            collections.UserDict(a=X, b="text"),
        ],
    )
    def test_they_keep_their_type(self, value):
        moved = move_to(value, torch.device("meta"))
        assert type(moved) is type(value)
        inside = tensors_in(moved) or [moved.u]
        assert all(tensor.is_meta for tensor in inside) and not any(t.is_meta for t in tensors_in(value))


class Endless(IterableDataset):
    def __iter__(self):
        return iter([(X[0], Y[0])])


DATA = TensorDataset(torch.randn(33, 2), torch.zeros(33))


class TestHowMuchThereIs:
    @pytest.mark.parametrize(
        "options",
        [
            {},
            {"drop_last": True},
            {"shuffle": True},
            {"sampler": SubsetRandomSampler(range(12))},
            {"sampler": WeightedRandomSampler([1.0] * 33, 50)},
            {"sampler": RandomSampler(DATA, replacement=True, num_samples=7)},
            {
                "sampler": torch.utils.data.DistributedSampler(DATA, num_replicas=2, rank=0),
            },
        ],
        ids=["all", "drop_last", "shuffle", "subset", "weighted", "with replacement", "distributed"],
    )
    def test_is_what_an_epoch_yields(self, options):
        loader = DataLoader(DATA, 8, **options)
        assert examples_an_epoch(loader) == sum(len(y) for _, y in loader)

    def test_of_batch_samplers_and_of_sequences(self):
        pairs = DataLoader(DATA, batch_sampler=[[0, 1], [4, 5, 6]])
        assert examples_an_epoch(pairs) == 5
        assert examples_an_epoch(DataLoader(DATA, batch_sampler=BatchSampler(range(10), 4, True))) == 8
        assert examples_an_epoch([(X, Y), (X, Y)]) == 8

    def test_of_minibatches_that_are_not_as_large_as_data_set_and_sampler_say(self):
        class Ready(torch.utils.data.Dataset):
            """Minibatches of 8, ready-made."""

            def __len__(self):
                return 5

            def __getitem__(self, i):
                return DATA[8 * i : 8 * i + 8]

        class Stream(IterableDataset):
            def __len__(self):
                return 5

            def __iter__(self):
                return iter([DATA[8 * i : 8 * i + 8] for i in range(5)])

        class Mine:
            dataset = range(3300)  # frames, of which a minibatch takes some

            def __len__(self):
                return 5

            def __iter__(self):
                return iter(DataLoader(DATA, 8))

        def twice(rows):
            x, y = torch.utils.data.default_collate(rows)
            return torch.cat([x, x.flip(1)]), torch.cat([y, y])

        for loader in (DataLoader(Ready(), batch_size=None), DataLoader(Stream(), batch_size=None), Mine()):
            assert examples_an_epoch(loader) == 33
        assert examples_an_epoch(DataLoader(Ready(), batch_size=None, shuffle=True)) == 33
        assert examples_an_epoch(DataLoader(DATA, 8, collate_fn=twice)) == 66

    @pytest.mark.parametrize(
        "loader", [DataLoader(Endless(), 2), iter([]), [(X, Y)], DataLoader(DATA, 40, drop_last=True)]
    )
    def test_without_a_length_or_empty(self, loader):
        with pytest.raises(DataError, match=r"no length|must say how much|is empty"):
            check_training_loader(loader)


def test_looking_changes_nothing():
    generator = torch.Generator().manual_seed(3)
    own = DataLoader(DATA, 8, shuffle=True, generator=generator)
    for loader in (own, DataLoader(DATA, 8, shuffle=True)):
        torch.manual_seed(1)
        state = generator.get_state()
        expected = [x for x, _ in loader]
        generator.set_state(state)
        torch.manual_seed(1)
        with undisturbed(loader):
            next(iter(loader))
            random.random(), torch.rand(2)
        assert all(torch.equal(a, b) for a, (b, _) in zip(expected, loader, strict=True))


@pytest.mark.slow  # importing transformers takes seconds
def test_a_causal_language_model_is_trained_on_transformers_own_loss():
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2, vocab_size=11
    )
    net = transformers.LlamaForCausalLM(config).eval()
    tokens = torch.randint(11, (3, 11))  # as many tokens as the vocabulary has
    labels = tokens.clone()
    labels[1, 7:] = -100
    batch = transformers.BatchEncoding(
        {"input_ids": tokens, "attention_mask": torch.ones_like(tokens), "labels": labels}
    )
    expected = net(**batch).loss.detach()
    found = evaluate(net, [batch])
    assert found.num_examples == int((labels[:, 1:] != -100).sum())
    assert found.nll == pytest.approx(float(expected), rel=1e-5)
