"""From packed files to other formats: what is written was loaded and compared, or nothing is there."""

import errno
import json
import shutil

import pytest
import torch
from kits.exported import run_without_us
from kits.packed_exports import packed
from safetensors.torch import load_file

import sqs_pyro.runs.export
import sqs_pyro.runs.images.kind
from sqs_pyro import load, save
from sqs_pyro.data import load_data
from sqs_pyro.errors import NetworkError, OutputError, PackedFileError, RecipeError
from sqs_pyro.exporting.onnx import run_onnx
from sqs_pyro.networks.registry import build_network
from sqs_pyro.runs.export import export_file


@pytest.fixture
def file(small_run):
    return small_run / "packed.safetensors"


@pytest.mark.slow
def test_dense_loads_into_the_network_of_the_recipe(file, small_recipe, tmp_path):
    out = tmp_path / "new" / "dense.safetensors"
    document = export_file(file, "dense", out)
    net = build_network(small_recipe.network.name, **small_recipe.network.options).eval()
    net.load_state_dict(load_file(out), strict=True)
    x = next(iter(load_data(small_recipe.data).test))[0]
    torch.testing.assert_close(net(x), load(file)(x))
    metrics = json.loads((file.parent / "metrics.json").read_text())
    assert document["dense_bytes"] == metrics["size"]["fp32_bytes"]
    assert document["packed_bytes"] == file.stat().st_size
    assert document["bytes"] == {"dense.safetensors": out.stat().st_size}
    assert set(document["decoded"]) == {tensor["name"] for tensor in metrics["size"]["tensors"]}
    assert document["example"] == "first test examples" and document["max_difference"] < 1e-5
    assert [path.name for path in out.parent.iterdir()] == [out.name]


def test_rounding_is_what_the_difference_tells(file, tmp_path):
    differences = [
        export_file(file, "dense", tmp_path / dtype, dtype=dtype)["max_difference"]
        for dtype in ("float32", "float16", "bfloat16")
    ]
    assert differences == sorted(differences) and differences[2] > 100 * differences[0]


def test_onnx_of_a_run(file, small_recipe, tmp_path):
    pytest.importorskip("onnxruntime")
    document = export_file(file, "onnx", tmp_path / "net.onnx")
    x = next(iter(load_data(small_recipe.data).test))[0]
    (y,) = run_onnx(tmp_path / "net.onnx", x)
    torch.testing.assert_close(y, load(file)(x).detach(), rtol=1e-4, atol=1e-4)
    assert document["max_difference"] < 1e-4 and not document["decoded"]
    assert document["packed_bytes"] < document["total_bytes"] < document["dense_bytes"]


@pytest.mark.slow
def test_aoti_of_a_run(file, tmp_path, monkeypatch):
    document = export_file(file, "aoti", tmp_path / "net", input_shape=(1, 8, 8))
    assert {"model.pt2", "run.py", "run.cpp"} <= set(document["bytes"])
    assert any(name.startswith("libsqs_") for name in document["bytes"]) == bool(document["packed"])
    assert document["example"] == "random numbers [4, 1, 8, 8]" and document["max_difference"] < 1e-4
    assert all(said.startswith("no compiled ") for said in document["decoded"].values())
    # Once more over what is there, with the package that there is: compiling takes as long as all the rest.
    kept = shutil.copy(tmp_path / "net" / "model.pt2", tmp_path / "kept.pt2")
    monkeypatch.setattr(
        torch._inductor, "aoti_compile_and_package", lambda _, package_path: shutil.copy(kept, package_path)
    )
    assert export_file(file, "aoti", tmp_path / "net", input_shape=(1, 8, 8), overwrite=True) == document


def test_what_is_written_is_what_is_compared(file, tmp_path, monkeypatch):
    """A format that forgets something is found out by its figure."""
    export = sqs_pyro.runs.export.formats.export_dense

    def forgetful(net, path, dtype):
        net.fc.bias.data.add_(1.0)
        return export(net, path, dtype)

    monkeypatch.setattr(sqs_pyro.runs.export.formats, "export_dense", forgetful)
    assert export_file(file, "dense", tmp_path / "dense")["max_difference"] == pytest.approx(1.0, rel=1e-4)


def test_data_that_is_not_here_costs_dense_only_the_comparison(file, tmp_path, monkeypatch):
    def missing(*args):
        raise sqs_pyro.errors.DataError("Data is not there.")

    monkeypatch.setattr(sqs_pyro.runs.images.kind, "load_data", missing)
    document = export_file(file, "dense", tmp_path / "dense")
    assert document["max_difference"] is None and document["example"] == "none: Data is not there."
    with pytest.raises(sqs_pyro.errors.DataError, match=r"Data is not there\. Or give --input-shape, for random"):
        export_file(file, "aoti", tmp_path / "aoti")
    assert export_file(file, "dense", tmp_path / "again", input_shape=(1, 8, 8))["max_difference"] < 1e-5


@pytest.mark.parametrize(
    ("options", "error", "sentence"),
    [
        ({"export_format": "tflite"}, OutputError, "Format 'tflite' is unknown: give one of dense, aoti, onnx, "),
        ({"dtype": "int8"}, NetworkError, "dtype is 'int8', but should be one of float32"),
        ({"export_format": "aoti", "dtype": "float16"}, OutputError, "--dtype float16 is for --format dense"),
        ({"input_shape": (1, 0)}, RecipeError, r"The input shape is \[1, 0\], but should be whole numbers above"),
        ({"input_shape": (3, 8, 8)}, NetworkError, r"The network cannot be run on the example \(.*channels"),
        ({"data_from": "nowhere.yaml"}, RecipeError, "nowhere.yaml"),
    ],
)
def test_bad_options_leave_nothing(file, tmp_path, options, error, sentence):
    with pytest.raises(error, match=sentence):
        export_file(file, **{"export_format": "dense", "out": tmp_path / "out", **options})
    assert not list(tmp_path.iterdir())


def test_what_is_in_the_way(file, tmp_path):
    out = tmp_path / "out"
    out.write_text("mine")
    for export_format, overwrite in [("dense", False), ("dense", True), ("onnx", True), ("aoti", True)]:
        with pytest.raises(OutputError, match=f"is no export of format {export_format} that sqs-pyro wrote"):
            export_file(file, export_format, out, overwrite=overwrite)
    with pytest.raises(OutputError, match=r"because '.*out' is a file"):
        export_file(file, "dense", out / "inside")
    assert out.read_text() == "mine"
    out.unlink()
    export_file(file, "dense", out)
    with pytest.raises(OutputError, match="out' exists: choose another path, or replace it with --overwrite"):
        export_file(file, "dense", out)
    export_file(file, "dense", out, overwrite=True)
    assert len(load_file(out)) > 4
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine").write_text("mine")
    for export_format in ("dense", "onnx", "aoti", "openvino"):
        with pytest.raises(OutputError, match="exists and is no export of format"):
            export_file(file, export_format, tmp_path / "full", overwrite=True)


def test_a_full_disk_is_one_sentence_and_keeps_what_was_there(file, tmp_path, monkeypatch):
    out = tmp_path / "dense"
    export_file(file, "dense", out)
    before = out.read_bytes()

    def full(net, path, dtype):
        path.write_bytes(b"half of it")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(sqs_pyro.runs.export.formats, "export_dense", full)
    with pytest.raises(OutputError, match=r"dense' cannot be written \(No space left on device\): make room"):
        export_file(file, "dense", out, overwrite=True)
    assert out.read_bytes() == before and [path.name for path in tmp_path.iterdir()] == ["dense"]


def test_files_without_a_network_of_their_own(small_run, tmp_path):
    save(packed("residual", "4 bits"), tmp_path / "packed")
    with pytest.raises(PackedFileError, match="does not say how to build its network: give --network"):
        export_file(tmp_path / "packed", "dense", tmp_path / "out")
    with pytest.raises(NetworkError, match="An ensemble of 3 draws cannot be exported"):
        export_file(small_run / "ensemble.safetensors", "dense", tmp_path / "out")
    with pytest.raises(PackedFileError, match="is not there"):
        export_file(tmp_path / "nowhere", "dense", tmp_path / "out")
    (tmp_path / "directory").mkdir()
    with pytest.raises(PackedFileError, match=r"is a directory without a 'packed\.safetensors'"):
        export_file(tmp_path / "directory", "dense", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_language_models_file(tiny_language_run, tmp_path):
    document = export_file(tiny_language_run / "packed.safetensors", "dense", tmp_path / "dense")
    assert document["max_difference"] < 1e-4 and document["example"].startswith("random tokens [4, ")


PLAIN = """
import warnings
warnings.simplefilter("ignore")
import torch
sys.modules["torchvision"] = None  # its compiled part may not fit the installed torch
from transformers import LlamaForCausalLM

net = LlamaForCausalLM.from_pretrained(sys.argv[1]).eval()
assert type(net.lm_head) is torch.nn.Linear and net.lm_head.weight is net.model.embed_tokens.weight
with torch.no_grad():
    torch.save(net(torch.load(sys.argv[2])).logits, sys.argv[3])
"""


@pytest.mark.slow
def test_a_hugging_face_directory_that_transformers_loads_alone(tmp_path):
    kit = pytest.importorskip("kits.tiny_transformers")
    net = kit.packed_tiny("llama_tied")
    sqs_pyro.integrations.save_pretrained(net, tmp_path / "packed")
    (tmp_path / "packed" / "tokenizer_config.json").write_text("{}")
    document = export_file(tmp_path / "packed", "dense", tmp_path / "dense")
    assert document["max_difference"] < 1e-5
    assert {"config.json", "model.safetensors", "tokenizer_config.json"} <= set(document["bytes"])
    assert "quantization_config" not in json.loads((tmp_path / "dense" / "config.json").read_text())
    tokens = torch.randint(3, 64, (2, 9))
    torch.save(tokens, tmp_path / "x.pt")
    run_without_us(PLAIN, tmp_path / "dense", tmp_path / "x.pt", tmp_path / "y.pt")
    torch.testing.assert_close(torch.load(tmp_path / "y.pt"), net(tokens).logits.detach(), rtol=1e-4, atol=1e-5)
    with pytest.raises(OutputError, match="exists: choose another path"):
        export_file(tmp_path / "packed", "dense", tmp_path / "dense")
    export_file(tmp_path / "packed", "dense", tmp_path / "dense", dtype="bfloat16", overwrite=True)
    state = load_file(tmp_path / "dense" / "model.safetensors")
    assert {value.dtype for value in state.values()} == {torch.bfloat16}


@pytest.mark.slow
@pytest.mark.parametrize("name", ["llama_tied", "bert", "gpt2"])
def test_transformers_as_onnx_of_any_length(name, tmp_path):
    pytest.importorskip("onnxruntime")
    kit = pytest.importorskip("kits.tiny_transformers")
    net = kit.packed_tiny(name)
    sqs_pyro.integrations.save_pretrained(net, tmp_path / "packed")
    document = export_file(tmp_path / "packed", "onnx", tmp_path / "net.onnx", input_shape=(12,))
    assert document["max_difference"] < 1e-4
    tokens = torch.randint(3, 64, (3, 21))
    inputs = {"input_ids": tokens, "attention_mask": torch.ones_like(tokens)}
    inputs["attention_mask"][0, 15:] = 0
    (found,) = run_onnx(tmp_path / "net.onnx", inputs)
    torch.testing.assert_close(found, net(**inputs).logits.detach(), rtol=1e-4, atol=1e-4)
