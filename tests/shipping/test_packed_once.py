"""A weight is packed once for each layout that is tried, and what is not compressed is rounded once."""

import copy
import pickle
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from sqs_pyro import compress, compress_transformer, load, save, size_report
from sqs_pyro.compression.blockwise import one_block
from sqs_pyro.compression.finetune.recipe import CompressionRecipe
from sqs_pyro.inference.guides.spike_gmm import SpikeGMMGuide
from sqs_pyro.kernels.weight import PackedWeight
from sqs_pyro.packing import CodedTensor, contents, layouts, leftovers
from sqs_pyro.runs.measured import check_compressible
from sqs_pyro.testing.layouts import random_coded


class Calls:
    """Counts calls, those of layouts with the weights they are of: one that training has changed is another."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.patch = patch
        self.clear()
        for name in layouts.layout_names():
            kind = type(layouts.get_layout(name))
            self._watch(kind, "pack_again", lambda _, coded, *__, name=name: self._pack(name, coded))
        self._watch(layouts, "canonical", lambda *_: self._count("canonical"))
        self._watch(PackedWeight, "__init__", lambda *_: self._count("weights"))
        for module in (leftovers, contents, one_block):
            self._watch(module, "round_to", lambda *_: self._count("rounded"))

    def clear(self) -> None:
        self.packed: Counter[tuple[str, tuple[int, ...], int]] = Counter()
        self.canonical = self.weights = self.rounded = 0

    def layouts(self) -> Counter[str]:
        found: Counter[str] = Counter()
        for (layout, _, _), times in self.packed.items():
            found[layout] += times
        return found

    def _watch(self, owner: Any, attribute: str, tell: Callable[..., None]) -> None:
        original = getattr(owner, attribute)

        def watched(*args, **kwargs):
            tell(*args)
            return original(*args, **kwargs)

        self.patch.setattr(owner, attribute, watched)

    def _count(self, what: str) -> None:
        setattr(self, what, getattr(self, what) + 1)

    def _pack(self, layout: str, coded: CodedTensor) -> None:
        content = hash((coded.codes.numpy().tobytes(), coded.mask.numpy().tobytes()))
        self.packed[layout, coded.shape, content] += 1


@pytest.fixture
def calls(monkeypatch):
    return Calls(monkeypatch)


SITES = 2


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 24), nn.ReLU(), nn.Linear(24, 3))


def data():
    random = torch.Generator().manual_seed(0)
    x = torch.randn(64, 8, generator=random)
    dataset = torch.utils.data.TensorDataset(x, (x[:, :3]).argmax(1))
    return torch.utils.data.DataLoader(dataset, 16)


RECIPE = {"epochs": 2, "num_components": 4, "nonzero_rate": 0.5, "pruning": {"every": 1}}


def test_compress_save_size_and_load(calls, tmp_path):
    result = compress(network(), data(), RECIPE)
    assert set(calls.packed.values()) == {1}
    # the rehearsal's layout; then the one whose size only packing tells, and the smallest if it is another
    tried = calls.layouts()
    assert tried["entropy"] == SITES and tried["bitmap"] + tried["dense"] <= 2 * SITES
    assert calls.canonical == 2 * SITES  # in the rehearsal and at the end
    assert calls.weights == 2 * SITES
    assert calls.rounded == 2 * SITES  # biases

    calls.clear()
    report = size_report(result.network)
    assert not calls.packed and not calls.canonical and not calls.rounded

    save(result.network, tmp_path / "net")
    assert set(calls.packed.values()) == {1}
    assert calls.layouts() == Counter(row.layout for row in report.tensors)
    assert not calls.canonical and not calls.rounded and not calls.weights
    assert size_report(tmp_path / "net") == report

    calls.clear()
    loaded = load(tmp_path / "net", network())
    assert not calls.packed and not calls.canonical and not calls.rounded
    assert calls.weights == SITES
    assert torch.equal(loaded(torch.ones(2, 8)), result.network(torch.ones(2, 8)))


@pytest.mark.parametrize("nonzero_rate", [0.02, 0.5, 1.0])
@pytest.mark.parametrize("components", [1, 3, 4, 256])
def test_a_layout_whose_size_is_known_is_only_tried_if_it_is_the_smallest(calls, components, nonzero_rate):
    coded = random_coded((64, 50), components, nonzero_rate=nonzero_rate)
    packed = layouts.pack_tensor(coded)
    assert set(calls.layouts()) == {"entropy", "adaptive", packed.layout} and set(calls.packed.values()) == {1}
    each = []
    for layout in layouts.layout_names():
        if layouts.get_layout(layout).automatic and not (
            layout == "dense" and components == 256 and nonzero_rate < 1
        ):
            each.append(layouts.pack_tensor(coded, layout))
    assert packed.num_bytes == min(other.num_bytes for other in each)
    assert packed.layout == min(each, key=lambda other: other.num_bytes).layout


def test_a_target_size_builds_no_network_to_count_bytes(calls):
    recipe = {**RECIPE, "target_ratio": 1.3, "epochs": 3, "layout": "entropy"}
    result = compress(network(), data(), recipe)
    assert calls.weights == 2 * SITES  # in the rehearsal and at the end
    assert set(calls.packed.values()) == {1}
    assert size_report(result.network).ratio > 1


def test_blocks_of_a_transformer(calls, tmp_path):
    tiny_transformers = pytest.importorskip("kits.tiny_transformers")
    net = tiny_transformers.tiny("llama")
    words = torch.randint(3, tiny_transformers.VOCABULARY, (4, 12), generator=torch.Generator().manual_seed(0))
    result = compress_transformer(net, words, {"bits": 3.0, "settle_steps": 2, "allocation": "even"})
    rows = size_report(result.network).tensors
    assert set(calls.packed.values()) == {1}
    assert calls.layouts()["entropy"] == len(rows) == calls.canonical == calls.weights
    assert calls.rounded == len(list(net.parameters())) - len(rows)  # each that is not compressed

    calls.clear()
    save(result.network, tmp_path / "net")
    assert set(calls.packed.values()) == {1}
    assert calls.layouts() == Counter(row.layout for row in rows)


def test_what_was_changed_is_packed_anew(calls, tmp_path):
    """What a packed network remembers of its packing does not outlive its codes."""
    result = compress(network(), data(), RECIPE)
    state = {name: value.clone() for name, value in result.network.state_dict().items()}
    before = size_report(result.network)
    weight = result.network[0].packed_weight
    with torch.no_grad():
        weight.table.view(torch.float32).mul_(2)
    expected = 2 * result.hard[0].weight.detach()
    save(result.network, tmp_path / "net")
    assert torch.equal(load(tmp_path / "net", network())[0].weight, expected)
    assert torch.equal(weight.coded().dense(), expected)
    result.network.load_state_dict(state)
    assert size_report(result.network) == before
    assert calls.canonical


def test_a_network_is_checked_without_a_guide(monkeypatch):
    def refuse(*_, **__):
        raise AssertionError("a guide was built to check a network")

    monkeypatch.setattr(SpikeGMMGuide, "__init__", refuse)
    check_compressible(network(), CompressionRecipe(num_components=4))


def test_packing_of_a_copy_is_its_own(tmp_path):
    result = compress(network(), data(), RECIPE)
    save(result.network, tmp_path / "net")
    for other in (copy.deepcopy(result.network), pickle.loads(pickle.dumps(result.network))):
        save(other, tmp_path / "other")
        assert (tmp_path / "other").read_bytes() == (tmp_path / "net").read_bytes()
        assert size_report(other) == size_report(result.network)
