"""Whatever a recipe allows, the code takes: every number at its smallest and largest allowed value."""

import functools
import typing
from collections.abc import Iterator

import pyro
import pytest
import torch
from pydantic import ValidationError
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from sqs_pyro import compress, size_report
from sqs_pyro.compression.blockwise.laplace import LayerLikelihood
from sqs_pyro.compression.blockwise.recipe import BlockwiseRecipe
from sqs_pyro.compression.blockwise.sequential_coding import fit
from sqs_pyro.compression.finetune.call import _prior
from sqs_pyro.compression.finetune.loop import Driver
from sqs_pyro.compression.finetune.recipe import CompressionRecipe
from sqs_pyro.errors import DivergenceError
from sqs_pyro.inference.guides.spike_gmm import SpikeGMMGuide
from sqs_pyro.models import BayesianNetwork
from sqs_pyro.recipes import RecipeSection
from sqs_pyro.runs.recipe import AveragingRecipe, BoundsRecipe

_STEP = 1e-9  # from a limit that is not itself allowed
_NEEDED = {  # what else a key needs to have an effect
    "windows.count": {"windows": {"kind": "equal_mass"}},
    "windows.tail_count": {"windows": {"kind": "outlier_aware"}},
    "prior.degrees_of_freedom": {"prior": {"kind": "student_t"}},
    "prior.spike_scale": {"prior": {"kind": "gaussian_spike"}},
    "prior.concentration1": {"prior": {"kind": "hierarchical"}},
    "prior.concentration0": {"prior": {"kind": "hierarchical"}},
    "pruning.start": {"pruning": {"end": 1}, "freeze_start": 1},
    "pruning.end": {"pruning": {"start": 0}, "freeze_start": 1},
    "coding_start": {"freeze_start": 1},
    "freeze_start": {"coding_start": 0, "pruning": {"start": 0, "end": 1e-10}},
    "initial_gate": {"gate_learning_rate": 0.01},
}
# Their limit is the network's or the data's size, checked with the sentence that says so.
_OF_THE_NETWORK = {
    ("num_components", 256),
    ("nonzero_rate", 1e-4),
    ("layers.0.num_components", 256),
    ("shards", 65536),
}


def limits(section: type[RecipeSection], path: str = "") -> Iterator[tuple[str, float]]:
    """The dotted keys of all numbers of a section, each with the smallest and the largest that is allowed."""
    for name, field in section.model_fields.items():
        kinds = [field.annotation, *typing.get_args(field.annotation)]
        inner = next((k for k in kinds if isinstance(k, type) and issubclass(k, RecipeSection)), None)
        if inner is not None:
            by_pattern = typing.get_origin(field.annotation) is dict  # "0" is a layer of the network below
            yield from limits(inner, f"{path}{name}.0." if by_pattern else f"{path}{name}.")
        elif kind := next((k for k in kinds if k in (int, float)), None):
            yield from ((path + name, value) for value in _ends(field.metadata, kind))


def _ends(metadata: list, kind: type) -> Iterator[float]:
    step = 1 if kind is int else _STEP
    for name, beyond in (("ge", 0), ("gt", step), ("le", 0), ("lt", -step)):
        for value in (getattr(item, name, None) for item in metadata):
            if value is not None:
                yield kind(value + beyond)


def _changed(values: dict, key: str, value: object) -> dict:
    first, _, rest = key.partition(".")
    return {**values, first: _changed(values.get(first, {}), rest, value) if rest else value}


@functools.cache
def _subject() -> tuple[nn.Module, DataLoader]:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 3))
    data = TensorDataset(torch.randn(32, 8), torch.randint(0, 3, (32,)))
    return net, DataLoader(data, batch_size=8)


def _recipe(key: str, value: float) -> CompressionRecipe:
    small = {"epochs": 1, "num_components": 4, "batch_norm_batches": 1}
    return CompressionRecipe(**_changed({**small, **_NEEDED.get(key, {})}, key, value))


_COMPRESSION = [each for each in limits(CompressionRecipe) if each not in _OF_THE_NETWORK]
_CASES = pytest.mark.parametrize(("key", "value"), _COMPRESSION, ids=lambda each: str(each))


def test_every_number_of_compression_is_tried():
    assert len({key for key, _ in _COMPRESSION}) > 25


@_CASES
def test_compression_is_built_at_every_limit(key, value):
    net, loader = _subject()
    recipe = _recipe(key, value)
    model = BayesianNetwork(net, prior=_prior(recipe.prior), num_data=32)
    guide = SpikeGMMGuide(
        model,
        recipe.num_components,
        recipe.windows.build(),
        recipe.temperature,
        initial_gate=recipe.initial_gate,
        estimator="straight_through",
    )
    with pyro.get_param_store().scope():
        driver = Driver(model, guide, recipe, loader)
        x, y = next(iter(loader))
        assert driver.elbo.loss(model, guide, x, y) > -float("inf")
    assert all(site.gates(guide.gate_temperature).min() > 0.5 for site in guide.site_guides().values())


@pytest.mark.slow
@_CASES
def test_compression_ends_at_every_limit(key, value):
    """In a network that is not empty, or in a sentence that names what to lower."""
    net, loader = _subject()
    try:
        result = compress(net, loader, _recipe(key, value), validation=loader)  # `patience` needs it
    except DivergenceError as error:
        assert "lower" in str(error)
        return
    assert result.network(torch.randn(4, 8)).isfinite().all()
    if key != "epochs" or value > 0:  # pruning and K-means alone have no history
        assert result.history[-1].nonzero_rate > 0
    assert size_report(result.network).nonzero_rate > 0


@pytest.mark.parametrize(
    ("key", "value"),
    [each for each in limits(BlockwiseRecipe) if each[0] in ("bits", "num_components", "rounds", "damping")],
    ids=lambda each: str(each),
)
def test_blockwise_coding_takes_every_limit(key, value):
    recipe = BlockwiseRecipe(**{"num_components": 255, key: value})
    torch.manual_seed(0)
    x = torch.randn(64, 6)
    likelihood = LayerLikelihood(torch.randn(8, 6), x.T @ x / 64, torch.ones(8)).damped(recipe.damping)
    coding = fit(likelihood, bits=recipe.bits, max_components=recipe.num_components, rounds=recipe.rounds)
    assert coding.codewords.isfinite().all()


@pytest.mark.parametrize("section", [AveragingRecipe, BoundsRecipe])
def test_small_sections_are_bounded_where_they_are_read(section):
    for key, value in limits(section):
        assert getattr(section(**{key: value}), key) == value


@pytest.mark.parametrize(
    ("recipe", "values"),
    [
        (BlockwiseRecipe, {"rounds": 0}),
        (CompressionRecipe, {"groups": 0}),
        (CompressionRecipe, {"groups": -4}),
        (CompressionRecipe, {"windows": {"kind": "equal_mass", "count": 10**9}}),
        (CompressionRecipe, {"prior": {"inclusion": 1 - 1e-12}}),
        (CompressionRecipe, {"kl_every": 10**9}),
        (CompressionRecipe, {"initial_gate": 1e-12}),
    ],
    ids=str,
)
def test_what_the_code_refuses_or_cannot_mean_is_refused_by_the_recipe(recipe, values):
    with pytest.raises(ValidationError):
        recipe(**values)
