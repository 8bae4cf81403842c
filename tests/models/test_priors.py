"""Priors of a network, swapped by one argument: their scales, their parameters, their life with a guide."""

import copy
from typing import get_args

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import scipy.stats
import torch
from torch import nn

from sqs_pyro import SQSELBO, BayesianNetwork, SpikeGMMGuide, compress, size_report
from sqs_pyro.compression.finetune.recipe import CompressionRecipe, PriorRecipe
from sqs_pyro.distributions import SpikeAndMixture, kl_bound
from sqs_pyro.errors import NetworkError, RecipeError
from sqs_pyro.inference import NaturalGradient
from sqs_pyro.models import (
    Gaussian,
    HierarchicalInclusion,
    LearnedPrior,
    LearnedSlab,
    gaussian_spike_prior,
    normal_prior,
    scale_matched_prior,
)
from sqs_pyro.models.network_prior import HyperPrior
from sqs_pyro.testing.statistics import assert_distribution, bernoulli_kl

KINDS = get_args(PriorRecipe.model_fields["kind"].annotation)


def mlp() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 2))


def batches(n: int = 60, batch: int = 12) -> torch.utils.data.DataLoader:
    torch.manual_seed(1)
    y = torch.arange(n) % 2
    x = torch.randn(n, 6) + 3 * y[:, None]
    return torch.utils.data.DataLoader(torch.utils.data.TensorDataset(x, y), batch_size=batch)


class TestLearnedSlab:
    def test_learns_the_width_of_included_weights(self):
        torch.manual_seed(0)
        net = nn.Sequential(nn.Linear(30, 1))
        x, truth = torch.randn(200, 30), 4 * torch.randn(30) * (torch.arange(30) < 10)
        model = BayesianNetwork(net, LearnedSlab(0.5, 0.7), Gaussian(0.5), num_data=200, include=".*")
        guide = SpikeGMMGuide(model, num_components=1)
        svi = pyro.infer.SVI(model, guide, NaturalGradient(guide, others_args={"lr": 0.05}), SQSELBO())
        for _ in range(400):
            svi.step(x, (x @ truth + 3 + 0.5 * torch.randn(200))[:, None])
        weight, _ = guide.site_guides().values()
        gates = weight.gates()
        squares = weight.latent.square() + weight.latent_scale.square()
        best = ((gates * squares).sum() / gates.sum()).sqrt()  # where the KL's slope is 0
        priors = model.priors
        torch.testing.assert_close(priors["0.weight"].base_dist.slab.scale.flatten()[0], best, rtol=0.02, atol=0)
        assert truth[:10].std() / 2 < best < 2 * truth[:10].std()
        assert float(priors["0.bias"].base_dist.slab.scale) == pytest.approx(0.7)  # which one number cannot teach

    def test_holds_until_it_is_told_to_learn(self):
        prior = LearnedSlab(slab_scale=0.3)
        model = BayesianNetwork(mlp(), prior, num_data=60)
        guide = SpikeGMMGuide(model, num_components=1)
        x, y = next(iter(batches()))
        svi = pyro.infer.SVI(model, guide, NaturalGradient(guide), SQSELBO())
        moved = []
        for change in (prior.learn, prior.hold, prior.learn):
            change()
            svi.step(x, y)
            moved.append(bool((prior.scale - 0.3).abs().max() > 1e-4))
        assert moved == [True, False, True]

    def test_starts_from_what_is_given(self):
        net = mlp()

        def scales(prior):
            return [own.base_dist.slab.scale.max().item() for own in BayesianNetwork(net, prior).priors.values()]

        rms = [float(w.detach().square().mean().sqrt()) for n, w in net.named_parameters() if n.endswith("weight")]
        assert scales(LearnedSlab()) == pytest.approx(rms)
        assert scales(LearnedSlab(slab_scale=0.3)) == pytest.approx([0.3, 0.3])
        assert scales(LearnedSlab(0.2, lambda name, weight: weight.shape[1])) == pytest.approx([6, 16])

    def test_sentences(self):
        with pytest.raises(NetworkError, match="inclusion is 1, but must be above 0 and below 1"):
            LearnedSlab(1)
        with pytest.raises(NetworkError, match=r"slab_scale of '0.weight' is -1.0, but must be a positive number"):
            BayesianNetwork(mlp(), LearnedSlab(slab_scale=-1.0))


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
        guide = SpikeGMMGuide(model, num_components=4, estimator="straight_through")
        for name, site in guide.site_guides().items():
            law = model.priors[name].base_dist
            assert isinstance(law, SpikeAndMixture) and law.batch_shape == site.shape
            assert torch.equal(law.codebook.loc, site.loc) and torch.equal(law.codebook.scale, site.scale)
            torch.testing.assert_close(law.codebook.log_mixing, site.mixing_logits.log_softmax(-1))
        assert before.num_components == 16  # of its own, while there was no guide

    def test_components_without_a_guide_have_the_weights_moments(self):
        net = mlp()
        model = BayesianNetwork(net, prior=LearnedPrior())
        for name, law in model.priors.items():
            weight = net.get_parameter(name)
            mixing = law.base_dist.codebook.log_mixing.exp()
            mean = (mixing * law.base_dist.codebook.loc).sum()
            second = (mixing * (law.base_dist.codebook.loc**2 + law.base_dist.codebook.scale**2)).sum()
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
        guide = SpikeGMMGuide(model, num_components=4, stage="dense", estimator="straight_through")
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
        assert twin.priors["0.weight"].base_dist.codebook.loc.dtype == torch.float64
        assert twin.priors["0.weight"].base_dist.inclusion.dtype == torch.float64

    def test_a_structured_one_has_an_inclusion_for_each_weight(self):
        model = BayesianNetwork(mlp(), prior=LearnedPrior(0.3, "structured"), num_data=60)
        guide = SpikeGMMGuide(model, num_components=4, estimator="straight_through")
        inclusion = {name: torch.rand(site.shape) for name, site in guide.site_guides().items()}
        model.prior.set_inclusion(inclusion)
        for name, law in model.priors.items():
            assert torch.equal(law.base_dist.inclusion, inclusion[name])
        assert not [name for name, _ in model.named_parameters() if name.startswith("prior.")]  # only set
        other = BayesianNetwork(mlp(), prior=LearnedPrior(scope="structured"))
        other.load_state_dict(model.state_dict())
        assert torch.equal(other.prior.inclusion, model.prior.inclusion)
        with pytest.raises(NetworkError, match=r"no probability for 0\.weight"):
            model.prior.set_inclusion({**inclusion, "0.weight": torch.rand(2)})

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


class TestHierarchicalInclusion:
    def made(self, scope="layer", net=None):
        model = BayesianNetwork(net or mlp(), prior=HierarchicalInclusion(2.0, 6.0, scope), num_data=60)
        return model, SpikeGMMGuide(model, num_components=4, estimator="straight_through")

    def test_inclusion_is_a_sample_site(self):
        x, y = next(iter(batches()))
        for scope, names in (("layer", ["0.weight.inclusion", "2.weight.inclusion"]), ("global", ["inclusion"])):
            model, guide = self.made(scope)
            for program in (model, guide):
                trace = pyro.poutine.trace(program).get_trace(x, y)
                latent = [n for n, s in trace.nodes.items() if s["type"] == "sample" and s["fn"].has_rsample]
                assert [n for n in latent if n.endswith("inclusion")] == names
            assert all(isinstance(own.distribution, dist.Beta) for own in model.hyper_priors().values())

    def test_prior_predictive_has_the_beta_binomials_zeros(self):
        """Weights of a layer share their λ₀: the number of zeros varies more than a binomial's."""
        model, _ = self.made()
        draws = pyro.infer.Predictive(model, {}, num_samples=200)(torch.randn(3, 6))
        kept = (draws["0.weight"] != 0).float().mean((-1, -2)).flatten()
        inclusion = draws["0.weight.inclusion"].flatten()
        assert_distribution(inclusion.numpy(), scipy.stats.beta(2, 6).cdf)
        expected = (inclusion * (1 - inclusion) / 96).mean().sqrt()
        assert float((kept - inclusion).square().mean().sqrt() / expected) == pytest.approx(1, abs=0.35)

    def test_fit_is_the_optimum_of_the_elbo(self):
        """Coordinate ascent: no other Beta posterior has a smaller expected KL, checked by its integral."""
        _, guide = self.made("global", net=nn.Sequential(nn.Linear(4, 2)))
        (site,) = guide.site_guides().values()
        site.gate_logit = torch.randn(2, 4)
        guide.fit_inclusions()
        (inclusion,) = guide.inclusions.values()
        gates = torch.sigmoid(site.gate_logit).detach().double().flatten().numpy()
        a, b = inclusion.concentration1.item(), inclusion.concentration0.item()
        assert (a, b) == pytest.approx((2 + gates.sum(), 6 + (1 - gates).sum()), rel=1e-5)

        def expected_kl(a: float, b: float) -> float:
            q, at = scipy.stats.beta(a, b), np.linspace(1e-6, 1 - 1e-6, 20001)
            weights = bernoulli_kl(gates[:, None], at).sum(0)
            return np.trapezoid(q.pdf(at) * (q.logpdf(at) - scipy.stats.beta(2, 6).logpdf(at) + weights), at)

        best = expected_kl(a, b)
        for factor in (0.9, 1.1):
            assert expected_kl(a * factor, b) > best < expected_kl(a, b * factor)

    def test_posterior_follows_the_gates_by_gradient(self):
        model, guide = self.made()
        x, y = next(iter(batches()))
        for site in guide.site_guides().values():
            site.gate_logit = torch.full(site.shape, -1.0)  # the posterior stands at the gates of before
        inclusions = guide.inclusions.values()
        before = [i.distribution().mean.item() for i in inclusions]
        optimizer = torch.optim.Adam(guide.inclusions.parameters(), lr=0.1)
        for _ in range(60):
            optimizer.zero_grad()
            SQSELBO().terms(model, guide, x, y).kl.backward()
            optimizer.step()
        after = [i.distribution().mean.item() for i in inclusions]
        guide.fit_inclusions()
        optimum = [i.distribution().mean.item() for i in inclusions]
        np.testing.assert_allclose(after, optimum, atol=0.05)
        assert min(np.subtract(before, optimum)) > 0.3

    def test_draws_of_the_posterior(self):
        model, guide = self.made()
        samples = pyro.infer.Predictive(model, guide=guide.eval(), num_samples=20)(torch.randn(5, 6))
        assert samples["obs"].shape == (20, 5)

    def test_particles_may_be_vectorized(self):
        model, _ = self.made(net=nn.Sequential(nn.Linear(6, 2)))
        laws = model.prior.site_priors({"0.weight.inclusion": torch.rand(7, 1)})
        assert laws["0.weight"].batch_shape == (7, 1) and laws["0.weight"].event_shape == (2, 6)

    def test_sentences(self):
        with pytest.raises(NetworkError, match=r"has concentrations 0\.0 and 1\.0, but both must be positive"):
            HierarchicalInclusion(0.0)

        class Other(HierarchicalInclusion):
            def hyper_priors(self):
                return {"inclusion": HyperPrior(dist.Uniform(0.0, 1.0), ("0.weight",))}

        with pytest.raises(NetworkError, match="site 'inclusion' has a Uniform prior, but this guide knows"):
            SpikeGMMGuide(
                BayesianNetwork(mlp(), prior=Other(scope="global")), num_components=4, estimator="straight_through"
            )


class TestDensities:
    """Priors without an atom: the guide's spike becomes a Gaussian by itself."""

    def test_spike_of_the_guide(self):
        narrow = BayesianNetwork(mlp(), prior=gaussian_spike_prior(spike_scale=0.01))
        for site in SpikeGMMGuide(narrow, num_components=4, estimator="straight_through").site_guides().values():
            assert site.spike_scale.item() == pytest.approx(0.01)
        plain = BayesianNetwork(mlp(), prior=normal_prior())
        for site in SpikeGMMGuide(plain, num_components=4, estimator="straight_through").site_guides().values():
            torch.testing.assert_close(site.spike_scale, site.scale.mean())
        for site in (
            SpikeGMMGuide(plain, num_components=4, spike_scale=0.3, estimator="straight_through")
            .site_guides()
            .values()
        ):
            assert site.spike_scale.item() == pytest.approx(0.3)
        with_atom = BayesianNetwork(mlp())
        assert all(
            s.spike_scale is None
            for s in SpikeGMMGuide(with_atom, num_components=4, estimator="straight_through")
            .site_guides()
            .values()
        )
        with pytest.raises(RecipeError, match="spike_scale is 0, but must be positive"):
            SpikeGMMGuide(plain, num_components=4, spike_scale=0, estimator="straight_through")

    def test_spike_is_part_of_the_state(self):
        model = BayesianNetwork(mlp(), prior=normal_prior())
        guide, other = (
            SpikeGMMGuide(model, 4, spike_scale=0.3, estimator="straight_through"),
            SpikeGMMGuide(model, 4, estimator="straight_through"),
        )
        other.load_state_dict(guide.state_dict())
        assert all(site.spike_scale.item() == pytest.approx(0.3) for site in other.site_guides().values())

    @pytest.mark.parametrize("stage", ["dense", "coded"])
    def test_networks_keep_exact_zeros(self, stage):
        guide = SpikeGMMGuide(
            BayesianNetwork(mlp(), prior=normal_prior()),
            num_components=4,
            stage=stage,
            estimator="straight_through",
        )
        masks = {name: torch.rand(site.shape) < 0.5 for name, site in guide.site_guides().items()}
        guide.prune(masks)
        values = guide()
        assert all(torch.equal(values[name] == 0, ~mask) for name, mask in masks.items())

    def test_scales_of_the_two_gaussians(self):
        weight = torch.randn(50, 40)
        law = gaussian_spike_prior(0.3)("w", weight)
        rms = weight.square().mean().sqrt()
        torch.testing.assert_close(law.variance, 0.3 * rms**2 + 0.7 * (rms / 20) ** 2)

    def test_a_plain_pyro_model_gives_the_spikes_width(self):
        x = torch.randn(50, 4)
        y = x @ torch.tensor([1.0, -1.0, 0.0, 0.0])

        def model(x, y=None):
            w = pyro.sample("w", dist.Normal(torch.zeros(4), 1.0).to_event(1))
            with pyro.plate("data", 50):
                pyro.sample("y", dist.Normal(x @ w, 0.3), obs=y)

        guide = SpikeGMMGuide(
            model,
            2,
            init={"w": torch.tensor([0.9, -0.9, 0.1, -0.1])},
            spike_scale=0.1,
            estimator="straight_through",
        )
        svi = pyro.infer.SVI(model, guide, pyro.optim.Adam({"lr": 0.01}), loss=SQSELBO())
        assert np.isfinite([svi.step(x, y) for _ in range(10)]).all()


@pytest.mark.parametrize("kind", ["monte_carlo", "dominant"])
@pytest.mark.parametrize("prior", [normal_prior(), gaussian_spike_prior(), LearnedPrior, HierarchicalInclusion])
def test_other_kinds_of_kl(prior, kind):
    x, y = next(iter(batches()))
    prior = prior() if isinstance(prior, type) else prior
    model = BayesianNetwork(mlp(), prior=prior, num_data=60)
    guide = SpikeGMMGuide(model, num_components=4, temperature=0.5, estimator="straight_through")
    kl = [float(SQSELBO(k).terms(model, guide, x, y).kl.detach()) for k in ("jensen", kind)]
    assert np.isfinite(kl).all() and kl[0] > 0


def test_one_prior_for_two_networks_is_refused():
    prior = LearnedPrior()
    BayesianNetwork(mlp(), prior=prior)
    with pytest.raises(NetworkError, match="LearnedPrior already belongs to a network: make another"):
        BayesianNetwork(mlp(), prior=prior)
