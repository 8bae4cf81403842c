"""Packed transformers models as Hugging Face checkpoints: to the directory and back, exactly."""

import copy
import json
import math
from pathlib import Path

import pytest
import torch
from kits.tiny_transformers import MODELS, code_matrices, inputs, logits, packed_tiny, tiny
from safetensors.torch import load_file, save_file
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoModelForSequenceClassification

import sqs_pyro
from sqs_pyro.integrations import checkpoint_size, save_pretrained
from sqs_pyro.integrations.checkpoint_documents import CONFIG_DIGEST
from sqs_pyro.kernels import PackedEmbedding, PackedLinear, PackedWeight, dense_state, load, packed_network, save
from sqs_pyro.kernels.tiled import tiled_size
from sqs_pyro.packing import size_report


def packed_weights(net):
    return [module for module in net.modules() if isinstance(module, PackedWeight)]


def content(directory):
    return {path.name: path.read_bytes() for path in directory.iterdir() if path.name != "README.md"}


def assert_same_network(loaded, packed):
    assert torch.equal(logits(loaded), logits(packed))
    assert not loaded.training
    expected, state = packed.state_dict(), loaded.state_dict()
    assert state.keys() == expected.keys()
    for name, value in expected.items():
        assert value.dtype == state[name].dtype and torch.equal(value, state[name]), name


@pytest.mark.parametrize("name", MODELS)
def test_loaded_equals_saved(name, tmp_path):
    packed = packed_tiny(name)
    assert len(packed_weights(packed)) >= 10
    save_pretrained(packed, tmp_path / "net")
    loaded = sqs_pyro.from_pretrained(tmp_path / "net")
    assert type(loaded) is type(packed)
    assert_same_network(loaded, packed)


@pytest.mark.parametrize("layout", ["dense", "bitmap", "entropy"])
def test_every_layout(layout, tmp_path):
    packed = packed_tiny("llama", layout=layout)
    save_pretrained(packed, tmp_path)
    assert_same_network(AutoModelForCausalLM.from_pretrained(tmp_path), packed)


def test_a_codebook_for_each_row_and_one_of_float32(tmp_path):
    net = tiny("llama")
    packed = packed_network(net, code_matrices(net, groups=16, exact_half=False))
    save_pretrained(packed, tmp_path)
    assert_same_network(AutoModelForCausalLM.from_pretrained(tmp_path), packed)


def test_a_scale_for_each_row(tmp_path):
    net = tiny("llama_tied")
    packed = packed_network(net, code_matrices(net, scales=True))
    save_pretrained(packed, tmp_path / "first")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "first")
    assert_same_network(loaded, packed)
    assert loaded.config.quantization_config.format_version == 2
    loaded.save_pretrained(tmp_path / "second")
    save_pretrained(packed, tmp_path / "third")
    assert content(tmp_path / "second") == content(tmp_path / "third") == content(tmp_path / "first")
    dense = sqs_pyro.from_pretrained(tmp_path / "first", dequantize=True)
    torch.testing.assert_close(logits(dense), logits(packed))


@pytest.mark.parametrize("name", ["llama", "llama_tied", "bert_tied", "gpt2", "t5"])
def test_saving_again_gives_the_same_checkpoint(name, tmp_path):
    packed = packed_tiny(name)
    save_pretrained(packed, tmp_path / "first")
    loaded = sqs_pyro.from_pretrained(tmp_path / "first")
    loaded.save_pretrained(tmp_path / "second")
    save_pretrained(loaded, tmp_path / "third")
    assert content(tmp_path / "first") == content(tmp_path / "second") == content(tmp_path / "third")


def test_the_models_own_save_pretrained(tmp_path):
    packed = packed_tiny("qwen2")
    packed.save_pretrained(tmp_path / "own")
    save_pretrained(packed, tmp_path / "ours")
    assert content(tmp_path / "own") == content(tmp_path / "ours")
    copy.deepcopy(packed).save_pretrained(tmp_path / "copy")
    assert content(tmp_path / "copy") == content(tmp_path / "own")


def test_packing_leaves_the_dense_network_alone(tmp_path):
    net = tiny("llama_tied")
    packed_network(net, code_matrices(net)).save_pretrained(tmp_path / "packed")
    net.save_pretrained(tmp_path / "dense")
    assert "quantization_config" not in json.loads((tmp_path / "dense" / "config.json").read_text())
    assert torch.equal(logits(type(net).from_pretrained(tmp_path / "dense")), logits(net))


def test_what_is_pushed_to_the_hub_is_what_is_saved(tmp_path, monkeypatch):
    hub = pytest.importorskip("transformers.utils.hub")
    sent = {}

    class Card:
        save = staticmethod(lambda path: None)

    class Api:
        create_repo = staticmethod(lambda name, **_: type("Repository", (), {"repo_id": name}))

    def keep(self, directory, repository, *_, **__):
        sent.update({path.name: path.read_bytes() for path in Path(directory).iterdir()})

    monkeypatch.setattr(hub, "hf_api", Api)
    monkeypatch.setattr(hub, "create_and_tag_model_card", lambda *_, **__: Card)
    monkeypatch.setattr(hub.PushToHubMixin, "_upload_modified_files", keep)
    packed = packed_tiny("llama")
    packed.push_to_hub("you/small-llama")
    save_pretrained(packed, tmp_path, model_card=False)
    assert sent == {path.name: path.read_bytes() for path in tmp_path.iterdir()} and "model.safetensors" in sent


def test_what_is_in_the_files(tmp_path):
    packed = packed_tiny("qwen2", exclude=["embed"])
    save_pretrained(packed, tmp_path)
    stored = load_file(tmp_path / "model.safetensors")
    report = size_report(packed)
    assert stored.pop(CONFIG_DIGEST).shape == (32,)
    assert stored.pop("model.layers.0.self_attn.q_proj.weight").shape == (0,)  # the guard
    by_name = {row.name.replace(".weight", ".packed_weight.stored"): row.bytes for row in report.tensors}
    assert {name: value.numel() for name, value in stored.items() if value.dtype == torch.uint8} == by_name
    others = {name: value for name, value in stored.items() if name not in by_name}
    assert "model.embed_tokens.weight" in others and "lm_head.weight" not in others
    assert {value.dtype for value in others.values()} == {torch.float16}
    assert {row.layout for row in report.tensors} <= {"entropy", "adaptive"}
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["architectures"] == ["Qwen2ForCausalLM"]
    assert config["quantization_config"]["quant_method"] == "sqs"
    assert (tmp_path / "generation_config.json").exists()


@pytest.mark.parametrize("exclude", [[], ["embed", "shared"]])
@pytest.mark.parametrize("name", ["llama_tied", "bert_tied", "t5"])
def test_tied_weights_stay_tied(name, exclude, tmp_path):
    save_pretrained(packed_tiny(name, exclude), tmp_path)
    loaded = sqs_pyro.from_pretrained(tmp_path)
    embedding, head = loaded.get_input_embeddings(), loaded.get_output_embeddings()
    if exclude:
        assert embedding.weight is head.weight
        assert type(embedding) is nn.Embedding
    else:
        assert embedding.packed_weight is head.packed_weight
        assert isinstance(embedding, PackedEmbedding) and isinstance(head, PackedLinear)
    before = logits(loaded)
    loaded.tie_weights()  # as transformers does after many changes
    assert torch.equal(logits(loaded), before)


def test_packed_under_the_name_of_the_head(tmp_path):
    net = tiny("llama_tied")
    coded = code_matrices(net)
    coded["lm_head.weight"] = coded.pop("model.embed_tokens.weight")
    packed = packed_network(net, coded)
    save_pretrained(packed, tmp_path)
    assert_same_network(AutoModelForCausalLM.from_pretrained(tmp_path), packed)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_other_dtypes(dtype, tmp_path):
    packed = packed_tiny("qwen3", exclude=["embed"])
    save_pretrained(packed, tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=dtype)
    assert {p.dtype for p in loaded.parameters()} == {dtype}
    assert {b.dtype for w in packed_weights(loaded) for n, b in w.named_buffers() if n != "like"} == {torch.uint8}
    assert loaded.model.rotary_emb.inv_freq.dtype == torch.float32
    plain = tiny("qwen3")
    plain.load_state_dict(dense_state(packed))
    plain.save_pretrained(tmp_path / "plain")
    expected = logits(AutoModelForCausalLM.from_pretrained(tmp_path / "plain", dtype=dtype))
    assert expected.dtype == dtype and torch.equal(logits(loaded), expected)
    loaded.save_pretrained(tmp_path / "again")
    again = sqs_pyro.from_pretrained(tmp_path / "again")
    assert again.dtype == dtype and torch.equal(logits(again), expected)


def test_generate(tmp_path):
    packed = packed_tiny("llama_tied")
    save_pretrained(packed, tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    dense = sqs_pyro.from_pretrained(tmp_path, dequantize=True)
    options = {"max_new_tokens": 6, "do_sample": False}
    expected = dense.generate(**inputs(dense), **options)
    assert expected.shape == (2, 13)
    for net in (packed, loaded):
        assert torch.equal(net.generate(**inputs(net), **options), expected)
        static = net.generate(**inputs(net), **options, cache_implementation="static")
        assert torch.equal(static, expected)


@pytest.mark.parametrize("name", MODELS)
def test_the_way_back(name, tmp_path):
    packed = packed_tiny(name)
    save_pretrained(packed, tmp_path / "packed")
    dense = sqs_pyro.from_pretrained(tmp_path / "packed", dequantize=True)
    plain = tiny(name)
    plain.load_state_dict(dense_state(packed))
    assert [type(m) for m in dense.modules()] == [type(m) for m in plain.modules()]
    assert dense.state_dict().keys() == plain.state_dict().keys()
    assert torch.equal(logits(dense), logits(plain))
    assert all(parameter.requires_grad for parameter in dense.parameters())
    dense.save_pretrained(tmp_path / "dense")
    plain.save_pretrained(tmp_path / "plain")
    weights = [load_file(tmp_path / name / "model.safetensors") for name in ("dense", "plain")]
    assert weights[0].keys() == weights[1].keys()
    assert "quantization_config" not in json.loads((tmp_path / "dense" / "config.json").read_text())
    assert torch.equal(logits(type(plain).from_pretrained(tmp_path / "dense")), logits(plain))


def test_the_way_back_by_the_config(tmp_path):
    packed = packed_tiny("llama_tied")
    save_pretrained(packed, tmp_path)
    config = AutoConfig.from_pretrained(tmp_path)
    config.quantization_config["dequantize"] = True
    dense = AutoModelForCausalLM.from_pretrained(tmp_path, config=config)
    assert not packed_weights(dense) and dense.lm_head.weight is dense.model.embed_tokens.weight
    assert torch.equal(logits(dense), logits(packed))
    (tmp_path / "config.json").write_text(config.to_json_string())
    assert torch.equal(logits(sqs_pyro.from_pretrained(tmp_path, dequantize=True)), logits(packed))


def test_the_way_back_in_another_dtype_and_without_a_checkpoint():
    packed = packed_tiny("bert")
    expected = logits(packed)
    dense = packed.dequantize()
    assert dense is packed
    torch.testing.assert_close(logits(dense), expected)
    half = packed_tiny("llama_tied").dequantize(dtype=torch.bfloat16)
    assert {p.dtype for p in half.parameters()} == {torch.bfloat16}
    assert half.model.rotary_emb.inv_freq.dtype == torch.float32
    assert half.lm_head.weight is half.model.embed_tokens.weight


def test_the_base_of_a_saved_network(tmp_path):
    packed = packed_tiny("llama_tied")
    save_pretrained(packed, tmp_path / "whole")
    base = AutoModel.from_pretrained(tmp_path / "whole")
    expected = packed.model(**inputs(packed)).last_hidden_state
    assert torch.equal(base(**inputs(base)).last_hidden_state, expected)
    base.save_pretrained(tmp_path / "base")
    again = AutoModel.from_pretrained(tmp_path / "base")
    assert torch.equal(again(**inputs(again)).last_hidden_state, expected)
    whole = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    assert torch.equal(whole.model(**inputs(whole)).last_hidden_state, expected)


def test_another_head(tmp_path):
    packed = packed_tiny("llama")
    save_pretrained(packed, tmp_path)
    options = {"auto_class": "AutoModelForSequenceClassification", "num_labels": 3}
    net = sqs_pyro.from_pretrained(tmp_path, **options)
    assert logits(net).shape == (2, 3)
    expected = packed.model(**inputs(packed)).last_hidden_state
    assert torch.equal(net.model(**inputs(net)).last_hidden_state, expected)


@pytest.mark.parametrize("auto_class", [AutoModelForSequenceClassification, "AutoModelForSequenceClassification"])
def test_auto_classes(auto_class, tmp_path):
    packed = packed_tiny("bert")
    save_pretrained(packed, tmp_path)
    assert_same_network(sqs_pyro.from_pretrained(tmp_path, auto_class=auto_class), packed)


def test_what_transformers_is_told(tmp_path):
    save_pretrained(packed_tiny("llama"), tmp_path)
    loaded = sqs_pyro.from_pretrained(tmp_path)
    assert loaded.is_quantized and loaded.quantization_method == "sqs"
    assert loaded.hf_quantizer.is_serializable() and loaded.hf_quantizer.is_compileable
    assert not loaded.hf_quantizer.is_trainable
    assert loaded.config.quantization_config.tensors.keys() == {row.name for row in size_report(loaded).tensors}


def test_loading_info(tmp_path):
    save_pretrained(packed_tiny("llama"), tmp_path)
    dense, info = sqs_pyro.from_pretrained(tmp_path, dequantize=True, output_loading_info=True)
    assert not packed_weights(dense)
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]


@pytest.mark.parametrize("device_map", ["cpu", "auto", {"": "cpu"}])
def test_device_map(device_map, tmp_path):
    packed = packed_tiny("llama_tied")
    save_pretrained(packed, tmp_path)
    loaded = sqs_pyro.from_pretrained(tmp_path, device_map=device_map)
    assert torch.equal(logits(loaded.to("cpu")), logits(packed))


def test_shards(tmp_path):
    packed = packed_tiny("llama")
    save_pretrained(packed, tmp_path, max_shard_size=2000)
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    assert_same_network(sqs_pyro.from_pretrained(tmp_path), packed)
    assert_sizes_are_those_on_the_disk(tmp_path)


def test_the_packed_file_of_a_loaded_checkpoint(tmp_path):
    net = tiny("bert")
    packed = packed_network(net, code_matrices(net), metadata={"metrics": {"accuracy": 0.75}})
    save_pretrained(packed, tmp_path / "net")
    loaded = sqs_pyro.from_pretrained(tmp_path / "net")
    assert loaded.packed_metadata == packed.packed_metadata
    save(loaded, tmp_path / "file")
    assert torch.equal(logits(load(tmp_path / "file", net)), logits(packed))
    assert size_report(tmp_path / "file").parts == size_report(loaded).parts
    load(tmp_path / "file", net).save_pretrained(tmp_path / "again")
    assert content(tmp_path / "again") == content(tmp_path / "net")


class FloatingWeights(TorchDispatchMode):
    """Refuse real floating tensors as large as a compressed matrix."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for value in result if isinstance(result, (tuple, list)) else [result]:
            if isinstance(value, torch.Tensor) and value.is_floating_point() and not value.is_meta:
                assert value.numel() < 16 * 32, f"{function} made {value.dtype} {list(value.shape)}"
        return result


def test_no_weight_is_decoded_while_loading(tmp_path, monkeypatch):
    save_pretrained(packed_tiny("llama_tied", layout="entropy"), tmp_path)
    monkeypatch.setenv("HF_DEACTIVATE_ASYNC_LOAD", "1")  # the mode sees its own thread only
    with FloatingWeights():
        loaded = sqs_pyro.from_pretrained(tmp_path)
    with pytest.raises(AssertionError, match="float32"), FloatingWeights():
        logits(loaded)
    held = sum(t.nbytes for t in {id(t): t for t in (*loaded.parameters(), *loaded.buffers())}.values())
    codes = sum(weight.codes.nbytes for weight in packed_weights(loaded))
    sizes = {"tiled": lambda shape: tiled_size(shape, 3), "dense": lambda shape: -(-3 * math.prod(shape) // 8)}
    assert codes == sum(sizes[weight.form](weight.shape) for weight in packed_weights(loaded))
    assert held < codes + 2000  # tables, norms, rotary frequencies
    assert loaded.get_memory_footprint() == held


def assert_sizes_are_those_on_the_disk(directory):
    size = checkpoint_size(directory)
    files = {path.name: path.stat().st_size for path in directory.iterdir()}
    assert size.total + sum(size.besides.values()) == sum(files.values())
    assert all(part >= 0 for part in size.parts.values())
    return size


def test_honest_size(tmp_path):
    packed = packed_tiny("qwen2", exclude=["embed"])
    save_pretrained(packed, tmp_path, Tokenizer())
    size, report = assert_sizes_are_those_on_the_disk(tmp_path), size_report(packed)
    for part in ("codes", "masks", "codebooks", "tables"):
        assert size.parts[part] == getattr(report, part)
    assert size.parts["uncompressed"] == 2 * sum(p.numel() for p in packed.parameters())
    assert (size.fp32_bytes, size.num_weights, size.nonzeros) == (
        *(report.fp32_bytes, report.num_weights),
        report.nonzeros,
    )
    assert size.bits_per_weight == report.bits_per_weight
    assert size.besides.keys() == {"README.md", "tokenizer.json"}
    assert size.ratio == report.fp32_bytes / size.total


class Tokenizer:
    """All that saving asks of one."""

    def save_pretrained(self, directory):
        (directory / "tokenizer.json").write_text("{}")


def test_model_card(tmp_path):
    packed = packed_tiny("llama")
    save_pretrained(packed, tmp_path / "small-llama", Tokenizer())
    card = (tmp_path / "small-llama" / "README.md").read_text()
    assert card.startswith("---\nlibrary_name: transformers\n")
    assert "import sqs_pyro" in card and 'sqs_pyro.from_pretrained("small-llama")' in card
    assert str(tmp_path) not in card
    size = checkpoint_size(tmp_path / "small-llama")
    assert f"| **total** | **{size.total:,}** |" in card
    assert f"{size.fp32_bytes:,} | {size.ratio:.2f} times" in card
    rows = [line.split("|")[2] for line in card.splitlines() if line.startswith("| ") and "**" not in line][1:-1]
    assert sum(int(row.replace(",", "")) for row in rows) == size.total


def test_a_card_of_ones_own_is_left_alone(tmp_path):
    packed = packed_tiny("llama")
    (tmp_path / "README.md").write_text("mine")
    save_pretrained(packed, tmp_path)
    assert (tmp_path / "README.md").read_text() == "mine"
    save_pretrained(packed, tmp_path / "without", model_card=False)
    assert not (tmp_path / "without" / "README.md").exists()


def test_compiles_into_one_graph_as_a_transformer_does(tmp_path):
    packed = packed_tiny("bert")
    save_pretrained(packed, tmp_path)
    loaded = sqs_pyro.from_pretrained(tmp_path)
    torch._dynamo.reset()
    compiled = torch.compile(loaded, fullgraph=True, backend="eager")
    with torch.no_grad():
        assert torch.equal(compiled(**inputs(loaded)).logits, logits(packed))


def test_a_file_with_other_tensors_too(tmp_path):
    packed = packed_tiny("llama")
    save_pretrained(packed, tmp_path)
    stored = load_file(tmp_path / "model.safetensors")
    save_file({**stored, "extra": torch.ones(3)}, tmp_path / "model.safetensors", {"format": "pt"})
    assert_same_network(sqs_pyro.from_pretrained(tmp_path), packed)
