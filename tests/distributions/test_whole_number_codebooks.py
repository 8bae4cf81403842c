"""Codebooks of whole numbers times a step: the constraint, the fit, and guides and files that keep to it."""

import copy
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kits.packed_exports import on_no_grid
from torch import nn
from torch.distributions import biject_to
from torch.utils.data import DataLoader, TensorDataset

from sqs_pyro import compress, load, save
from sqs_pyro.distributions.kmeans import kmeans_1d
from sqs_pyro.distributions.uniform_grid import UniformGrid, best_step, grid_numbers, uniform_codebook
from sqs_pyro.errors import ArgumentError
from sqs_pyro.inference import SpikeGMMGuide
from sqs_pyro.models import BayesianNetwork
from sqs_pyro.packing import CodedTensor
from sqs_pyro.packing.coded import scaled
from sqs_pyro.packing.stored import stored_weights
from sqs_pyro.testing.layouts import random_coded


class TestConstraint:
    @settings(max_examples=30)
    @given(st.integers(1, 40), st.floats(-8, 8))
    def test_there_and_back(self, k, log_step):
        transform = biject_to(UniformGrid(k))
        x = torch.tensor([[log_step], [log_step - 1]], dtype=torch.float64)
        y = transform(x)
        assert y.shape == (2, k) and UniformGrid(k).check(y).all()
        torch.testing.assert_close(transform.inv(y), x)
        assert transform.forward_shape((2, 1)) == (2, k) and transform.inverse_shape((2, k)) == (2, 1)

    def test_other_codebooks_are_not_of_the_form(self):
        assert not UniformGrid(3).check(torch.tensor([[-2.0, -1.0, 1.5]])).any()
        assert not UniformGrid(2).check(torch.tensor([[1.0, -1.0]])).any()

    def test_least_squares(self):
        values, mass = torch.randn(1, 7, dtype=torch.float64) + torch.linspace(-3, 3, 7), torch.rand(1, 7) + 0.1
        numbers, step = grid_numbers(7), float(best_step(values, mass.double()))

        def error(s):
            return float((mass * (values - s * numbers) ** 2).sum())

        assert all(error(step) <= error(other * step) for other in (0.9, 0.999, 1.001, 1.1))


class TestFit:
    @pytest.mark.parametrize("k", [2, 3, 7, 15])
    def test_no_other_step_is_better_by_much(self, k):
        values = torch.randn(2, 4000, generator=torch.Generator().manual_seed(0)).double()
        values[1] *= 3
        mass = torch.rand(2, 4000, generator=torch.Generator().manual_seed(1)).double()
        found = uniform_codebook(values, k, mass)
        numbers = grid_numbers(k).double()

        def error(row, step):
            return float((mass[row] * (values[row, :, None] - step * numbers).square().amin(1)).sum())

        for row in (0, 1):
            assert UniformGrid(k).check(found.loc[row])
            least = min(error(row, step) for step in torch.linspace(0.01, 6, 600).tolist())
            assert float(found.inertia[row]) <= 1.01 * least
        assert torch.allclose(found.mixing.sum(1), torch.ones(2).double()) and (found.mixing > 0).all()
        # It is a special case of K-means' clusters.
        assert (found.inertia >= 0.999 * kmeans_1d(values, k, mass).inertia).all()

    def test_values_that_are_on_a_grid_are_found(self):
        numbers = torch.randint(1, 8, (1, 500)) * (1 - 2 * torch.randint(0, 2, (1, 500)))
        found = uniform_codebook(0.37 * numbers.float(), 15)
        torch.testing.assert_close(found.loc[0, -1] / 7, torch.tensor(0.37))
        assert (found.scale > 0).all()

    def test_rows_of_which_nothing_counts(self):
        """Groups whose weights are all pruned, or zero: steps of the size that weights have, or had."""
        values = torch.cat([torch.randn(2, 200, generator=torch.Generator().manual_seed(0)), torch.zeros(1, 200)])
        counts = torch.tensor([[1.0], [0.0], [1.0]]).expand(3, 200)
        found = uniform_codebook(values, 3, counts)
        expected = uniform_codebook(values[:2], 3)
        torch.testing.assert_close(found.loc[:2], expected.loc)
        torch.testing.assert_close(found.loc[2], expected.loc.mean(0), rtol=0.3, atol=0)  # before they are refined
        assert (found.scale > 1e-4).all()

    @pytest.mark.parametrize("values", [torch.zeros(1, 20), torch.full((1, 20), 0.5)])
    def test_constant_weights(self, values):
        found = uniform_codebook(values, 3, torch.ones_like(values))
        assert all(part.isfinite().all() for part in (found.loc, found.scale, found.mixing))


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(16, 24), nn.ReLU(), nn.Linear(24, 4))


def batches():
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(256, 16, generator=generator)
    return DataLoader(TensorDataset(x, x[:, :4].argmax(1)), batch_size=32)


RECIPES = {
    "schedule": {"num_components": 7, "nonzero_rate": 0.5},
    "codebooks of channels": {"num_components": 3, "groups": "channel", "nonzero_rate": 0.5},
    "of parts of channels": {"num_components": 3, "groups": 8, "nonzero_rate": 0.5},
    "soft": {"num_components": 7, "estimator": "soft", "nonzero_rate": 0.5},
    "rate_distortion": {
        "num_components": 15,
        "allocation": "rate_distortion",
        "prior": {"kind": "learned"},
        "kl_weight": 0.02,
        "layout": "entropy",
    },
}


@pytest.mark.parametrize(
    "name",
    [
        "codebooks of channels",
        "of parts of channels",
        "rate_distortion",
        *(pytest.param(name, marks=pytest.mark.slow) for name in ("schedule", "soft")),
    ],
)
def test_what_ships_are_whole_numbers_times_a_step(name, tmp_path):
    recipe = {"epochs": 4, "grid": "uniform", **RECIPES[name]}
    result = compress(network(), batches(), recipe)
    save(result.network, tmp_path / "packed")
    loaded = load(tmp_path / "packed", network())
    weights = stored_weights(loaded)
    assert set(weights) == {"0.weight", "2.weight"}
    for weight in weights.values():
        coded = weight.coded()
        numbers, scales = coded.whole_numbers()
        assert torch.equal(scaled(numbers.float(), scales), coded.dense())
        # One codebook for all, and steps beside it.
        of = {"codebooks of channels": weight.shape[:1]}
        of["of parts of channels"] = (weight.shape[0], weight.shape[1] // 8)
        assert coded.num_groups == 1 and (
            coded.scales is None if name not in of else coded.scales.shape == of[name]
        )
        assert int(numbers.abs().max()) <= 8 and coded.nonzeros > 0
        assert coded.codebook_dtype == "float16"  # steps are of few bits
    x = torch.randn(5, 16)
    assert torch.equal(loaded(x), result.network(x))


def test_the_step_learns_and_nothing_else_of_the_codebook():
    model = BayesianNetwork(network(), likelihood="categorical", num_data=256)
    guide = SpikeGMMGuide(model, 7, estimator="straight_through", grid="uniform")
    site = next(iter(guide.site_guides().values()))
    assert site.loc_unconstrained.shape == (1, 1)
    before = site.loc.detach().clone()
    distribution = guide.distribution(site)
    distribution.rsample().square().sum().backward()
    assert site.loc_unconstrained.grad.abs() > 0
    with torch.no_grad():
        site.loc_unconstrained += 0.1
    torch.testing.assert_close(site.loc, before * torch.tensor(0.1).exp())


def test_a_guide_goes_on_from_its_state():
    model = BayesianNetwork(network(), likelihood="categorical", num_data=256)
    guide = SpikeGMMGuide(model, 7, estimator="straight_through", grid="uniform")
    state = copy.deepcopy(guide.state_dict())
    sites = list(guide.site_guides().values())
    before = [site.loc.detach().clone() for site in sites]
    for site in sites:
        site.loc = 2 * site.loc.detach()
    guide.load_state_dict(state)
    assert all(torch.equal(site.loc, loc) for site, loc in zip(sites, before, strict=True))


def test_a_weight_of_zeros_is_one_of_whole_numbers():
    zeros = CodedTensor(
        torch.zeros(3, 4, dtype=torch.uint8), torch.zeros(3, 4, dtype=torch.bool), torch.zeros(1, 1)
    )
    numbers, scales = zeros.whole_numbers()
    assert not numbers.any() and torch.equal(scales, torch.ones(3))


def test_codewords_of_other_values_are_none():
    coded = on_no_grid(random_coded((6, 8), 5, seed=3))
    assert coded.whole_numbers() is None
    assert replace(coded, codebook=torch.tensor([[1.0, 2.0, 3.0, 4.0, 4.5]])).whole_numbers()[1][0] == 0.5
    assert replace(coded, codebook=torch.tensor([[1.0, 2.0, 3.0, 4.0, 200.0]])).whole_numbers() is None
    # Two codebooks of four rows' weights each would share a row of three.
    assert random_coded((3, 8), 2, groups=2).whole_numbers() is None


@pytest.mark.parametrize("options", [{"grid": "even"}, {"grid": None}])
def test_unknown_grids(options):
    model = BayesianNetwork(network(), likelihood="categorical", num_data=256)
    with pytest.raises(ArgumentError, match=r"grid is .*, but must be free or uniform"):
        SpikeGMMGuide(model, 7, **options)


def test_codes_that_are_there_have_codewords_of_their_own():
    model = BayesianNetwork(network(), likelihood="categorical", num_data=256)
    coded = SpikeGMMGuide(model, 7, estimator="straight_through").harden()
    with pytest.raises(ArgumentError, match="grid is 'uniform' beside coded, whose codewords are what they are"):
        SpikeGMMGuide(model, 7, estimator="straight_through", coded=coded, grid="uniform")
