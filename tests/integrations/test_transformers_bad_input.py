"""Checkpoints that are damaged, incomplete, newer or of another network; calls that make no sense."""

import json

import pytest
import torch
from kits.tiny_transformers import code_matrices, packed_tiny, tiny
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModelForCausalLM

import sqs_pyro
from sqs_pyro.errors import NetworkError, PackedFileError
from sqs_pyro.integrations import SQSConfig, checkpoint_size, save_pretrained
from sqs_pyro.integrations.checkpoint_documents import CONFIG_DIGEST, config_digest
from sqs_pyro.kernels import packed_ensemble, packed_network
from sqs_pyro.testing.layouts import random_coded

Q_PROJ = "model.layers.0.self_attn.q_proj.weight"
STORED = "model.layers.0.self_attn.q_proj.packed_weight.stored"


@pytest.fixture
def checkpoint(tmp_path):
    save_pretrained(packed_tiny("llama_tied", layout="entropy"), tmp_path)
    return tmp_path


def load_both_ways(directory, error, sentence):
    for load in (sqs_pyro.from_pretrained, AutoModelForCausalLM.from_pretrained):
        with pytest.raises(error, match=sentence):
            load(directory)


def change_tensors(directory, change):
    stored = load_file(directory / "model.safetensors")
    change(stored)
    save_file(stored, directory / "model.safetensors", {"format": "pt"})


def write_config(directory, config):
    """With the digest of it in the weights, as if it had been saved so."""
    (directory / "config.json").write_text(json.dumps(config))
    stored = load_file(directory / "model.safetensors")
    stored[CONFIG_DIGEST] = config_digest(config)
    save_file(stored, directory / "model.safetensors", {"format": "pt"})


def change_config(directory, change):
    path = directory / "config.json"
    config = json.loads(path.read_text())
    change(config["quantization_config"])
    write_config(directory, config)


@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
def test_a_missing_file_and_a_directory_of_its_name(name, checkpoint):
    (checkpoint / name).unlink()
    for _ in range(2):
        with pytest.raises(PackedFileError, match=rf"{name}.*: (give|fetch)"):
            sqs_pyro.from_pretrained(checkpoint)
        (checkpoint / name).mkdir(exist_ok=True)


@pytest.mark.parametrize("keep", [5, 300, -1])
def test_a_truncated_file(keep, checkpoint):
    path = checkpoint / "model.safetensors"
    path.write_bytes(path.read_bytes()[:keep])
    load_both_ways(
        checkpoint, PackedFileError, r"model.safetensors' is truncated or damaged .*: fetch the checkpoint"
    )
    with pytest.raises(PackedFileError, match="truncated or damaged"):
        checkpoint_size(checkpoint)


def test_every_altered_byte_of_the_data_is_noticed(checkpoint):
    path = checkpoint / "model.safetensors"
    intact = path.read_bytes()
    start = 8 + int.from_bytes(intact[:8], "little")
    for position in range(start, len(intact), 307):
        path.write_bytes(intact[:position] + bytes([intact[position] ^ 1]) + intact[position + 1 :])
        with pytest.raises(PackedFileError, match=r"Tensor 'model\..*weight.*damaged.*checksum does not fit"):
            sqs_pyro.from_pretrained(checkpoint)


def test_a_missing_packed_tensor(checkpoint):
    change_tensors(checkpoint, lambda stored: stored.pop(STORED))
    load_both_ways(checkpoint, PackedFileError, rf"'{STORED}' is missing in the checkpoint \(it lacks 1 of the 20")


def test_a_missing_leftover(checkpoint):
    change_tensors(checkpoint, lambda stored: stored.pop("model.norm.weight"))
    load_both_ways(checkpoint, PackedFileError, "Tensor 'model.norm.weight' is missing in the checkpoint")


@pytest.mark.parametrize("other", [torch.zeros(7, dtype=torch.uint8), torch.zeros(9)])
def test_a_packed_tensor_of_another_size_or_type(other, checkpoint):
    change_tensors(checkpoint, lambda stored: stored.update({STORED: other}))
    load_both_ways(
        checkpoint, PackedFileError, rf"'{STORED}' is (U8|F32) \[[79]\] in the checkpoint, but U8 \[\d+\]"
    )


def test_an_altered_leftover(checkpoint):
    change_tensors(checkpoint, lambda stored: stored["model.norm.weight"].add_(1))
    load_both_ways(checkpoint, PackedFileError, "'model.norm.weight' is damaged, its checksum does not fit: fetch")


def test_bytes_of_another_tensor(checkpoint):
    def swap(stored):
        other = STORED.replace("q_proj", "o_proj")
        size = min(stored[STORED].numel(), stored[other].numel())
        stored[STORED][:size] = stored[other][:size]

    change_tensors(checkpoint, swap)
    load_both_ways(checkpoint, PackedFileError, f"Tensor '{Q_PROJ}' cannot be read: its bytes are damaged")


def test_intact_bytes_that_do_not_decode(checkpoint):
    """Checksums fit, lengths fit: only decoding can tell."""
    change_config(checkpoint, lambda config: config["tensors"][Q_PROJ].update(nonzeros=17))
    load_both_ways(checkpoint, PackedFileError, f"Tensor '{Q_PROJ}' cannot be unpacked: .* weights are not zero")


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"format_version": 4}, "has format version 4, this program reads up to 3: update sqs-pyro"),
        ({"format_version": "1"}, "format version is '1', which is not a number"),
        ({"surprise": 1}, "unknown key 'surprise': fetch config.json again, or update"),
        ({"tensors": [1]}, "'tensors' is a list, but should be an object"),
        (
            {"tensors": {Q_PROJ: 1}, "shared": {}},
            f"'{Q_PROJ}' is described wrongly .* it is a int instead of a record",
        ),
        ({"shared": {"lm_head.weight": "nowhere"}}, "'lm_head.weight' shares the bytes of 'nowhere'"),
        (
            {"shared": {"lm_haed.weight": Q_PROJ}},
            "made for another LlamaForCausalLM.*no parameter 'lm_haed.weight'",
        ),
        (
            {"shared": {"lm_head.weight": Q_PROJ}},
            r"'lm_head.weight' has shape \[64, 32\] in the network, but \[32, 32\]",
        ),
    ],
)
def test_a_wrong_config(change, sentence, checkpoint):
    change_config(checkpoint, lambda config: config.update(change))
    load_both_ways(checkpoint, PackedFileError, sentence)


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"bits": 3}, "3 bits a code are given where the layout takes 0"),
        ({"layout": "zip"}, "layout 'zip' is unknown; known are entropy"),
        ({"crc32": "1"}, "at 'record.crc32': it is '1', but should be a whole number"),
        ({"parts": ["codebook"]}, "'parts' and 'lengths' should be lists of the same length"),
        ({"parts": ["codes", "codebook", "table"]}, "has the parts"),
        ({"shape": [8, 8]}, "non-zeros are impossible in 64 weights"),
        ({"color": "red"}, "unknown key 'color'"),
    ],
)
def test_a_wrong_record(change, sentence, checkpoint):
    change_config(checkpoint, lambda config: config["tensors"][Q_PROJ].update(change))
    load_both_ways(checkpoint, PackedFileError, f"Tensor '{Q_PROJ}' is described wrongly .*{sentence}")


def test_an_incomplete_record(checkpoint):
    change_config(checkpoint, lambda config: config["tensors"][Q_PROJ].pop("nonzeros"))
    load_both_ways(checkpoint, PackedFileError, f"Tensor '{Q_PROJ}' is described wrongly .*it has no 'nonzeros'")


def test_a_config_of_another_network(checkpoint):
    path = checkpoint / "config.json"
    config = json.loads(path.read_text())
    write_config(checkpoint, {**config, "intermediate_size": 64})
    sentence = r"another LlamaForCausalLM\. Parameter '.*' has shape \[32, 64\] in the network, but \[32, 48\]"
    load_both_ways(checkpoint, PackedFileError, sentence)
    write_config(checkpoint, {**config, "num_hidden_layers": 1})
    load_both_ways(
        checkpoint, PackedFileError, "has no parameter 'model.layers.1.mlp.down_proj.weight'; did you mean"
    )


def test_a_checkpoint_that_is_not_packed(tmp_path):
    tiny("llama").save_pretrained(tmp_path)
    with pytest.raises(PackedFileError, match=r"is no packed checkpoint .*: load it with transformers"):
        sqs_pyro.from_pretrained(tmp_path)
    with pytest.raises(PackedFileError, match="is no packed checkpoint"):
        checkpoint_size(tmp_path)
    with pytest.raises(
        NetworkError, match=r"does not compress a network while it is loaded: .*sqs_pyro\.compress"
    ):
        AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=SQSConfig())
    with pytest.raises(OSError, match="nowhere"):
        sqs_pyro.from_pretrained(tmp_path / "nowhere", local_files_only=True)


@pytest.mark.parametrize("device_map", [{"model": "cpu", "lm_head": "disk"}, {"model": 0, "lm_head": "cpu"}])
def test_offloading(device_map, checkpoint):
    with pytest.raises(NetworkError, match=r"device_map sends a packed network to .*: choose GPUs only"):
        sqs_pyro.from_pretrained(checkpoint, device_map=device_map)


def test_no_class_to_load_as(checkpoint):
    with pytest.raises(NetworkError, match=r"has no class 'AutoModelForCausalML': give auto_class="):
        sqs_pyro.from_pretrained(checkpoint, auto_class="AutoModelForCausalML")
    config = json.loads((checkpoint / "config.json").read_text())
    write_config(checkpoint, {**config, "architectures": None})
    with pytest.raises(NetworkError, match=r"is not told a class by config\.json: give auto_class="):
        sqs_pyro.from_pretrained(checkpoint)


def test_what_cannot_be_saved(tmp_path):
    net = nn.Linear(4, 4)
    packed = packed_network(net, {"weight": random_coded((4, 4), 3)})
    with pytest.raises(NetworkError, match="a PackedLinear was given that is none of transformers"):
        save_pretrained(packed, tmp_path)
    with pytest.raises(NetworkError, match="a LlamaForCausalLM was given that is not packed"):
        save_pretrained(tiny("llama"), tmp_path)
    dense = packed_tiny("llama").dequantize()
    with pytest.raises(NetworkError, match="that is not packed"):
        save_pretrained(dense, tmp_path)
    bert = tiny("bert")
    with pytest.raises(NetworkError, match=r"An ensemble of 2 draws is no transformers model: .*sqs_pyro\.save"):
        save_pretrained(packed_ensemble(bert, [code_matrices(bert)] * 2), tmp_path)
    with pytest.raises(NetworkError, match="tokenizer is a str without save_pretrained"):
        save_pretrained(packed_tiny("llama"), tmp_path, "gpt2")
    assert list(tmp_path.iterdir()) == []


def test_a_config_that_is_no_json(checkpoint):
    (checkpoint / "config.json").write_text("{")
    with pytest.raises(PackedFileError, match=r"config.json' is no JSON"):
        checkpoint_size(checkpoint)
