"""The benchmark of networks: real files, outputs that agree, honest bytes, and what it says of wrong input."""

import json

import pytest
import torch
from kits import tiny_transformers
from torch import nn
from typer.testing import CliRunner

import sqs_pyro.bench.model
from sqs_pyro import load, save
from sqs_pyro.bench import model as measured
from sqs_pyro.bench.model import bench_model, held_bytes
from sqs_pyro.bench.networks import BenchNetwork, bench_networks
from sqs_pyro.bench.report import random_coded
from sqs_pyro.cli import app
from sqs_pyro.errors import NetworkError, RecipeError
from sqs_pyro.kernels import dense_state, packed_ensemble, packed_network
from sqs_pyro.networks.registry import build_network
from sqs_pyro.networks.task_networks import task_network
from sqs_pyro.packing import CodedTensor

METHODS = {"float32", "bfloat16", "packed, float32", "packed, bfloat16"}


@pytest.fixture(autouse=True)
def any_processor(monkeypatch):
    """The same methods everywhere: bfloat16 is left out where a processor would take too long."""
    monkeypatch.setattr(sqs_pyro.bench.model, "multiplies_bfloat16", lambda device: True)


def coded(net: nn.Module) -> dict[str, CodedTensor]:
    return {name: random_coded(p.shape, 3, 0.5, 0.3) for name, p in net.named_parameters() if p.dim() > 1}


@pytest.fixture
def file(tmp_path):
    net = build_network("digits_net", width=4)
    path = tmp_path / "packed.safetensors"
    save(packed_network(net, coded(net), metadata={"recipe": {"data": {"name": "digits"}}}), path)
    return path


def invoke(*arguments):
    return CliRunner().invoke(app, ["bench", "model", *map(str, arguments)])


def test_a_file(file, tmp_path):
    out = tmp_path / "model.json"
    result = invoke(file, "--batch", "1,3", "--rounds", 2, "--eager", "--out", out)
    assert result.exit_code == 0, result.output
    shown = " ".join(result.stdout.split())
    assert "1x8x8, batch 3" in shown and "packed, bfloat16" in shown and "is missing: only linear layers" in shown
    document = json.loads(out.read_text())
    assert out.with_suffix(".png").read_bytes().startswith(b"\x89PNG")
    page = out.with_suffix(".html").read_bytes()
    out.with_suffix(".html").unlink()
    told = CliRunner().invoke(app, ["report", str(out)])
    assert told.exit_code == 0 and out.with_suffix(".html").read_bytes() == page
    assert document["compiled"] is False and document["rounds"] == 2 and document["machine"]["threads"] == 1
    (why,) = [why for name, why in document["missing"].items() if name.startswith("NF4")]
    assert "of the weights" in why  # nearly all of them are in convolutions
    rows = document["rows"]
    assert len(rows) == 2 * 2 * len(METHODS) and {row["method"] for row in rows} == METHODS
    weights = sum(value.nbytes for value in dense_state(load(file)).values())
    for row in rows:
        assert row["input"] == [1, 8, 8] and row["network"] == str(file)
        assert 0 < row["lower_quartile"] <= row["microseconds"] <= row["upper_quartile"]
        single = next(
            r for r in rows if r["method"] == "float32" and all(r[k] == row[k] for k in ("batch", "cold"))
        )
        assert row["times_as_fast"] == pytest.approx(single["microseconds"] / row["microseconds"])
        assert row["relative_error"] <= (1e-5 if row["method"].endswith("float32") else 0.05)
        if row["method"] == "float32":
            assert row["bytes"] == weights
        if row["method"] == "bfloat16":
            assert (
                row["relative_error"] > 0 and 0.5 * weights <= row["bytes"] < 0.52 * weights
            )  # counters of norms


def test_the_command_can_do_without_the_data(file):
    result = invoke(file, "--input-shape", "1x12x12", "--batch", 1, "--rounds", 1, "--eager", "--json")
    assert result.exit_code == 0, result.output
    assert {tuple(row["input"]) for row in json.loads(result.stdout)["rows"]} == {(1, 12, 12)}


@pytest.mark.slow
def test_compiled_networks_are_what_is_timed(monkeypatch):
    net = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4))
    compiled = []
    compile_it = torch.compile
    monkeypatch.setattr(torch, "compile", lambda f, **how: compiled.append((f, how)) or compile_it(f, **how))
    document = bench_model([BenchNetwork("mlp", packed_network(net, coded(net)), ((8,),))], (1, 2), rounds=2)
    ours = [how for _, how in compiled if how == {"fullgraph": True, "dynamic": False}]
    assert len(ours) >= 2 * len(METHODS) and len({id(f.__code__) for f, _ in compiled}) == len(compiled)
    assert {row["method"] for row in document["rows"]} >= METHODS and document["compiled"] is True
    assert all(row["relative_error"] <= 1e-5 for row in document["rows"] if row["method"].endswith("float32"))


def test_what_cannot_be_compiled_in_one_piece():
    class Broken(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(8, 4)

        def forward(self, x):
            torch._dynamo.graph_break()
            return self.linear(x)

    net = Broken()
    bench = BenchNetwork("broken", packed_network(net, coded(net)), ((8,),))
    with pytest.raises(NetworkError, match=r"'broken' fails, float32 .* --eager"):
        bench_model([bench], (1,), rounds=1)
    assert bench_model([bench], (1,), rounds=1, compiled=False)["rows"]


def test_outputs_that_differ_are_an_error(file, monkeypatch):
    unpack = measured.unpack_weights

    def changed(net, dtype):
        dense = unpack(net, dtype)
        with torch.no_grad():
            dense.fc.weight.mul_(1.01)
        return dense

    monkeypatch.setattr(measured, "unpack_weights", changed)
    result = invoke(file, "--batch", 1, "--rounds", 1, "--eager")
    assert result.exit_code == 2 and "float32, has outputs that differ" in result.stderr


def test_decoded_copies_are_counted():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(4, 8, 3, bias=False), nn.Flatten(), nn.Linear(8, 4, bias=False))
    packed = packed_network(net, coded(net))
    before = held_bytes(packed)
    packed(torch.randn(1, 4, 3, 3))
    copies = [w.args for w in packed.modules() if hasattr(w, "form") and w.form != "tiled"]
    assert held_bytes(packed) == before + sum(4 * torch.Size(args.shape).numel() for args in copies)


def test_tokens_of_a_language_model(tiny_language_run):
    (bench,) = bench_networks(str(tiny_language_run / "packed.safetensors"), (4,), None, (5, 1))
    assert bench.shapes == ((5,), (1,)) and bench.inputs((5,), 2, torch.bfloat16).dtype == torch.int64
    document = bench_model([bench], (2,), rounds=1, compiled=False)
    assert {tuple(row["input"]) for row in document["rows"]} == {(5,), (1,)}


def test_a_text_with_its_mask(tmp_path):
    net = task_network(tiny_transformers.tiny("bert"), "classification")
    path = tmp_path / "packed.safetensors"
    save(packed_network(net, coded(net), metadata={"recipe": {"task": "classification"}}), path)
    (bench,) = bench_networks(str(path), (4,), None, (3,))
    inputs = bench.inputs((3,), 2, torch.float32)
    assert inputs["input_ids"].shape == (2, 3) and int(inputs["attention_mask"].sum()) == 6
    assert bench_model([bench], (2,), rounds=1, compiled=False)["rows"]


def test_dense_bfloat16_is_left_out_where_no_processor_multiplies_it(file, monkeypatch):
    monkeypatch.setattr(sqs_pyro.bench.model, "multiplies_bfloat16", lambda device: False)
    document = bench_model(bench_networks(str(file), (4,), None, (1,)), (1,), rounds=1, compiled=False)
    assert {row["method"] for row in document["rows"]} == METHODS - {"bfloat16"}
    why = [sentence for name, sentence in document["missing"].items() if name.startswith("bfloat16")]
    assert why == ["the processor has no instructions for bfloat16"]


def test_built_in_networks_have_the_bits_that_are_asked_for():
    nets = bench_networks("resnet20", (4, 2), None, (1,))
    assert [net.name for net in nets] == ["resnet20, 4 bits", "resnet20, 2 bits"]
    for net, bits in zip(nets, (4, 2), strict=True):
        values = dense_state(net.network)["stage1.0.conv1.weight"]
        assert len(values.unique()) == 2**bits and float((values == 0).float().mean()) == pytest.approx(
            0.5, abs=0.05
        )


@pytest.mark.slow
def test_the_built_in_transformer():
    nets = bench_networks("transformer", (4,), None, (2,))
    document = bench_model(nets, (1,), rounds=1, compiled=False)
    by_method = {row["method"]: row for row in document["rows"]}
    assert by_method["packed, bfloat16"]["bytes"] < by_method["bfloat16"]["bytes"] / 2


def test_an_ensemble_has_no_dense_counterpart(tmp_path):
    net = build_network("digits_net", width=4)
    first = coded(net)
    draws = [first, {name: CodedTensor(c.codes, c.mask, c.codebook) for name, c in first.items()}]
    path = tmp_path / "ensemble.safetensors"
    save(packed_ensemble(net, draws, metadata={"recipe": {"data": {"name": "digits"}}}), path)
    with pytest.raises(NetworkError, match="ensemble of 2 draws"):
        bench_networks(str(path), (4,), None, (1,))


def test_a_file_that_names_no_data(tmp_path):
    net = build_network("digits_net", width=4)
    save(packed_network(net, coded(net)), tmp_path / "packed.safetensors")
    with pytest.raises(RecipeError, match="--input-shape CxHxW"):
        bench_networks(str(tmp_path / "packed.safetensors"), (4,), None, (1,))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("resnet21",), "neither a packed file nor a built-in network"),
        (("there/is/none.safetensors",), "is not there"),
        (("resnet20", "--bits", "9"), "a code has 1 to 8 bits"),
        (("resnet20", "--batch", "0"), "of at least 1"),
        (("resnet20", "--rounds", "0"), "of at least 1"),
        (("resnet20", "--input-shape", "1x"), "--input-shape has '1x'"),
        (("resnet20", "--batch", "1;2"), "--batch has '1;2'"),
        (("resnet20", "--out", "there/is/none.json"), "in a directory that is there"),
        (("resnet20", "--out", "model.png"), "should be a file *.json"),
    ],
)
def test_wrong_options(arguments, message):
    result = invoke(*arguments)
    assert result.exit_code == 2 and message in result.stderr.replace("\n", " ")


def test_a_shape_that_the_network_does_not_take(file):
    result = invoke(file, "--input-shape", "3x8x8", "--eager")
    assert result.exit_code == 2 and "does not take inputs of shape (1, 3, 8, 8)" in result.stderr
