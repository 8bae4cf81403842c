"""Packed networks as a whole: to the file and back, shared tensors, honest size, compilers."""

import copy
import math

import pytest
import torch
from torch import nn

from sqs_pyro.errors import NetworkError, PackedFileError
from sqs_pyro.kernels import dense_state, load, packed_network, save
from sqs_pyro.networks.registry import build_network, register_network
from sqs_pyro.packing import (
    CodedTensor,
    PackedContents,
    PackedTensor,
    layout_names,
    pack_tensor,
    size_report,
    write_packed,
)
from sqs_pyro.testing.layouts import random_coded


@register_network("test_tower")
class Tower(nn.Module):
    """Convolution, norms, attention and an embedding that is also the head."""

    def __init__(self, width: int = 16, words: int = 11):
        super().__init__()
        self.conv = nn.Conv2d(3, width, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(width)
        self.words = nn.Embedding(words, width)
        self.attention = nn.MultiheadAttention(width, 2, batch_first=True)
        self.head = nn.Linear(width, words)
        self.head.weight = self.words.weight
        self.register_buffer("positions", torch.arange(7.0))
        self.register_buffer("unsaved", torch.ones(3), persistent=False)

    def forward(self, image, words):
        seen = self.norm(self.conv(image)).mean((2, 3))
        read = self.words(words) + seen[:, None]
        return self.head(self.attention(read, read, read)[0])


INPUTS = torch.randn(5, 3, 8, 8), torch.randint(0, 11, (5, 4))


def tower(**options):
    net = build_network("test_tower", **options)
    net.norm.running_mean.normal_()
    net.norm.running_var.uniform_(0.5, 2)
    return net.eval()


def code_all(net, components=5):
    return {
        name: random_coded(tuple(p.shape), components, seed=seed)
        for seed, (name, p) in enumerate(net.named_parameters())
        if p.dim() > 1
    }


def with_weights(net, coded):
    """The plain network with the decoded weights."""
    plain = copy.deepcopy(net).eval()
    with torch.no_grad():
        for name, value in coded.items():
            plain.get_parameter(name).copy_(value.dense())
    return plain


@pytest.mark.parametrize("layout", ["auto", *layout_names()])
def test_plain_packed_and_loaded_agree(layout, tmp_path):
    net = tower()
    coded = code_all(net)
    packed = packed_network(net, coded, layout=layout, leftover_dtype="float32")
    save(packed, tmp_path / "net")
    for loaded in (load(tmp_path / "net"), load(tmp_path / "net", Tower), load(tmp_path / "net", Tower())):
        assert torch.equal(loaded(*INPUTS), packed(*INPUTS))
        assert not loaded.training
    torch.testing.assert_close(packed(*INPUTS), with_weights(net, coded)(*INPUTS), rtol=0, atol=1e-5)


def test_parameters_are_rounded_at_once_and_buffers_stay(tmp_path):
    net = tower()
    buffers = {name: value.clone() for name, value in net.named_buffers()}
    packed = packed_network(net, code_all(net))
    assert packed.norm.weight.dtype == torch.float32
    for name, value in packed.state_dict().items():
        if name in buffers:
            assert torch.equal(value, buffers[name]), name
        elif value.is_floating_point():
            assert torch.equal(value, value.half().float()), name
    save(packed, tmp_path / "net")
    loaded = load(tmp_path / "net", Tower)
    assert torch.equal(loaded(*INPUTS), packed(*INPUTS))
    assert loaded.state_dict().keys() == packed.state_dict().keys()
    for name, value in loaded.state_dict().items():
        assert torch.equal(value, packed.state_dict()[name]), name


def test_a_value_too_large_for_half_precision_stays(tmp_path):
    net = tower()
    net.norm.running_var[3] = 1e6 / 3
    expected = net.norm.running_var.clone()
    packed = packed_network(net, code_all(net))
    assert torch.equal(packed.norm.running_var, expected)
    save(packed, tmp_path / "net")
    assert torch.equal(load(tmp_path / "net", Tower).norm.running_var, expected)


def test_bfloat16_leftovers(tmp_path):
    net = tower()
    packed = packed_network(net, code_all(net), leftover_dtype="bfloat16")
    assert torch.equal(packed.norm.weight, net.norm.weight.bfloat16().float())
    save(packed, tmp_path / "net")
    assert torch.equal(load(tmp_path / "net", Tower)(*INPUTS), packed(*INPUTS))
    with pytest.raises(NetworkError, match="leftover_dtype is 'int8', but should be one of float16, bfloat16"):
        packed_network(net, {}, leftover_dtype="int8")


def test_shared_weights_stay_shared(tmp_path):
    net = tower()
    packed = packed_network(net, code_all(net))
    save(packed, tmp_path / "net")
    for one in (packed, load(tmp_path / "net"), copy.deepcopy(packed)):
        assert one.words.packed_weight is one.head.packed_weight
        assert one.head.weight is one.words.weight
    rows = [row.name for row in size_report(packed).tensors]
    assert rows.count("words.weight") == 1
    assert "head.weight" not in rows


def test_shared_weights_by_their_other_name(tmp_path):
    net = tower()
    packed = packed_network(net, {"head.weight": random_coded((11, 16), 5)})
    assert packed.words.packed_weight is packed.head.packed_weight
    save(packed, tmp_path / "net")
    assert torch.equal(load(tmp_path / "net")(*INPUTS), packed(*INPUTS))
    both = {name: random_coded((11, 16), 5) for name in ("head.weight", "words.weight")}
    with pytest.raises(NetworkError, match=r"'head.weight' and 'words.weight' are one shared parameter"):
        packed_network(net, both)


def test_shared_uncompressed_tensors_are_stored_once(tmp_path):
    net = tower()
    packed = packed_network(net, {"conv.weight": random_coded((16, 3, 3, 3), 5)})
    assert packed.words.weight is packed.head.weight
    save(packed, tmp_path / "net")
    loaded = load(tmp_path / "net")
    assert loaded.words.weight is loaded.head.weight
    assert torch.equal(loaded(*INPUTS), packed(*INPUTS))


def test_size_is_that_of_the_file(tmp_path):
    net = tower()
    packed = packed_network(net, code_all(net), metadata={"recipe": {"epochs": 3}, "metrics": {"accuracy": 0.9}})
    save(packed, tmp_path / "net")
    report = size_report(packed)
    assert report.total == (tmp_path / "net").stat().st_size
    assert size_report(tmp_path / "net") == report
    assert sum(report.parts.values()) == report.total
    assert all(part >= 0 for part in report.parts.values())


def test_what_the_report_says():
    net = tower()
    coded = code_all(net)
    report = size_report(packed_network(net, coded, layout="bitmap"))
    weights = sum(value.codes.numel() for value in coded.values())
    nonzeros = sum(value.nonzeros for value in coded.values())
    floats = [*net.parameters(), net.norm.running_mean, net.norm.running_var, net.positions]
    assert report.fp32_bytes == 4 * sum(p.numel() for p in floats)
    assert (report.num_weights, report.nonzeros) == (weights, nonzeros)
    assert report.nonzero_rate == nonzeros / weights
    assert report.codes == sum(math.ceil(3 * value.nonzeros / 8) for value in coded.values())
    assert report.masks == sum(math.ceil(value.codes.numel() / 8) for value in coded.values())
    assert report.codebooks == 2 * 5 * len(coded)
    assert report.tables == 0
    # attention's two biases and the running statistics differ from element to element or are constants
    statistics, rounded = [net.norm.running_mean, net.norm.running_var], [net.head.bias, net.positions]
    assert report.uncompressed == sum(4 * b.numel() for b in statistics) + sum(2 * p.numel() for p in rounded)
    assert report.bits_per_weight == 8 * (report.codes + report.masks + report.codebooks) / weights
    assert report.ratio == report.fp32_bytes / report.total
    assert report.paper_ratio == pytest.approx(32 / (math.log2(5) * nonzeros / weights))
    plain = report.to_dict()
    assert plain["file_bytes"] == report.total
    assert plain["tensors"][0]["name"] == "conv.weight"
    assert [row.bytes for row in report.tensors] == [row["bytes"] for row in plain["tensors"]]


def test_saving_again_gives_the_same_bytes(tmp_path):
    net = tower()
    for layout in layout_names():
        packed = packed_network(net, code_all(net), layout=layout)
        save(packed, tmp_path / "first")
        save(load(tmp_path / "first"), tmp_path / "second")
        assert (tmp_path / "first").read_bytes() == (tmp_path / "second").read_bytes()


def test_metadata(tmp_path):
    packed = packed_network(tower(width=8), code_all(tower(width=8)), metadata={"recipe": {"K": 5}})
    packed.packed_metadata["metrics"]["accuracy"] = 0.75
    save(packed, tmp_path / "net")
    loaded = load(tmp_path / "net")
    assert loaded.packed_metadata == {
        "network": {"name": "test_tower", "options": {"width": 8}},
        "recipe": {"K": 5},
        "metrics": {"accuracy": 0.75},
    }
    assert loaded.words.embedding_dim == 8


def test_a_network_on_the_meta_device(tmp_path):
    net = tower()
    packed = packed_network(net, code_all(net))
    save(packed, tmp_path / "net")
    with torch.device("meta"):
        empty = Tower()
    with pytest.raises(PackedFileError, match="Buffer 'unsaved' is on the meta device"):
        load(tmp_path / "net", empty)
    empty.unsaved = torch.ones(3)
    loaded = load(tmp_path / "net", empty)
    assert torch.equal(loaded(*INPUTS), packed(*INPUTS))
    assert loaded.words.packed_weight is loaded.head.packed_weight


def test_the_way_back_to_a_plain_checkpoint():
    net = tower()
    coded = code_all(net)
    packed = packed_network(net, coded, leftover_dtype="float32")
    plain = Tower().eval()
    plain.load_state_dict(dense_state(packed))
    torch.testing.assert_close(plain(*INPUTS), packed(*INPUTS), rtol=0, atol=1e-5)
    assert torch.equal(plain.conv.weight, coded["conv.weight"].dense())


def test_a_network_that_is_one_layer(tmp_path):
    packed = packed_network(nn.Linear(9, 4), {"weight": random_coded((4, 9), 3)})
    save(packed, tmp_path / "net")
    x = torch.randn(2, 9)
    assert torch.equal(load(tmp_path / "net", nn.Linear(9, 4))(x), packed(x))


def test_module_shared_by_two_parents(tmp_path):
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.first = nn.Linear(6, 6)
            self.second = self.first

        def forward(self, x):
            return self.second(self.first(x))

    packed = packed_network(Twice(), {"first.weight": random_coded((6, 6), 3)})
    assert packed.first is packed.second
    save(packed, tmp_path / "net")
    x = torch.randn(2, 6)
    assert torch.equal(load(tmp_path / "net", Twice)(x), packed(x))


def test_modules_that_are_kept_in_plain_lists_as_well(tmp_path):
    class Kept(nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.a, self.b, self.c = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 2)
            self.steps, self.head = [self.a, (self.b, "relu")], {"head": self.c}

        def forward(self, x):
            return self.head["head"](self.steps[1][0](self.steps[0](x)).relu())

    net, x = Kept(), torch.randn(3, 4)
    own = dict(vars(net))
    mask = torch.ones(4, 4, dtype=torch.bool)
    coded = {
        name: CodedTensor(torch.zeros(4, 4, dtype=torch.uint8), mask, torch.tensor([[value]]))
        for name, value in (("a.weight", 0.25), ("b.weight", -0.5))
    }
    packed = packed_network(net, coded, leftover_dtype=None)
    expected = Kept()
    with torch.no_grad():
        expected.a.weight.fill_(0.25), expected.b.weight.fill_(-0.5)
    torch.testing.assert_close(packed(x), expected(x))
    assert packed.steps[1][1] == "relu" and packed.head["head"] is packed.c
    assert vars(net) == own and net.steps[0] is net.a
    save(packed, tmp_path / "kept.safetensors")
    assert torch.equal(load(tmp_path / "kept.safetensors", Kept())(x), packed(x))


def test_names_and_shapes_that_are_not_the_networks():
    net = tower()
    with pytest.raises(NetworkError, match=r"no parameter 'conv.weigth'; did you mean 'conv.weight'\?"):
        packed_network(net, {"conv.weigth": random_coded((16, 3, 3, 3), 5)})
    with pytest.raises(
        NetworkError, match=r"'conv.weight' has shape \[16, 3, 3, 3\] in the network, but \[2, 2\]"
    ):
        packed_network(net, {"conv.weight": random_coded((2, 2), 5)})


class Bigger(Tower):
    def __init__(self):
        super().__init__()
        self.extra = nn.Linear(2, 2)


class Smaller(Tower):
    def __init__(self):
        super().__init__()
        del self.positions


@pytest.mark.parametrize(
    ("other", "sentence"),
    [
        (lambda: nn.Linear(3, 3), "The network has no parameter 'conv.weight'"),
        (lambda: Tower(width=8), "'conv.weight' has shape \\[8, 3, 3, 3\\] in the network"),
        (lambda: Tower(words=12), "'words.weight' has shape"),
        (Bigger, "The file has no tensor 'extra.weight': it was made for another network"),
        (Smaller, "The network has no tensor 'positions': the file was made for another network"),
    ],
)
def test_a_file_for_another_network(tmp_path, other, sentence):
    packed = packed_network(tower(), code_all(tower()))
    save(packed, tmp_path / "net")
    with pytest.raises(PackedFileError, match=sentence):
        load(tmp_path / "net", other)


def test_codes_outside_of_the_codebook_in_an_intact_file(tmp_path):
    """Checksums fit, lengths fit: only decoding can tell."""
    tensor = pack_tensor(random_coded((6, 6), 5), "bitmap")
    parts = {**tensor.parts, "codes": torch.full_like(tensor.parts["codes"], 0x77)}
    parts["codes"][-1] &= 2 ** ((3 * tensor.nonzeros - 1) % 8 + 1) - 1
    leftovers = {"bias": torch.zeros(6)}
    tensors = {"weight": PackedTensor(**{**vars(tensor), "parts": parts})}
    write_packed(tmp_path / "net", PackedContents(tensors, leftovers, {}))
    with pytest.raises(PackedFileError, match="Tensor 'weight' cannot be unpacked: Code 7 is outside"):
        load(tmp_path / "net", nn.Linear(6, 6))


def test_a_file_that_names_no_network(tmp_path):
    save(packed_network(Tower(), code_all(Tower())), tmp_path / "net")
    with pytest.raises(PackedFileError, match="give load the network or its constructor"):
        load(tmp_path / "net")


@pytest.mark.parametrize("function", [size_report, lambda net: save(net, "nowhere")])
def test_a_network_that_is_not_packed(function):
    with pytest.raises(NetworkError, match=r"A packed network is needed .* but a Linear without packed weights"):
        function(nn.Linear(3, 3))


def test_export_has_one_node_for_each_weight():
    net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Flatten(), nn.Linear(8 * 36, 10)).eval()
    packed = packed_network(net, code_all(net))
    batch = torch.export.Dim("batch")
    exported = torch.export.export(packed, (torch.randn(4, 3, 8, 8),), dynamic_shapes=({0: batch},))
    targets = [str(node.target) for node in exported.graph.nodes if "sqs." in str(node.target)]
    assert targets == ["sqs.convolution_tiled.default", "sqs.linear_tiled.default"]
    for size in (1, 9):
        x = torch.randn(size, 3, 8, 8)
        assert torch.equal(exported.module()(x), packed(x))


def compile_whole(net, backend):
    torch._dynamo.reset()
    return torch.compile(net, fullgraph=True, backend=backend)


def test_compiles_into_one_graph_and_decodes_once(monkeypatch):
    import sqs_pyro.kernels.decode as module

    monkeypatch.setattr("sqs_pyro.kernels.form.native_kernels", lambda form: False)
    net = tower()
    packed = packed_network(net, code_all(net))
    expected = packed(*INPUTS)
    calls = []
    decode = module.decode
    monkeypatch.setattr(module, "decode", lambda args: calls.append(args.shape) or decode(args))
    compiled = compile_whole(copy.deepcopy(packed), "aot_eager")
    for _ in range(3):
        torch.testing.assert_close(compiled(*INPUTS), expected)
    assert sorted(calls) == sorted(row.shape for row in size_report(packed).tensors)


@pytest.mark.slow
@pytest.mark.parametrize("training", [False, True])
def test_inductor(training):
    net = tower()
    packed = packed_network(net, code_all(net))
    compiled = compile_whole(packed, "inductor")
    for batch in (5, 3, 2):  # the second size makes the batch dynamic
        image = INPUTS[0][:batch].clone().requires_grad_(training)
        other = image.detach().clone().requires_grad_(training)
        y, expected = compiled(image, INPUTS[1][:batch]), packed(other, INPUTS[1][:batch])
        torch.testing.assert_close(y, expected, rtol=1e-4, atol=1e-5)
        if training:
            y.square().sum().backward()
            expected.square().sum().backward()
            torch.testing.assert_close(image.grad, other.grad, rtol=1e-3, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_inductor_changes_the_order_of_channels_on_the_way(dtype):
    """What a network does with outputs of convolutions goes as with contiguous ones."""

    class Mixed(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.own = nn.Conv2d(3, 20, 3, padding=1), nn.Conv2d(20, 20, 3, padding=1, groups=20)
            self.scale, self.up = nn.Conv2d(20, 20, 1), nn.ConvTranspose2d(20, 6, 2, stride=2)
            self.norm = nn.BatchNorm2d(20)

        def forward(self, x):
            x = self.first(x).relu()
            x = x + self.norm(self.own(x)) * self.scale(x.mean((2, 3), keepdim=True)).sigmoid()
            return self.up(x).view(len(x), -1)

    net = Mixed().eval()
    packed = packed_network(net, code_all(net)).to(dtype)
    x = torch.randn(2, 3, 10, 9).to(dtype)
    with torch.inference_mode():
        expected, found = packed(x), compile_whole(packed, "inductor")(x)
    tolerance = 1e-4 if dtype == torch.float32 else 0.03
    torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance)


@pytest.mark.slow
def test_inductor_does_not_write_into_the_shared_decoded_weight():
    """An op's result may be reused by the compiler: the in-projection's decoded weight must survive it."""
    net = tower()
    packed = packed_network(net, code_all(net))
    before = packed.attention.in_proj_weight.clone()
    with torch.no_grad():
        for _ in range(3):
            compile_whole(packed, "inductor")(*INPUTS)
    assert torch.equal(packed.attention.in_proj_weight, before)


@pytest.mark.slow
def test_ahead_of_time_export_in_half_precision():
    net = nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 8)).eval()
    packed = packed_network(net, code_all(net)).bfloat16()
    x = torch.randn(6, 64).bfloat16()
    exported = torch.export.export(packed, (x,), dynamic_shapes=({0: torch.export.Dim("batch")},))
    assert torch.equal(exported.module()(x[:3]), packed(x[:3]))


@pytest.mark.parametrize(
    ("given", "sentence"), [("tower", "load was given a str"), (dict, "load was given made a dict")]
)
def test_what_is_no_network_and_builds_none(given, sentence, tmp_path):
    path = tmp_path / "t.safetensors"
    save(packed_network(nn.Linear(4, 3), {"weight": random_coded((3, 4), 1, 2)}), path)
    with pytest.raises(NetworkError, match=sentence):
        load(path, given)


def test_scales_of_parts_of_outputs_through_a_file(tmp_path):
    net = nn.Sequential(nn.Embedding(12, 96), nn.Linear(96, 12))
    net[1].weight = net[0].weight
    coded = random_coded((12, 96), 7, scales=3)
    packed = packed_network(net, {"0.weight": coded})
    words = torch.randint(0, 12, (2, 5))
    expected = nn.functional.linear(coded.dense()[words], coded.dense(), packed[1].bias)
    torch.testing.assert_close(packed(words), expected)
    save(packed, tmp_path / "net.safetensors")
    loaded = load(tmp_path / "net.safetensors", net)
    assert torch.equal(loaded(words), packed(words))
    again = loaded[0].packed_weight.coded()
    assert torch.equal(again.dense(), coded.dense()) and torch.equal(again.scales, coded.scales)
    other = packed_network(net, {"0.weight": random_coded((12, 96), 7, scales=3, seed=1)})
    other.load_state_dict(packed.state_dict())
    assert torch.equal(other(words), packed(words))
