"""Priors of a network, swapped by one argument: their scales, their parameters, their life with a guide."""

import copy
from typing import get_args

import pyro
import pytest
import torch
from torch import nn

from sqs_pyro import SQSELBO, BayesianNetwork, SpikeGMMGuide, compress, size_report
from sqs_pyro.distributions import SpikeAndMixture, kl_bound
from sqs_pyro.errors import NetworkError
from sqs_pyro.inference.recipe import CompressionRecipe, PriorRecipe
from sqs_pyro.models import LearnedPrior, scale_matched_prior

KINDS = get_args(PriorRecipe.model_fields["kind"].annotation)


def mlp() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 2))


def batches(n: int = 60, batch: int = 12) -> torch.utils.data.DataLoader:
    torch.manual_seed(1)
    y = torch.arange(n) % 2
    x = torch.randn(n, 6) + 3 * y[:, None]
    return torch.utils.data.DataLoader(torch.utils.data.TensorDataset(x, y), batch_size=batch)


class TestScaleMatched:
    @pytest.mark.parametrize("slab", ["normal", "laplace", "student_t"])
    def test_slab_has_the_layers_root_mean_square(self, slab):
        weight = torch.randn(50, 40)
        law = scale_matched_prior(0.3, slab, degrees_of_freedom=5.0)("w", weight)
        torch.testing.assert_close(law.slab.variance, weight.square().mean())
        assert law.inclusion.item() == pytest.approx(0.3)
        assert scale_matched_prior(0.3, slab, slab_scale=0.05)("w", weight).slab.scale.item() == pytest.approx(
            0.05
        )

    def test_sentences(self):
        with pytest.raises(NetworkError, match="Slab 'cauchy' is unknown: use 'normal', 'laplace' or 'student_t'"):
            scale_matched_prior(0.5, "cauchy")
        with pytest.raises(NetworkError, match="degrees_of_freedom is 2, but must be above 2"):
            scale_matched_prior(0.5, "student_t", degrees_of_freedom=2)


class TestLearnedPrior:
    def test_shares_the_guides_components(self):
        model = BayesianNetwork(mlp(), prior=LearnedPrior(), num_data=60)
        before = model.priors["0.weight"].base_dist
        guide = SpikeGMMGuide(model, num_components=4)
        for name, site in guide.site_guides().items():
            law = model.priors[name].base_dist
            assert isinstance(law, SpikeAndMixture) and law.batch_shape == site.shape
            assert torch.equal(law.codebook_loc, site.loc) and torch.equal(law.codebook_scale, site.scale)
            torch.testing.assert_close(law.log_mixing, site.mixing_logits.log_softmax(-1))
        assert before.num_components == 16  # of its own, while there was no guide

    def test_components_without_a_guide_have_the_weights_moments(self):
        net = mlp()
        model = BayesianNetwork(net, prior=LearnedPrior())
        for name, law in model.priors.items():
            weight = net.get_parameter(name)
            mixing = law.base_dist.log_mixing.exp()
            mean = (mixing * law.base_dist.codebook_loc).sum()
            second = (mixing * (law.base_dist.codebook_loc**2 + law.base_dist.codebook_scale**2)).sum()
            torch.testing.assert_close(mixing.sum(), torch.tensor(1.0))
            torch.testing.assert_close(mean, weight.mean(), atol=1e-6, rtol=1e-5)
            torch.testing.assert_close(second, weight.square().mean(), rtol=1e-3, atol=0)

    def test_prior_predictive(self):
        model = BayesianNetwork(mlp(), prior=LearnedPrior(0.3), num_data=60)
        samples = pyro.infer.Predictive(model, {}, num_samples=200)(torch.randn(5, 6))
        assert samples["obs"].shape == (200, 5)
        assert 0.25 < float((samples["0.weight"] != 0).float().mean()) < 0.35

    @pytest.mark.parametrize("scope", ["layer", "global"])
    def test_inclusion_in_closed_form_is_the_elbos_optimum(self, scope):
        model = BayesianNetwork(mlp(), prior=LearnedPrior(0.5, scope), num_data=60)
        guide = SpikeGMMGuide(model, num_components=4, stage="dense")
        gates = {name: torch.rand(site.shape) for name, site in guide.site_guides().items()}
        for name, site in guide.site_guides().items():
            site.gate_logit = gates[name].logit()

        def kl() -> torch.Tensor:
            return sum(kl_bound(guide.distribution(s), model.priors[n].base_dist).sum() for n, s in guides.items())

        guides = guide.site_guides()
        model.prior.set_inclusion({name: float(gate.mean()) for name, gate in gates.items()})
        (gradient,) = torch.autograd.grad(kl(), model.prior.inclusion_unconstrained)
        torch.testing.assert_close(gradient, torch.zeros_like(gradient), atol=1e-4, rtol=0)
        assert len(gradient) == (2 if scope == "layer" else 1)

    def test_everything_shared_learns(self):
        x, y = next(iter(batches()))
        model = BayesianNetwork(mlp(), prior=LearnedPrior(), num_data=60)
        guide = SpikeGMMGuide(model, num_components=4, estimator="soft", temperature=0.5)
        svi = pyro.infer.SVI(model, guide, pyro.optim.Adam({"lr": 1e-2}), loss=SQSELBO())
        before = {name: p.detach().clone() for name, p in (*model.named_parameters(), *guide.named_parameters())}
        losses = [svi.step(x, y) for _ in range(20)]
        assert losses[-1] < losses[0]
        learning = {n: p for n, p in (*model.named_parameters(), *guide.named_parameters()) if p.requires_grad}
        assert "prior.inclusion_unconstrained" in learning
        assert not [name for name, p in learning.items() if torch.equal(p, before[name])]

    def test_state_survives_save_and_load(self):
        model = BayesianNetwork(mlp(), prior=LearnedPrior())
        model.prior.set_inclusion({"0.weight": 0.2, "2.weight": 0.7})
        other = BayesianNetwork(mlp(), prior=LearnedPrior())
        other.load_state_dict(model.state_dict())
        assert [round(rho.item(), 4) for rho in other.prior.inclusions().values()] == [0.2, 0.7]
        twin = copy.deepcopy(model).double()
        assert twin.priors["0.weight"].base_dist.codebook_loc.dtype == torch.float64
        assert twin.priors["0.weight"].base_dist.inclusion.dtype == torch.float64

    def test_sentences(self):
        model = BayesianNetwork(mlp(), prior=LearnedPrior())
        with pytest.raises(NetworkError, match=r"no probability for 2\.weight"):
            model.prior.set_inclusion({"0.weight": 0.2})
        with pytest.raises(NetworkError, match=r"inclusion is 1\.0"):
            LearnedPrior(1.0)
        with pytest.raises(NetworkError, match="scope is 'net', but must be 'layer' or 'global'"):
            LearnedPrior(scope="net")


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_the_recipe_compresses_to_a_packed_network(kind):
    recipe = CompressionRecipe(prior={"kind": kind}, epochs=3, num_components=4, kl_every=1)
    result = compress(mlp(), batches(), recipe)
    assert result.history[-1].kl == pytest.approx(result.history[-1].kl) and result.history[-1].kl > 0
    sites = result.model.site_values()
    kept = sum(int((result.hard.get_parameter(name) != 0).sum()) for name in sites)
    assert kept == round(recipe.nonzero_rate * sum(weight.numel() for weight in sites.values()))
    assert size_report(result.network).nonzeros == kept


@pytest.mark.parametrize("kind", KINDS)
def test_compression_resumes_with_every_kind(kind, tmp_path):
    """A checkpoint holds what a prior has learned."""
    recipe = CompressionRecipe(prior={"kind": kind}, epochs=2, num_components=4, kl_every=1)
    whole = compress(mlp(), batches(), recipe, checkpoint=tmp_path / "whole")

    def stop(record):
        if record.step == 5:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        compress(mlp(), batches(), recipe, checkpoint=tmp_path / "parts", progress=stop)
    parts = compress(mlp(), batches(), recipe, checkpoint=tmp_path / "parts")
    state = whole.model.state_dict()
    assert all(torch.equal(value, state[name]) for name, value in parts.model.state_dict().items())
