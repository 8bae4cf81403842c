"""Hugging Face directories: packed checkpoints, and those that blockwise compression reads."""

import json
import shutil
from pathlib import Path
from random import Random
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from fuzz.kind import Kind
from fuzz.mutations import changed, damaged, json_text
from sqs_pyro import integrations
from sqs_pyro.integrations.checkpoint_documents import CONFIG_DIGEST, config_digest
from sqs_pyro.integrations.checkpoint_size import checkpoint_size


class PackedCheckpoints(Kind):
    """A packed checkpoint in shards: config.json, generation config, index and weights."""

    name = "hugging_face"

    def prepare(self, directory: Path) -> None:
        """A Llama of two layers."""
        from kits.tiny_transformers import packed_tiny

        self.good = directory / "good"
        net = packed_tiny("llama")
        integrations.save_pretrained(net, self.good, max_shard_size="8KB")
        self.x = torch.arange(6)[None]
        self.expected = net(self.x).logits
        self.files = sorted(path.name for path in self.good.iterdir() if path.suffix in (".json", ".safetensors"))

    def damage(self, directory: Path, random: Random) -> bool:
        """One of the files; half of the documents value by value."""
        self.path = directory / "checkpoint"
        shutil.rmtree(self.path, ignore_errors=True)
        shutil.copytree(self.good, self.path)
        file = self.path / random.choice(self.files)
        content = file.read_bytes()
        if file.suffix == ".json" and random.random() < 0.5:
            value = json.loads(content)
            part = value.get("quantization_config") if random.random() < 0.5 else None
            changed(value if part is None else part, random)
            made = json_text(value, random)
            if file.name == "config.json" and random.random() < 0.7:
                self._fit_digest(value)
        else:
            made = damaged(content, random)
        file.write_bytes(made)
        return file.name in ("config.json", "generation_config.json")

    def _fit_digest(self, config: Any) -> None:
        """Let the weights say that they were saved with another config."""
        for file in self.path.glob("*.safetensors"):
            metadata = {"format": "pt", CONFIG_DIGEST: config_digest(config)}
            save_file(load_file(file), file, metadata)

    def read(self, directory: Path) -> Any:
        """Load it, call it and count it."""
        net = integrations.from_pretrained(self.path)
        checkpoint_size(self.path)
        return net(self.x).logits

    def is_right(self, value: Any) -> bool:
        """Whether outputs are the same, bit for bit."""
        return torch.equal(value, self.expected)


class StreamedCheckpoints(PackedCheckpoints):
    """A dense checkpoint in shards, as blockwise compression reads it."""

    name = "streamed"

    def prepare(self, directory: Path) -> None:
        """A Llama of two layers."""
        from kits.tiny_transformers import tiny

        self.good = directory / "good"
        tiny("llama").save_pretrained(self.good, max_shard_size="8KB")
        self.files = sorted(path.name for path in self.good.iterdir() if path.suffix in (".json", ".safetensors"))

    def damage(self, directory: Path, random: Random) -> bool:
        """Weights without checksums may hold other values."""
        super().damage(directory, random)
        return True

    def read(self, directory: Path) -> Any:
        """Read every parameter once."""
        from sqs_pyro.integrations.streamed_weights import StreamedWeights, empty_network

        net = empty_network(self.path, torch.float32)
        with StreamedWeights(net, self.path).held(net):
            return sum(float(p.sum()) for p in net.parameters())
