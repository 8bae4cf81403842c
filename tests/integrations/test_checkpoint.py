"""A checkpoint compressed block by block: the same bytes as in memory, and what is said of a bad one."""

import json
import os
import signal

import pytest
import torch
from kits import forks

from sqs_pyro import compress_transformer, save
from sqs_pyro.compression.blockwise.store import BlockStore
from sqs_pyro.errors import NetworkError, OutputError, ResourceError
from sqs_pyro.integrations.checkpoint import compress_checkpoint

transformers = pytest.importorskip("transformers")
streamed_weights = pytest.importorskip("sqs_pyro.integrations.streamed_weights")

SMALL = {
    "vocab_size": 48,
    "hidden_size": 16,  # an even allocation takes the longer, the more weights differ in a layer
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 32,
    "initializer_range": 0.2,
}
RECIPE = {"bits": 3.5, "allocation": "even", "batch_size": 4, "rounds": 1}
KINDS = [("Llama", "ForCausalLM"), ("Qwen2", "ForCausalLM"), ("Bert", "Model"), ("Bert", "ForMaskedLM")]
STORED = [(torch.float32, "6KB"), (torch.bfloat16, "1GB")]
#: Each kind with its ends tied and not, stored in either way.
CASES = [
    pytest.param(*kind, tied, *STORED[(i + tied) % 2], marks=[pytest.mark.slow] * (i % 2 != tied))
    for i, kind in enumerate(KINDS)
    for tied in (False, True)
]


def write(path, kind="Llama", head="ForCausalLM", tied=False, dtype=torch.float32, shard="6KB"):
    torch.manual_seed(0)
    few = {} if kind == "Bert" else {"num_key_value_heads": 2}
    config = getattr(transformers, f"{kind}Config")(**SMALL, **few, tie_word_embeddings=tied)
    net = getattr(transformers, f"{kind}{head}")(config).to(dtype).eval()
    net.save_pretrained(path, max_shard_size=shard)
    return type(net)


def sequences():
    return torch.randint(0, 48, (8, 16), generator=torch.Generator().manual_seed(1))


def in_memory(cls, path, out, **changes):
    net = cls.from_pretrained(path, dtype=torch.float32).eval()
    save(compress_transformer(net, sequences(), RECIPE | changes).network, out)
    return out.read_bytes()


@pytest.mark.parametrize(("kind", "head", "tied", "dtype", "shard"), CASES)
def test_same_file_as_in_memory(kind, head, tied, dtype, shard, tmp_path):
    cls = write(tmp_path / "net", kind, head, tied, dtype, shard)
    assert (tmp_path / "net" / streamed_weights.INDEX).exists() == (shard == "6KB")
    result = compress_checkpoint(tmp_path / "net", sequences(), RECIPE, directory=tmp_path / "blocks")
    save(result.network, tmp_path / "streamed")
    assert (tmp_path / "streamed").read_bytes() == in_memory(cls, tmp_path / "net", tmp_path / "whole")


@pytest.mark.slow
def test_settled_leftovers_are_the_same(tmp_path):
    cls = write(tmp_path / "net")
    recipe = RECIPE | {"settle_steps": 3}
    result = compress_checkpoint(tmp_path / "net", sequences(), recipe, directory=tmp_path / "blocks")
    save(result.network, tmp_path / "streamed")
    whole = in_memory(cls, tmp_path / "net", tmp_path / "whole", settle_steps=3)
    assert (tmp_path / "streamed").read_bytes() == whole


def test_one_block_in_memory(tmp_path, monkeypatch):
    write(tmp_path / "net")
    net = streamed_weights.empty_network(tmp_path / "net", torch.float32)
    weights = streamed_weights.StreamedWeights(net, tmp_path / "net")
    assert all(p.is_meta for p in net.parameters())
    with weights.held(net.model.layers[1]):
        real = {name for name, p in net.named_parameters() if not p.is_meta}
    assert real and all(name.startswith("model.layers.1.") for name in real)
    assert all(p.is_meta for p in net.parameters())


def _killed_in_second_block(path, blocks):
    torch.set_num_threads(1)
    write_block = BlockStore.write

    def die(self, i, block):
        if i == 1:  # compressed, but not yet kept
            os.kill(os.getpid(), signal.SIGKILL)
        write_block(self, i, block)

    BlockStore.write = die
    compress_checkpoint(path, sequences(), RECIPE, directory=blocks)


@pytest.mark.slow
def test_killed_and_resumed(tmp_path):
    cls = write(tmp_path / "net")
    script = (
        "import sys; from integrations.test_checkpoint import _killed_in_second_block as run; run(*sys.argv[1:])"
    )
    killed = forks.run(script, tmp_path / "net", tmp_path / "blocks", imported=forks.LIBRARY)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert [p.name for p in (tmp_path / "blocks").glob("block-*.pt")] == ["block-000.pt"]
    result = compress_checkpoint(tmp_path / "net", sequences(), RECIPE, directory=tmp_path / "blocks")
    save(result.network, tmp_path / "streamed")
    assert (tmp_path / "streamed").read_bytes() == in_memory(cls, tmp_path / "net", tmp_path / "whole")


def test_blocks_of_another_checkpoint_are_left_alone(tmp_path):
    write(tmp_path / "net")
    arguments = (sequences(), RECIPE)
    compress_checkpoint(tmp_path / "net", *arguments, directory=tmp_path / "blocks")
    write(tmp_path / "other", dtype=torch.bfloat16)
    with pytest.raises(NetworkError, match=r"made of another network \('.*' has other values\)"):
        compress_checkpoint(tmp_path / "other", *arguments, directory=tmp_path / "blocks")
    compress_checkpoint(tmp_path / "net", *arguments, directory=tmp_path / "blocks")


def fails(path, kind, text, recipe=RECIPE):
    with pytest.raises(kind, match=text):
        compress_checkpoint(path, sequences(), recipe, directory=path.parent / "blocks")


def test_bad_checkpoints(tmp_path):
    path = tmp_path / "net"
    write(path)
    fails(path, NetworkError, r"'importance' needs .* GB in memory", RECIPE | {"allocation": "importance"})
    shard = sorted(path.glob("model-*.safetensors"))[1]
    content = shard.read_bytes()
    shard.write_bytes(content[:20])
    fails(path, NetworkError, "truncated or damaged")
    shard.unlink()
    fails(path, NetworkError, rf"lacks the shards {shard.name}")
    shard.write_bytes(content)
    index = path / streamed_weights.INDEX
    placed = json.loads(index.read_text())
    placed["weight_map"]["model.more.weight"] = shard.name
    index.write_text(json.dumps(placed))
    fails(path, NetworkError, r"'model.more.weight' is in")
    index.write_text("{}")
    fails(path, NetworkError, "weight_map")
    index.unlink()
    fails(path, NetworkError, "neither model.safetensors nor")
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps(config | {"model_type": "gptj"}))
    fails(path, NetworkError, "'gptj' .* unknown")
    (path / "config.json").unlink()
    fails(path, NetworkError, "no config.json")


@pytest.mark.parametrize(
    "error",
    [OSError(28, "No space left on device"), MemoryError(), RuntimeError("can't allocate memory: 9 bytes")],
)
def test_no_room_keeps_finished_blocks(error, tmp_path, monkeypatch):
    write(tmp_path / "net")
    write_block = BlockStore.write

    def full(self, i, block):
        if i == 1:
            raise error
        write_block(self, i, block)

    monkeypatch.setattr(BlockStore, "write", full)
    fails(tmp_path / "net", (OutputError, ResourceError), "finished blocks are kept in")
    assert (tmp_path / "blocks" / "block-000.pt").exists()
