"""State dicts of torchao: the packed file's numbers in its tensors, which a process without us loads and runs."""

import json
import logging
import sys

import pytest
import torch
from kits.exported import run_without_us
from kits.packed_exports import INPUTS, on_no_grid, on_whole_numbers, packed, plain
from safetensors.torch import load_file
from torch import nn
from torch.export import Dim
from typer.testing import CliRunner

from sqs_pyro import integrations, save
from sqs_pyro.cli import app
from sqs_pyro.errors import MissingPackageError, NetworkError, OutputError
from sqs_pyro.exporting import export_dense, export_torchao
from sqs_pyro.exporting.installed import check_installed
from sqs_pyro.exporting.torchao import is_torchao_export
from sqs_pyro.kernels import packed_network
from sqs_pyro.packing.stored import stored_weights
from sqs_pyro.runs.export import export_file
from sqs_pyro.testing.layouts import random_coded

pytest.importorskip("torchao")
check_installed("torchao", "torchao")

SCRIPT = """
import logging
logging.disable(logging.WARNING)
import torch
import torchao
from torchao.quantization import IntxUnpackedToInt8Tensor
from kits.exported import Residual, Words

_, kind, file, inputs, outputs = sys.argv
net = {"residual": Residual, "words": Words}[kind]().eval()
net.load_state_dict(torch.load(file, weights_only=True), strict=True, assign=True)
print([name for name, p in net.named_parameters() if isinstance(p, IntxUnpackedToInt8Tensor)])
with torch.no_grad():
    torch.save(net(torch.load(inputs)), outputs)
"""


def mlp(components=15, make=on_whole_numbers, width=24, parts=False):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(20, width), nn.ReLU(), nn.Linear(width, 3)).eval()
    shapes = {name: tuple(p.shape) for name, p in net.named_parameters() if p.dim() > 1}
    coded = {
        name: make(random_coded(s, components, seed=i, scales=parts)) for i, (name, s) in enumerate(shapes.items())
    }
    return packed_network(net, coded)


def subclasses(state):
    return {name: value for name, value in state.items() if type(value).__name__ == "IntxUnpackedToInt8Tensor"}


def close(found, expected):
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5 * float(expected.abs().max()))


@pytest.mark.parametrize(
    ("components", "bits", "parts"), [(3, 4, False), (15, 4, False), (16, 8, False), (255, 8, False), (15, 4, 2)]
)
def test_numbers_scales_and_outputs(components, bits, parts, tmp_path):
    net = mlp(components, parts=parts)
    said = export_torchao(net, tmp_path / "net.pt")
    assert said.packed == dict.fromkeys(["0.weight", "2.weight"], f"torchao, int{bits}") and not said.decoded
    state = torch.load(tmp_path / "net.pt", weights_only=True)
    assert state.keys() == {"0.weight", "0.bias", "2.weight", "2.bias"}
    for name, weight in stored_weights(net).items():
        tensor, coded = state[name], weight.coded()
        # From codes and codebook, not from `whole_numbers`, which the export has asked.
        numbers = torch.where(coded.mask, coded.codebook[0][coded.codes.long()], 0.0)
        of_parts = numbers.view(len(numbers), parts or 1, -1)
        assert torch.equal(tensor.qdata, numbers)
        assert torch.equal(
            of_parts * tensor.scale[..., None], of_parts * coded.scales.view(*of_parts.shape[:2], 1)
        )
        assert torch.equal(tensor.dequantize(), coded.dense())
        assert tensor.qdata.dtype == torch.int8 and tensor.target_dtype == getattr(torch, f"int{bits}")
        assert tensor.block_size == (1, coded.shape[1] // (parts or 1)) and not tensor.zero_point.any()
        assert tensor.activation_quantization is None
    plainly = nn.Sequential(nn.Linear(20, 24), nn.ReLU(), nn.Linear(24, 3)).eval()
    plainly.load_state_dict(state, strict=True, assign=True)
    graph = torch.export.export(plainly, (torch.randn(7, 20),), dynamic_shapes=({0: Dim("batch")},)).module()
    for rows in (1, 7):
        x = torch.randn(rows, 20)
        close(plainly(x).detach(), net(x).detach())
        if rows > 1:  # a graph's batch may be fixed to what is special
            close(graph(x).detach(), net(x).detach())


@pytest.mark.parametrize(
    ("kind", "held", "decoded"),
    [
        pytest.param("residual", ["head.weight"], "blocks.0.weight", marks=pytest.mark.slow),
        # `out_proj` of an attention is a linear layer whose weight other code reads
        (
            "words",
            ["block.linear1.weight", "block.linear2.weight", "head.weight"],
            "block.self_attn.out_proj.weight",
        ),
    ],
)
def test_the_original_network_loads_it_without_us(kind, held, decoded, tmp_path):
    net = packed(kind, "whole numbers of 4 bits")
    said = export_torchao(net, tmp_path / "net.pt")
    assert said.decoded[decoded] == "no linear layer: float32"
    assert said.packed.keys() | said.decoded.keys() == stored_weights(net).keys()
    torch.save(INPUTS[kind], tmp_path / "x.pt")
    paths = (tmp_path / name for name in ("net.pt", "x.pt", "y.pt"))
    assert run_without_us(SCRIPT, kind, *paths).strip() == str(held)
    close(torch.load(tmp_path / "y.pt"), net(INPUTS[kind]).detach())
    # Of everything else: what a plain checkpoint has.
    export_dense(net, tmp_path / "dense")
    dense, state = load_file(tmp_path / "dense"), torch.load(tmp_path / "net.pt", weights_only=True)
    assert dense.keys() == state.keys() and subclasses(state).keys() == set(held)
    for name, value in state.items():
        assert torch.equal(value.dequantize() if name in held else value, dense[name]), name


def test_a_weight_shared_with_an_embedding_stands_there_in_both_forms(tmp_path):
    said = export_torchao(packed("words", "whole numbers of 8 bits"), tmp_path / "net.pt")
    assert said.packed["words.weight"] == "torchao, int8, and float32 as words.weight"


def test_layers_that_share_a_weight_share_its_numbers(tmp_path):
    net = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8)).eval()
    net[2].weight = net[0].weight
    net = packed_network(net, {"0.weight": on_whole_numbers(random_coded((8, 8), 15))})
    assert export_torchao(net, tmp_path / "net.pt").packed == {"0.weight": "torchao, int4"}
    state = torch.load(tmp_path / "net.pt", weights_only=True)
    assert state["0.weight"].qdata.data_ptr() == state["2.weight"].qdata.data_ptr()


def test_layers_without_whole_numbers_are_dense(tmp_path):
    net = plain("words")
    names = ["block.linear1.weight", "block.linear2.weight"]
    codes = [random_coded(tuple(net.get_parameter(name).shape), 9, seed=1) for name in names]
    net = packed_network(net, {names[0]: on_whole_numbers(codes[0]), names[1]: on_no_grid(codes[1])})
    said = export_torchao(net, tmp_path / "net.pt")
    assert said.packed == {names[0]: "torchao, int4"} and said.decoded == {names[1]: "no whole numbers: float32"}
    state = torch.load(tmp_path / "net.pt", weights_only=True)
    assert torch.equal(state[names[1]], stored_weights(net)[names[1]].coded().dense())


def test_a_layer_by_itself_and_a_type_of_16_bits(tmp_path):
    net = packed_network(nn.Linear(8, 5), {"weight": on_whole_numbers(random_coded((5, 8), 15))}).bfloat16()
    assert export_torchao(net, tmp_path / "net.pt").packed == {"weight": "torchao, int4"}
    state = torch.load(tmp_path / "net.pt", weights_only=True)
    assert torch.equal(state["weight"].dequantize(), stored_weights(net)["weight"].coded().dense())
    assert state["bias"].dtype == state["weight"].dtype == torch.float32


def test_equal_networks_have_equal_files_and_weights_take_a_byte(tmp_path):
    net = mlp(width=4096)
    export_torchao(net, tmp_path / "one.pt")
    export_torchao(net, tmp_path / "another")
    written = (tmp_path / "one.pt").read_bytes()
    assert written == (tmp_path / "another").read_bytes()
    weights, others = 4096 * 23, 4096 + 3
    assert weights + 9 * others < len(written) < weights + 9 * others + 12_000


@pytest.mark.parametrize("name", ["bert", "llama", pytest.param("llama_tied", marks=pytest.mark.slow)])
def test_transformers(name, tmp_path):
    kit = pytest.importorskip("kits.tiny_transformers")
    net = kit.tiny(name)
    shapes = {path: tuple(p.shape) for path, p in net.named_parameters() if p.dim() > 1}
    coded = {
        path: on_whole_numbers(random_coded(shape, 15, seed=i)) for i, (path, shape) in enumerate(shapes.items())
    }
    net = packed_network(net, coded)
    integrations.save_pretrained(net, tmp_path / "packed")
    document = export_file(tmp_path / "packed", "torchao", tmp_path / "net.pt", input_shape=(12,))
    again = kit.tiny(name)
    linear = {f"{path}.weight" for path, module in again.named_modules() if isinstance(module, nn.Linear)}
    state = torch.load(tmp_path / "net.pt", weights_only=True)
    assert subclasses(state).keys() == linear and len(linear) > 12
    again.load_state_dict(state, strict=True, assign=True)
    close(kit.logits(again), kit.logits(net))
    assert document["max_difference"] < 1e-5 * float(kit.logits(net).abs().max())
    assert document["packed"].keys() | document["decoded"].keys() == stored_weights(net).keys()


def test_the_command(tmp_path):
    (tmp_path / "mine.py").write_text(
        "from torch import nn\n\ndef network():\n"
        "    return nn.Sequential(nn.Linear(20, 24), nn.ReLU(), nn.Linear(24, 3))\n"
    )
    save(mlp(), tmp_path / "packed.safetensors")
    export = [
        *("export", tmp_path / "packed.safetensors", "--format", "torchao", "--out", tmp_path / "net.pt"),
        *("--network", f"{tmp_path / 'mine.py'}:network", "--input-shape", "20", "--json"),
    ]
    for options, code in (([], 0), ([], 2), (["--overwrite"], 0)):
        done = CliRunner().invoke(app, [str(each) for each in (*export, *options)])
        assert done.exit_code == code, done.output
        assert code == 0 or "net.pt' exists: choose another path, or replace it with --overwrite" in done.stderr
    document = json.loads(done.stdout)
    assert document["packed"] == dict.fromkeys(["0.weight", "2.weight"], "torchao, int4")
    assert document["max_difference"] < 1e-5 and list(document["bytes"]) == ["net.pt"]


class TestRefusals:
    def test_no_layer_with_whole_numbers(self, tmp_path):
        sentence = r"No linear layer has whole numbers as codewords, .*: compress with grid: uniform, in"
        for net in (mlp(make=on_no_grid), packed_network(nn.Sequential(nn.Linear(4, 2)), {})):
            with pytest.raises(NetworkError, match=sentence):
                export_torchao(net, tmp_path / "net.pt")
        assert not list(tmp_path.iterdir())

    def test_names_and_networks(self, tmp_path):
        with pytest.raises(OutputError, match=r"suffix \.pth, but format torchao writes \.pt: correct"):
            export_torchao(mlp(), tmp_path / "net.pth")
        with pytest.raises(NetworkError, match="A packed network is needed"):
            export_torchao(nn.Linear(2, 2), tmp_path / "net.pt")
        assert not list(tmp_path.iterdir())

    def test_only_our_own_files_are_replaced(self, tmp_path):
        path = tmp_path / "net.pt"
        export_torchao(mlp(), path)
        assert is_torchao_export(path)
        torch.save(torch.load(path, weights_only=True), tmp_path / "by a user.pt")
        with (tmp_path / "another.pt").open("wb") as file:
            torch.save({"written_by": torch.zeros(2)}, file)
        (tmp_path / "cut.pt").write_bytes(path.read_bytes()[:-100])
        (tmp_path / "text.pt").write_text("mine")
        others = [other for other in (*tmp_path.iterdir(), tmp_path, tmp_path / "none") if other != path]
        assert not [other for other in others if is_torchao_export(other)] and len(others) == 6

    def test_what_is_not_installed_is_said(self, monkeypatch, tmp_path):
        monkeypatch.setitem(sys.modules, "torchao", None)
        sentence = r"Tensors of torchao need the package 'torchao', .* pip install 'sqs-pyro\[torchao\]'"
        with pytest.raises(MissingPackageError, match=sentence):
            export_torchao(mlp(), tmp_path / "net.pt")
        assert logging.root.manager.disable < logging.WARNING  # as it was
