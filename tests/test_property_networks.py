"""Any network, any recipe: what ships is what was asked for and trained, and nothing else has changed.

Networks come from the catalogue in ``kits.networks``. The fast tests take every network once and every recipe
several times; the slow ones take several recipes for every network, each recipe with many networks.
"""

import copy
import os
from collections import Counter

import pytest
import sympy  # noqa: F401  torch imports it late, and it adds a filter of warnings
import torch
from kits.network_case import Minibatches, Network, built
from kits.networks import BUILT, NETWORKS, TIMM
from torch import nn

from sqs_pyro import CompressionResult, compress, size_report
from sqs_pyro.errors import RecipeError
from sqs_pyro.shipping.pack import network_with, reestimate_batch_norm
from sqs_pyro.testing.shipped import assert_equal_outputs, assert_shipped, outputs
from sqs_pyro.testing.untouched import untouched

COMPONENTS = 3
QUICK = {"epochs": 1, "num_components": COMPONENTS, "nonzero_rate": 0.5, "batch_norm_batches": 2}
RATIO = 1.5  # a file of a few thousand weights is half names and header
TARGET = {"target_ratio": RATIO, "prior": {"kind": "learned"}}
#: What a recipe changes, by name; what depends on the network is filled in by :func:`recipe_for`.
RECIPES = {
    "default": {},
    "everything": {"nonzero_rate": 0.4},
    "channel": {"groups": "channel", "num_components": 1},
    "dense": {"layout": "dense", "leftover_dtype": "float32"},
    "bitmap": {"layout": "bitmap", "codebook_dtype": "float32"},
    "entropy": {"layout": "entropy", "pruning": {"scope": "layer", "saliency": "gate"}},
    "learned": {**TARGET, "gate_learning_rate": 0.01},
    "rate_distortion": {**TARGET, "allocation": "rate_distortion"},
    "distillation": {"distillation": {"weight": 0.7}, "nonzero_rate": 0.9},
    "adamw": {"optimizer": "adamw", "learning_rate": 1e-3, "batch_norm_batches": 0, "nonzero_rate": 1.0},
    "soft": {"estimator": "soft", "windows": {"kind": "outlier_aware", "count": 4, "tail_count": 2}},
    "concrete": {"estimator": "concrete", "kl": "monte_carlo", "prior": {"kind": "gaussian_spike"}},
    "bfloat16": {"precision": "bfloat16", "kl": "dominant", "windows": {"kind": "equal_mass", "count": 8}},
}
NAMES, RECIPE_NAMES = list(NETWORKS), list(RECIPES)


def applicable(network: str, recipe: str) -> bool:
    return recipe != "distillation" or NETWORKS[network].classifier


def rotated(network: str, count: int) -> list[tuple[str, str]]:
    """``count`` recipes of a network, others for each, evenly over all recipes."""
    start, step = 5 * NAMES.index(network), len(RECIPE_NAMES) // count
    names = [RECIPE_NAMES[(start + k * step) % len(RECIPE_NAMES)] for k in range(count)]
    return [(network, name if applicable(network, name) else "default") for name in names]


FAST = [rotated(network, 1)[0] for network in NAMES[::2] if network not in TIMM]
#: More of them for networks made for their difficulties, fewer for large ones; ``SQS_EVERY_RECIPE=1`` takes twice
#: as many.
MORE = 2 if os.environ.get("SQS_EVERY_RECIPE") else 1
SEVERAL = {name: MORE * (4 if name in BUILT else 1 if name in TIMM else 2) for name in NAMES}
MANY = {pair for name, count in SEVERAL.items() for pair in rotated(name, count)}


@pytest.mark.parametrize(("network", "recipe"), FAST)
def test_every_network(network, recipe):
    check(NETWORKS[network], recipe)


@pytest.mark.slow
@pytest.mark.parametrize(("network", "recipe"), sorted(MANY - {*FAST}))
def test_many_recipes(network, recipe):
    check(NETWORKS[network], recipe)


def test_every_recipe_is_among_the_fast_ones():
    assert {recipe for _, recipe in FAST} == set(RECIPES) and len(FAST) >= 30


def test_every_recipe_meets_many_difficult_networks():
    met = Counter(recipe for name, recipe in MANY if name in BUILT)
    assert all(met[recipe] >= 7 for recipe in RECIPES)


def check(network: Network, name: str) -> None:
    net, loader, recipe = built(network), Minibatches(network), recipe_for(network, name)
    with untouched(net):
        try:
            result = compress(net, loader, recipe, likelihood=network.likelihood)
        except RecipeError as refusal:
            # Of a network whose names and norms alone are larger than the file asked for.
            assert "target_ratio" in recipe and "asks for a file of" in str(refusal)
            return
        half = any(parameter.dtype is torch.bfloat16 for parameter in net.parameters())
        before = trained(result, loader)
        for inputs, _ in Minibatches(network, minibatches=1, size=5, seed=2):
            assert_shipped(result, inputs, relative=1e-2 if half else 1e-5)
            rounding = 1e-4 if recipe.get("leftover_dtype") == "float32" and not half else 3e-2
            assert_equal_outputs(outputs(before, inputs), outputs(result.network, inputs), rounding)
    assert_buffers_kept(net, result.hard)
    if "target_ratio" in recipe:
        assert size_report(result.network).ratio >= 0.9 * RATIO


def packable(network: Network) -> tuple[str, ...]:
    """Patterns of every floating parameter that has as many weights as a codebook has values."""
    parameters = built(network).named_parameters()
    names = (n for n, p in parameters if p.is_floating_point() and p.numel() >= COMPONENTS)
    return tuple(f"^{name}$" for name in names)


def recipe_for(network: Network, name: str) -> dict:
    recipe = {**QUICK, **RECIPES[name]}
    if name == "everything":
        recipe["include"] = packable(network)
    elif network.include is not None:
        recipe["include"] = network.include
    return recipe


def trained(result: CompressionResult, loader: Minibatches) -> nn.Module:
    """The network as it was trained, with its coded weights: nothing folded, nothing else rounded."""
    coded = {name: tensor.dense() for name, tensor in result.guide.harden().items()}
    net = network_with(copy.deepcopy(result.model.net), coded)
    if result.recipe.batch_norm_batches:
        reestimate_batch_norm(net, loader, result.recipe.batch_norm_batches)
    return net


def assert_buffers_kept(net: nn.Module, hard: nn.Module) -> None:
    """Every buffer that is not a norm's statistics is the user's, element by element, up to 0.1 %."""
    norms = (nn.modules.batchnorm._NormBase,)
    statistics = {id(buffer) for m in hard.modules() if isinstance(m, norms) for buffer in m.buffers()}
    kept = dict(net.named_buffers())
    for name, buffer in hard.named_buffers():
        if id(buffer) not in statistics:
            torch.testing.assert_close(buffer, kept[name], rtol=1e-3, atol=0, equal_nan=True)
