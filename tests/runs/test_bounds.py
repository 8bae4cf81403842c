"""Bounds at the end of a run are cheap, announced, and can be left out; what is certified stays exact."""

import functools

import pytest
import torch
from pydantic import ValidationError
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from sqs_pyro import CompressionResult, compress
from sqs_pyro.runs.posterior import run_bounds
from sqs_pyro.runs.recipe import BoundsRecipe, RunRecipe

_WHOLE = {"network": {"name": "digits_net"}, "data": {"name": "digits"}}


@functools.cache
def _compressed() -> CompressionResult:
    """A network whose draws differ."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 3))
    data = DataLoader(TensorDataset(torch.randn(32, 8), torch.randint(0, 3, (32,))), batch_size=8)
    recipe = {"epochs": 1, "num_components": 4, "nonzero_rate": 1.0, "initial_gate": 1.0}
    return compress(net, data, recipe)


def _minibatches():
    generator = torch.Generator().manual_seed(1)
    for _ in range(4):
        yield torch.randn(8, 8, generator=generator), torch.randint(0, 3, (8,), generator=generator)


def _measured(recipe: BoundsRecipe):
    """The bounds, the numbers of examples of all forward passes, and what progress was told."""
    result, passes, told = _compressed(), [], []
    hook = result.model.net[-1].register_forward_hook(lambda module, args, output: passes.append(len(output)))
    try:
        bounds = run_bounds(recipe, result, _minibatches(), 0, lambda *told_of: told.append(told_of))
    finally:
        hook.remove()
    return bounds, passes, told


def test_the_likelihood_is_of_a_share_of_the_data_and_stops_at_its_standard_error():
    costly, all_passes, _ = _measured(BoundsRecipe(examples=20, networks=6, standard_error=0))
    cheap, few_passes, _ = _measured(BoundsRecipe(examples=20, networks=6, standard_error=1e6))
    assert costly["num_examples"] == cheap["num_examples"] == 20
    assert set(all_passes) == set(few_passes) == {20}
    extra = len(all_passes) - 4 * 6  # of the first look at model and guide
    assert len(few_passes) == 4 * 2 + extra and extra <= 2
    for more, less in zip(costly["temperatures"], cheap["temperatures"], strict=True):
        for certified in ("lower", "jensen", "dominant", "gate_kl"):
            assert more["total"][certified] == less["total"][certified]
        assert less["nll_error"] > 0


def test_the_default_is_cheap():
    recipe = BoundsRecipe()
    most = 4 * recipe.networks * recipe.examples
    assert most <= 1024  # examples, and half of that where the standard error is reached at once
    _, passes, _ = _measured(BoundsRecipe(standard_error=1e6))
    assert sum(passes) <= 10 * 32  # 32 examples are all there are


def test_progress_has_a_stage_of_its_own_that_ends_full():
    _, _, told = _measured(BoundsRecipe(examples=8, standard_error=1e6))
    stages, done, totals, texts = zip(*told, strict=True)
    assert set(stages) == {"bounds"} and len(set(totals)) == 1 and set(texts) == {"8 examples"}
    assert list(done) == sorted(done) and done[-1] == totals[0]


@pytest.mark.parametrize(
    ("given", "found"),
    [(False, None), (None, None), (True, BoundsRecipe()), ({"networks": 2}, BoundsRecipe(networks=2))],
)
def test_a_recipe_says_how_much_or_none(given, found):
    recipe = RunRecipe(**_WHOLE, bounds=given)
    assert recipe.bounds == found
    assert RunRecipe(**recipe.model_dump(mode="json")) == recipe


def test_the_default_is_to_measure():
    assert RunRecipe(**_WHOLE).bounds == BoundsRecipe()


@pytest.mark.parametrize("given", ["no", 3, {"networks": 1}, {"examples": 0}])
def test_other_values_are_refused(given):
    with pytest.raises(ValidationError):
        RunRecipe(**_WHOLE, bounds=given)
