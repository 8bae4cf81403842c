"""Every key of a compression's recipe has an effect on weights, file or training; held against its fields."""

import json
from functools import cache
from typing import Any, get_origin

import pyro
import pytest
import torch
from kits.outcome import outcome
from pydantic import BaseModel
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from sqs_pyro import compress, size_report
from sqs_pyro.compression.finetune.recipe import CompressionRecipe

USUAL = {
    "epochs": 2,
    "num_components": 3,
    "nonzero_rate": 0.5,
    "batch_norm_batches": 2,
    "kl_weight": 1.0,
    "kl_every": 1,
    "refresh_every": 1,
    "learning_rate": 0.2,
    "coding_start": 0.3,
    "freeze_start": 0.7,
    "pruning": {"every": 1, "end": 0.5},
}
RATE_DISTORTION = {"allocation": "rate_distortion", "prior": {"kind": "learned"}, "kl_weight": 0.05}
OUTLIERS = {
    "windows": {"kind": "outlier_aware", "count": 2, "tail_count": 4},
    "num_components": 8,
    "learning_rate": 1e-3,
}
SOFT, GATES = {"estimator": "soft"}, {"gate_learning_rate": 0.3, "initial_gate": 1.0}
#: Another value of each key; beside it what else must be so for the key to mean anything.
OTHER: dict[str, Any] = {
    "epochs": 3,
    "nonzero_rate": 0.25,
    "allocation": ("rate_distortion", {"prior": {"kind": "learned"}}),
    "target_ratio": 1.2,
    "curvature": ("layer", RATE_DISTORTION),
    "num_components": 2,
    "include": ("5.weight",),
    "exclude": ("0.weight",),
    "layers.3.skip": True,
    "layers.3.num_components": 2,
    "layers.3.nonzero_rate": 0.25,
    "groups": "channel",
    "grid": "uniform",
    "windows.kind": "equal_mass",
    "windows.count": (4, {"windows": {"kind": "equal_mass", "count": 5}}),
    "windows.tail_count": (1, OUTLIERS),
    "prior.kind": "laplace",
    "prior.inclusion": (0.1, GATES),
    "prior.slab_scale": 0.05,
    "prior.degrees_of_freedom": (2.5, {"prior": {"kind": "student_t"}}),
    "prior.spike_scale": (0.02, {**GATES, "prior": {"kind": "gaussian_spike"}, "kl": "monte_carlo"}),
    "prior.concentration1": (20.0, {**GATES, "prior": {"kind": "hierarchical"}}),
    "prior.concentration0": (20.0, {**GATES, "prior": {"kind": "hierarchical"}}),
    "prior.scope": ("global", RATE_DISTORTION),
    "pruning.start": 0.4,
    "pruning.end": 0.7,
    "pruning.every": 3,
    "pruning.scope": "layer",
    "pruning.saliency": "gate",
    "distillation": {"weight": 0.5},
    "distillation.weight": (0.9, {"distillation": {"weight": 0.5}}),
    "distillation.temperature": (5.0, {"distillation": {"weight": 0.5}}),
    "kl": "monte_carlo",
    "kl_weight": 0.1,
    "kl_every": 2,
    "temperature": (3.0, SOFT),
    "final_temperature": (1.0, SOFT),
    "estimator": "concrete",
    "coding_start": 0.5,
    "freeze_start": 0.9,
    "refresh_every": 4,
    "learning_rate": 0.1,
    "optimizer": "adamw",
    "momentum": 0.5,
    "weight_decay": 0.3,
    "codebook_learning_rate": 0.2,
    "gate_learning_rate": 0.1,
    "initial_gate": 1.0,
    "shards": 2,
    "precision": "bfloat16",
    "batch_norm_batches": 0,
    "layout": "dense",
    "leftover_dtype": "float32",
    "codebook_dtype": "float32",
    "evaluate_every": 2,
    "patience": (1, {"epochs": 6, "freeze_start": 0.5}),
}


def keys(section: type[BaseModel], prefix: str = "") -> list[str]:
    """Names of all fields, those of inner sections as ``section.field``."""
    found = []
    for name, field in section.model_fields.items():
        parts = [field.annotation, *getattr(field.annotation, "__args__", ())]
        inner = next((part for part in parts if isinstance(part, type) and issubclass(part, BaseModel)), None)
        if inner is None or field.default is None:  # a section that may be left out is a choice by itself, too
            found.append(prefix + name)
        if inner is not None:
            by_pattern = get_origin(field.annotation) is dict  # "3" is a layer of the network below
            found += keys(inner, f"{prefix}{name}.3." if by_pattern else f"{prefix}{name}.")
    return found


def network() -> nn.Module:
    pyro.set_rng_seed(0)
    hidden = nn.Linear(20, 20)
    hidden.weight.data[:4, :4] *= 8  # outliers
    return nn.Sequential(
        nn.Linear(4, 20), nn.BatchNorm1d(20), nn.ReLU(), hidden, nn.Dropout(0.2), nn.Linear(20, 2)
    )


def compressed(**recipe: Any) -> Any:
    net, y = network(), torch.arange(24) % 2
    loader = DataLoader(TensorDataset(torch.randn(24, 4) + 2 * y[:, None], y), batch_size=8)
    result = compress(net, loader, recipe, validation=loader)
    rows = [(row.name, row.layout, row.components, row.groups) for row in size_report(result.network).tensors]
    return result.hard, rows, [(record.stage, record.nll, record.score) for record in result.history]


def changed(recipe: dict[str, Any], key: str, value: Any) -> dict[str, Any]:
    first, _, rest = key.partition(".")
    return {**recipe, first: changed(recipe.get(first, {}), rest, value) if rest else value}


def split(key: str) -> tuple[Any, dict[str, Any]]:
    """A key's other value, and the recipe in which it means something."""
    other = OTHER[key]
    value, needed = other if isinstance(other, tuple) and isinstance(other[-1], dict) else (other, {})
    return value, {**USUAL, **needed}


def test_every_key_is_in_the_table():
    assert set(OTHER) == set(keys(CompressionRecipe))


@pytest.fixture(scope="module")
def before():
    """What a recipe comes to; most keys start from the same one."""
    return cache(lambda recipe: outcome(compressed, **json.loads(recipe)))


@pytest.mark.parametrize("key", OTHER)
def test_it_has_an_effect(key, before):
    value, recipe = split(key)
    usual, other = before(json.dumps(recipe)), outcome(compressed, **changed(recipe, key, value))
    assert "refused" not in (usual[0], other[0]), (usual, other)
    assert other != usual
