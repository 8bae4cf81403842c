"""What decides which weights are zero: sizes that are reached, at a given β or target, resumed exactly."""

import copy
from functools import cache

import pytest
import torch

from sqs_pyro import compress, save, size_report
from sqs_pyro.compression.baseline import BaselineRecipe, train_baseline
from sqs_pyro.compression.finetune.loop import Driver
from sqs_pyro.compression.finetune.recipe import CompressionRecipe
from sqs_pyro.data import load_data
from sqs_pyro.data.recipe import DataRecipe
from sqs_pyro.errors import RecipeError
from sqs_pyro.inference.guides.spike_gmm import SpikeGMMGuide
from sqs_pyro.models import BayesianNetwork, LearnedPrior
from sqs_pyro.networks.registry import build_network
from sqs_pyro.packing.layouts import pack_tensor
from sqs_pyro.recipes import parse

RATE_DISTORTION = {"allocation": "rate_distortion", "prior": {"kind": "learned"}}
ADAPTIVE = {**RATE_DISTORTION, "layout": "adaptive"}
STRUCTURED = {**RATE_DISTORTION, "prior": {"kind": "learned", "scope": "structured"}}
QUICK = {"epochs": 4, "num_components": 5, "learning_rate": 0.02, "pruning": {"every": 5}}


@pytest.fixture(scope="module")
def digits():
    return load_data(DataRecipe(name="digits"))


@pytest.fixture(scope="module")
def trained(digits):
    torch.manual_seed(0)
    net = build_network("digits_net", width=8)
    train_baseline(net, digits.train, None, BaselineRecipe(epochs=8))
    return net.eval()


def driver(net, digits, recipe, bits=None) -> Driver:
    recipe = CompressionRecipe(**QUICK, **recipe)
    prior = LearnedPrior(scope=recipe.prior.scope) if recipe.prior.kind == "learned" else None
    model = BayesianNetwork(copy.deepcopy(net), prior=prior, num_data=len(digits.train.dataset))
    guide = SpikeGMMGuide(
        model, recipe.num_components, temperature=recipe.temperature, stage="dense", estimator="straight_through"
    )
    torch.manual_seed(3)
    return Driver(model, guide, recipe, digits.train, bits=bits)


def packed_bits(d: Driver) -> int:
    layout = d.recipe.storage.layout
    return 8 * sum(pack_tensor(tensor, layout).num_bytes for tensor in d.guide.harden().values())


class TestSizes:
    @pytest.mark.parametrize(
        "recipe",
        [{}, RATE_DISTORTION, ADAPTIVE, pytest.param(STRUCTURED, marks=pytest.mark.slow)],
        ids=["schedule", "rate_distortion", "adaptive", "structured"],
    )
    def test_a_budget_is_kept(self, trained, digits, recipe):
        d = driver(trained, digits, recipe, bits=12_000)
        d.run()
        # A schedule cannot see how codes wander once they are coded; the learned prior does.
        assert packed_bits(d) == pytest.approx(12_000, rel=0.01 if recipe else 0.05)

    @pytest.mark.parametrize(("scope", "curvature"), [("layer", "network"), ("global", "layer")])
    def test_more_beta_is_a_smaller_file(self, trained, digits, scope, curvature):
        recipe = {**RATE_DISTORTION, "prior": {"kind": "learned", "scope": scope}, "curvature": curvature}
        bits = []
        for beta in (0.003, 0.3):
            d = driver(trained, digits, {**recipe, "kl_weight": beta})
            history = d.run()
            assert history[-1].kl_weight == beta
            bits.append(packed_bits(d))
        assert bits[0] > 1.5 * bits[1]

    @pytest.mark.parametrize(
        "recipe", [RATE_DISTORTION, ADAPTIVE, STRUCTURED], ids=["layer", "adaptive", "structured"]
    )
    def test_the_file_has_the_ratio_asked_for(self, trained, digits, recipe, tmp_path):
        result = compress(trained, digits.train, {**QUICK, **recipe, "target_ratio": 14})
        save(result.network, tmp_path / "packed.safetensors")
        size = size_report(tmp_path / "packed.safetensors")
        # Where the size is planned no weight is zero yet: masks, and what the manifest says of them, come on top.
        assert size.total == pytest.approx(size.fp32_bytes / 14, rel=0.01, abs=24)
        assert result.history[-1].kl_weight > 0
        assert "missed_size" not in {finding.kind for finding in result.findings}

    def test_a_file_that_codewords_cannot_fill_is_found(self, trained, digits):
        result = compress(
            trained, digits.train, {**QUICK, **RATE_DISTORTION, "num_components": 4, "target_ratio": 4}
        )
        (found,) = [finding for finding in result.findings if finding.kind == "missed_size"]
        assert found.measured == pytest.approx(4 / size_report(result.network).ratio)
        assert "target_ratio=4" in str(found) and "raise num_components" in str(found)

    def test_an_impossible_ratio_is_refused_before_training(self, trained, digits):
        with pytest.raises(RecipeError, match=r"asks for a file of .* bytes, but .* go to what is not compressed"):
            compress(trained, digits.train, {**QUICK, "target_ratio": 5000})

    @pytest.mark.parametrize(
        "recipe",
        [RATE_DISTORTION, pytest.param(STRUCTURED, marks=pytest.mark.slow)],
        ids=["layer", "structured"],
    )
    def test_the_prior_in_the_model_is_what_was_found(self, trained, digits, recipe):
        d = driver(trained, digits, recipe, bits=12_000)
        d.run()
        rates = {name: float((site.gates() > 0.5).float().mean()) for name, site in d.guide.site_guides().items()}
        for name, inclusion in d.model.prior.inclusions().items():
            assert float(inclusion.detach().mean()) == pytest.approx(rates[name], abs=0.05)


@pytest.fixture(scope="module")
def uninterrupted(trained, digits):
    """Runs by the scope of the learned prior, if any; several interrupted ones are held against each."""

    @cache
    def run(scope: str | None) -> Driver:
        recipe = {"layer": RATE_DISTORTION, "structured": STRUCTURED, None: {}}[scope]
        whole = driver(trained, digits, recipe, bits=12_000)
        whole.run()
        return whole

    return run


class TestResumption:
    # How a schedule goes on is known from test_loop.py: here only its budget's share of it.
    @pytest.mark.parametrize(
        ("recipe", "step"),
        [
            ({}, 10),
            *((RATE_DISTORTION, step) for step in (2, 10, 20, 30)),
            pytest.param(STRUCTURED, 20, marks=pytest.mark.slow),
        ],
    )
    def test_interrupted_equals_uninterrupted_bit_for_bit(
        self, trained, digits, uninterrupted, recipe, step, tmp_path
    ):
        whole = uninterrupted(recipe["prior"].get("scope", "layer") if recipe else None)

        def stop(record):
            if record.step >= step:
                raise KeyboardInterrupt

        first = driver(trained, digits, recipe, bits=12_000)
        first.progress = stop
        with pytest.raises(KeyboardInterrupt):
            first.run(tmp_path / "checkpoint.pt")
        second = driver(trained, digits, recipe, bits=12_000)
        second.run(tmp_path / "checkpoint.pt")
        expected = {**whole.guide.state_dict(), **whole.model.state_dict()}
        found = {**second.guide.state_dict(), **second.model.state_dict()}
        assert all(torch.equal(value, expected[name]) for name, value in found.items())
        assert [r.kl_weight for r in second.history] == [r.kl_weight for r in whole.history]


class TestRecipe:
    @pytest.mark.parametrize(
        ("values", "sentence"),
        [
            ({"allocation": "rate_distortion"}, "prior.kind 'learned' beside allocation"),
            ({**RATE_DISTORTION, "gate_learning_rate": 0.1}, "a gate_learning_rate of 0 beside"),
            ({**RATE_DISTORTION, "kl_weight": 0.0}, "a target_ratio or a positive kl_weight"),
            (
                {"target_ratio": 20, "layout": "bitmap"},
                "layout 'auto', 'entropy' or 'adaptive' beside target_ratio",
            ),
            (
                {"prior": {"kind": "learned", "scope": "structured"}},
                "allocation 'rate_distortion' beside prior.scope",
            ),
            ({**STRUCTURED, "layout": "entropy"}, "layout 'auto', 'structured' or 'adaptive' beside prior.scope"),
            ({"target_ratio": 0.5}, "target_ratio"),
        ],
    )
    def test_contradictions_are_named(self, values, sentence):
        with pytest.raises(RecipeError, match=sentence):
            parse(CompressionRecipe, values, "compression")
