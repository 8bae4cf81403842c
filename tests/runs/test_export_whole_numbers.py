"""Exports for runtimes that multiply whole numbers: read back by the libraries whose formats they are."""

import json

import numpy as np
import pytest
import torch
from kits.packed_exports import on_no_grid, on_whole_numbers
from kits.tiny_transformers import packed_tiny, tiny

from sqs_pyro import integrations
from sqs_pyro.errors import NetworkError, OutputError
from sqs_pyro.kernels import packed_network
from sqs_pyro.packing.stored import stored_weights
from sqs_pyro.runs.export import export_file
from sqs_pyro.testing.layouts import random_coded

BITS = {15: 4, 31: 8}


def whole(name, components=15, make=on_whole_numbers, part=None, **changes):
    """A packed transformer, all of whose codewords are whole numbers; ``part`` inputs share a scale, else all."""
    net = tiny(name, **changes)
    names = list(stored_weights(packed_tiny(name)))
    coded = {}
    for seed, path in enumerate(names):
        shape = tuple(net.get_parameter(path).shape)
        count = shape[1] // part if part and shape[1] > part and shape[1] % part == 0 else False
        coded[path] = make(random_coded(shape, components, seed=seed, scales=count))
    return packed_network(net, coded)


def directory(net, place):
    integrations.save_pretrained(net, place)
    return place


@pytest.mark.parametrize("components", [15, pytest.param(31, marks=pytest.mark.slow)])
@pytest.mark.parametrize(
    ("name", "part"),
    [
        ("llama", 32),
        *(pytest.param(name, None, marks=pytest.mark.slow) for name in ("llama", "llama_tied", "bert", "qwen2")),
    ],
)
def test_compressed_tensors(name, part, components, tmp_path):
    compressed_tensors = pytest.importorskip("compressed_tensors")
    net = whole(name, components, part=part, intermediate_size=64)
    out = tmp_path / "out"
    document = export_file(directory(net, tmp_path / "packed"), "compressed-tensors", out)
    assert document["max_difference"] < 1e-4
    assert document["packed"].keys() | document["decoded"].keys() == stored_weights(net).keys()
    config = json.loads((out / "config.json").read_text())["quantization_config"]
    assert config["quant_method"] == "compressed-tensors"
    # Of parts: rows of 32 inputs have one scale, rows of 64 two, and so groups of their own.
    weights = {scheme["weights"]["strategy"]: scheme["weights"] for scheme in config["config_groups"].values()}
    assert {scheme["num_bits"] for scheme in weights.values()} == {BITS[components]}
    assert weights.keys() == ({"channel", "group"} if part else {"channel"})
    assert not part or weights["group"]["group_size"] == part
    # Unpacked by their own code: every number is the one that is in the packed file.
    from compressed_tensors.compressors.pack_quantized import unpack_from_int32
    from safetensors.torch import load_file

    assert compressed_tensors
    state = load_file(out / "model.safetensors")
    for path, said in document["packed"].items():
        coded, stem = stored_weights(net)[path].coded(), path.removesuffix(".weight")
        numbers = unpack_from_int32(
            state[f"{stem}.weight_packed"], BITS[components], torch.Size(state[f"{stem}.weight_shape"].tolist())
        )
        assert torch.equal(numbers, coded.whole_numbers()[0])
        assert torch.equal(state[f"{stem}.weight_scale"].float(), coded.scales.view(len(coded.scales), -1))
        of = "" if coded.scales.dim() == 1 else f", groups of {part}"
        assert said == f"pack-quantized, {BITS[components]} bits{of}"
    assert len(document["packed"]) >= 12


@pytest.mark.parametrize("components", [15, pytest.param(31, marks=pytest.mark.slow)])
@pytest.mark.parametrize(
    ("name", "part", "width"),
    [
        ("llama_tied", 32, 64),
        *(pytest.param(name, None, 32, marks=pytest.mark.slow) for name in ("llama_tied", "qwen2")),
    ],
)
def test_gguf(name, part, width, components, tmp_path):
    gguf = pytest.importorskip("gguf")
    net = whole(name, components, part=part, hidden_size=width)
    document = export_file(directory(net, tmp_path / "packed"), "gguf", tmp_path / "net.gguf")
    kind = "Q4_0" if components == 15 else "Q8_0"
    assert set(document["packed"].values()) == {f"GGUF, {kind}"}
    of_48_inputs = {name for name in stored_weights(net) if "down_proj" in name}
    assert document["decoded"].keys() == of_48_inputs
    assert document["max_difference"] < 2e-2  # those are rounded to float16
    read = gguf.GGUFReader(tmp_path / "net.gguf")
    tensors = {tensor.name: tensor for tensor in read.tensors}
    some = {"token_embd": "model.embed_tokens", "blk.1.ffn_gate": "model.layers.1.mlp.gate_proj"}
    for theirs, ours in some.items():
        tensor = tensors[f"{theirs}.weight"]
        assert tensor.tensor_type.name == kind
        found = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
        np.testing.assert_array_equal(found, stored_weights(net)[f"{ours}.weight"].coded().dense().numpy())
    if name == "llama_tied":  # llama.cpp turns pairs of neighbours, transformers halves
        tensor = tensors["blk.0.attn_q.weight"]
        found = gguf.quants.dequantize(tensor.data, tensor.tensor_type).reshape(4, -1, 2, width).swapaxes(1, 2)
        query = stored_weights(net)["model.layers.0.self_attn.q_proj.weight"].coded().dense()
        np.testing.assert_array_equal(found.reshape(-1, width), query.numpy())
    assert "output.weight" not in tensors  # which is that of the embedding
    again = export_file(tmp_path / "packed", "gguf", tmp_path / "net.gguf", overwrite=True)
    assert again == document


class TestRefusals:
    @pytest.mark.parametrize("form", ["compressed-tensors", "gguf"])
    def test_codewords_of_other_values(self, form, tmp_path):
        place = directory(whole("llama", make=on_no_grid), tmp_path / "packed")
        with pytest.raises(NetworkError, match=r"whole numbers .*blockwise\.grid: uniform"):
            export_file(place, form, tmp_path / "out")
        assert not (tmp_path / "out").exists()

    @pytest.mark.parametrize("form", ["compressed-tensors", "gguf"])
    def test_a_packed_file(self, form, tmp_path):
        (tmp_path / "packed.safetensors").write_bytes(b"")
        with pytest.raises(
            OutputError, match=rf"{form} is made of a packed Hugging Face directory, but .* is a file"
        ):
            export_file(tmp_path / "packed.safetensors", form, tmp_path / "out")

    def test_an_architecture_that_llama_cpp_has_otherwise(self, tmp_path):
        place = directory(whole("bert"), tmp_path / "packed")
        with pytest.raises(
            NetworkError, match=r"type 'bert' cannot be written as GGUF here: those of type llama, mistral"
        ):
            export_file(place, "gguf", tmp_path / "net.gguf")

    def test_another_programs_file_is_left_alone(self, tmp_path):
        place = directory(whole("llama"), tmp_path / "packed")
        (tmp_path / "net.gguf").write_bytes(b"GGUF of somebody else")
        with pytest.raises(OutputError, match="no export of format gguf that sqs-pyro wrote"):
            export_file(place, "gguf", tmp_path / "net.gguf", overwrite=True)
