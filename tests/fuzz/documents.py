"""Recipes, studies, and what runs leave."""

import json
from pathlib import Path
from random import Random
from typing import Any

import torch
import yaml
from safetensors.torch import save_file

from fuzz.kind import Documents, Kind
from fuzz.mutations import changed, damaged, json_text, yaml_text
from sqs_pyro.compression.checkpoint import read_checkpoint, write_checkpoint
from sqs_pyro.networks.state import load_weights
from sqs_pyro.runs.kinds import load_any_recipe
from sqs_pyro.runs.report.pages import report_of
from sqs_pyro.studies.recipe import load_study

_RUN = {
    "name": "small",
    "seed": 1,
    "network": {"name": "digits_net", "options": {"width": 8}},
    "data": {"name": "digits", "batch_size": 32},
    "baseline": {"epochs": 3, "learning_rate": 0.1},
    "compression": {"epochs": 3, "nonzero_rate": 0.3, "num_components": 4, "include": ["conv"]},
    "averaging": {"samples": 3, "candidates": [0.1, 0.5], "pack": True},
}
_LANGUAGE = {
    "name": "words",
    "network": {"path": "/nowhere", "dtype": "float32"},
    "text": {"source": "pydoc", "length": 64},
    "blockwise": {"bits": 3, "batch_size": 2},
}
_TASK = {"task": "classification", "network": {"path": "/nowhere"}, "data": {"source": "a.csv", "label": "y"}}


class Recipes(Documents):
    """Recipes of all kinds of runs."""

    name, file = "recipe", "recipe.yaml"

    def prepare(self, directory: Path) -> None:
        """Three kinds of runs."""
        self.good = [yaml.safe_dump(recipe, sort_keys=False).encode() for recipe in (_RUN, _LANGUAGE, _TASK)]

    def changed(self, content: bytes, random: Random) -> bytes:
        """Another line."""
        return yaml_text(content, random)

    def read(self, directory: Path) -> Any:
        """Read and write it."""
        return load_any_recipe(directory / self.file, ["seed=3"]).as_yaml()


class Studies(Recipes):
    """Studies of variants and grids."""

    name, file = "study", "study.yaml"

    def prepare(self, directory: Path) -> None:
        """One with all keys."""
        base = {key: _RUN[key] for key in ("network", "data", "baseline", "compression")}
        study = {
            "name": "s",
            "base": base,
            "seeds": [0, 1],
            "variants": {"a": {"set": {"compression.num_components": 4}}, "b": {"grid": {}}},
            "grid": {"compression.nonzero_rate": [0.1, 0.2]},
        }
        self.good = [yaml.safe_dump(study, sort_keys=False).encode()]

    def read(self, directory: Path) -> Any:
        """Read and write it."""
        return load_study(directory / self.file).as_yaml()


class Metrics(Documents):
    """``metrics.json`` of a run directory, as `sqs report` reads it."""

    name, file = "metrics", "metrics.json"

    def prepare(self, directory: Path) -> None:
        """Of an image run, as short as it can be."""
        figures = {"accuracy": 0.5, "nll": 1.0, "ece": 0.1, "brier": 0.2, "entropy": 0.3}
        tensor = {"name": "a", "shape": [2, 3], "layout": "dense", "bits": 2, "nonzeros": 3, "bytes": 4}
        parts = dict.fromkeys(("uncompressed", "manifest", "header", "padding"), 5)
        size = {"file_bytes": 10, "fp32_bytes": 20, "ratio": 2.0, "bits_per_weight": 3.0, "nonzero_rate": 0.5}
        document = {
            "name": "n",
            "seed": 0,
            "baseline": figures,
            "compressed": figures,
            "seconds": 1.0,
            "size": {**size, "parts": parts, "tensors": [tensor]},
            "findings": [{"kind": "k", "sentence": "s"}],
            "reliability": {"fp32": {"confidence": [0.2, 0.9], "accuracy": [0.1, 1.0], "counts": [3, 4]}},
            "latency": {"batch": {"1": {"dense_ms": 1.0, "packed_ms": 0.5}}},
            "machine": {"processor": "p", "instructions": ["avx2"]},
        }
        self.good = [json.dumps(document).encode()]

    def changed(self, content: bytes, random: Random) -> bytes:
        """Another value."""
        return json_text(changed(json.loads(content), random), random)

    def read(self, directory: Path) -> Any:
        """Read it, and make the tables and the page."""
        return report_of([directory])


class Weights(Kind):
    """State dicts from elsewhere, as ``baseline.checkpoint`` takes them; altered values cannot be told."""

    name = "weights"

    def prepare(self, directory: Path) -> None:
        """Of both formats."""
        self.net = torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.BatchNorm1d(3))
        torch.save({"state_dict": self.net.state_dict()}, directory / "w.pt")
        save_file(self.net.state_dict(), directory / "w.safetensors")
        self.good = {name: (directory / name).read_bytes() for name in ("w.pt", "w.safetensors")}

    def damage(self, directory: Path, random: Random) -> bool:
        """Damage bytes."""
        self.file, content = random.choice(list(self.good.items()))
        (directory / self.file).write_bytes(damaged(content, random))
        return True

    def read(self, directory: Path) -> Any:
        """Read them into a network."""
        load_weights(self.net, directory / self.file)


class Checkpoints(Kind):
    """State that is kept between runs: checkpoints, baselines, blocks and plans are one format."""

    name, file = "checkpoint", "checkpoint.pt"

    def prepare(self, directory: Path) -> None:
        """Tensors and plain data."""
        self.state = {"step": 3, "net": {"a": torch.randn(5, 4), "b": torch.arange(6)}, "seconds": 1.5}
        write_checkpoint(directory / self.file, self.state)
        self.good = (directory / self.file).read_bytes()

    def damage(self, directory: Path, random: Random) -> bool:
        """Damage bytes; the digest is part of them."""
        (directory / self.file).write_bytes(damaged(self.good, random))
        return False

    def read(self, directory: Path) -> Any:
        """Read it as whatever goes on from it."""
        return read_checkpoint(directory / self.file, frozenset(self.state))

    def is_right(self, value: Any) -> bool:
        """Whether the state is the same."""
        same = all(torch.equal(value["net"][name], tensor) for name, tensor in self.state["net"].items())
        return same and value["step"] == 3 and value["seconds"] == 1.5
