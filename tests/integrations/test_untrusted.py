"""Checkpoints from elsewhere: no code of theirs runs, no file beside them is read, nothing is asked."""

import json

import pytest
import torch
from kits.tiny_transformers import packed_tiny, tiny
from typer.testing import CliRunner

import sqs_pyro
from sqs_pyro.cli import app
from sqs_pyro.errors import NetworkError, PackedFileError
from sqs_pyro.integrations import save_pretrained
from sqs_pyro.integrations.pretrained import find_pretrained
from sqs_pyro.integrations.pretrained_recipe import PretrainedRecipe
from sqs_pyro.integrations.streamed_weights import StreamedWeights, empty_network

CODE = {"model_type": "own", "auto_map": {"AutoConfig": "own.OwnConfig", "AutoModelForCausalLM": "own.Own"}}


@pytest.fixture
def with_code(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(CODE))
    (tmp_path / "own.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n")
    return tmp_path


@pytest.mark.parametrize(
    ("read", "error"),
    [
        (lambda path: empty_network(path, torch.float32), NetworkError),
        (lambda path: find_pretrained(PretrainedRecipe(path=str(path))), NetworkError),
        (sqs_pyro.from_pretrained, PackedFileError),
    ],
)
def test_code_of_a_checkpoint_is_not_run(read, error, with_code):
    with pytest.raises(error, match="names code of its own \\('auto_map'\\), which is not run: load the network"):
        read(with_code)
    assert not (with_code / "ran").exists()


def test_the_command_asks_nothing(with_code):
    result = CliRunner().invoke(app, ["plan", str(with_code)], input="y\n")
    assert result.exit_code == 2 and "names code of its own" in result.stderr and not result.stdout
    assert not (with_code / "ran").exists()


@pytest.mark.parametrize(
    "elsewhere", ["../other.safetensors", "/etc/passwd", "a/b.safetensors", "pytorch_model.bin"]
)
def test_an_index_names_files_beside_it(elsewhere, tmp_path):
    tiny("llama").save_pretrained(tmp_path / "dense", max_shard_size="16KB")
    save_pretrained(packed_tiny("llama"), tmp_path / "packed", max_shard_size="4KB")
    for path in (tmp_path / "dense", tmp_path / "packed"):
        index = path / "model.safetensors.index.json"
        placed = json.loads(index.read_text())
        placed["weight_map"]["model.norm.weight"] = elsewhere
        index.write_text(json.dumps(placed))
    sentence = "index.json' names '.*', which is no safetensors file beside it: fetch it again"
    with pytest.raises(NetworkError, match=sentence):
        StreamedWeights(tiny("llama"), tmp_path / "dense")
    with pytest.raises(PackedFileError, match=sentence):
        sqs_pyro.from_pretrained(tmp_path / "packed")


@pytest.mark.parametrize("change", [{"rope_theta": 500.0}, {"hidden_act": "gelu"}, {"rms_norm_eps": 1e-5}])
def test_another_config_is_not_taken_for_the_one_that_was_saved(change, tmp_path):
    save_pretrained(packed_tiny("llama"), tmp_path)
    path = tmp_path / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    with pytest.raises(PackedFileError, match=r"config\.json' is not the one that was saved with the weights"):
        sqs_pyro.from_pretrained(tmp_path)
