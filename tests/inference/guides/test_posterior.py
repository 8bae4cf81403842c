"""What Pyro's automatic guides answer, parts of an AutoGuideList, copies; and evidence, against enumeration."""

import copy
import itertools
import math
import pickle

import pyro
import pyro.distributions as dist
import pytest
import scipy.stats
import torch
from pyro import poutine
from pyro.infer import SVI, Predictive
from pyro.infer.autoguide import AutoDelta, AutoGuideList, AutoNormal
from torch import nn

from sqs_pyro import SQSELBO, BayesianNetwork, SpikeAndSlab, SpikeGMMGuide, diagnose
from sqs_pyro.errors import ArgumentError, NetworkError
from sqs_pyro.inference.natural_gradient import NaturalGradient
from sqs_pyro.models import HierarchicalInclusion

X, Y = torch.randn(12, 3, generator=torch.Generator().manual_seed(0)), torch.arange(12) % 2


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 2))


def made(prior=None, **options):
    model = BayesianNetwork(network(), prior, num_data=12, include=".*")
    guide = SpikeGMMGuide(model, num_components=3, **options)
    for site in guide.site_guides().values():
        site.gate_logit = torch.linspace(-2, 2, site.gate_logit.numel()).view(site.shape)
        if site.learns_widths:
            site.latent_scale = torch.linspace(0.1, 0.5, site.latent.numel()).view(site.shape)
    return model, guide


def trained(model, guide, steps=3):
    svi = SVI(model, guide, pyro.optim.Adam({"lr": 0.01}), SQSELBO())
    assert all(math.isfinite(svi.step(X, Y)) for _ in range(steps))


class TestSummaries:
    def test_dense_quantiles_are_closed_forms(self):
        _, guide = made()
        found = guide.quantiles([0.1, 0.5, 0.9], X)
        assert set(found) == set(guide.site_names)
        for name, site in guide.site_guides().items():
            assert found[name].shape == (3, *site.shape) and not found[name].requires_grad
            rows = zip(
                site.gates().detach().flatten().tolist(),
                site.latent.detach().flatten().tolist(),
                site.latent_scale.detach().flatten().tolist(),
                found[name].flatten(1).T.tolist(),
                strict=True,
            )
            for gate, w, s, values in rows:
                slab = scipy.stats.norm(w, s)
                below = gate * slab.cdf(0)
                for p, value in zip((0.1, 0.5, 0.9), values, strict=True):
                    if below < p <= below + 1 - gate:
                        assert value == 0
                    else:
                        assert value == pytest.approx(slab.ppf((p - (p > below) * (1 - gate)) / gate), abs=1e-4)

    def test_medians_are_zero_where_the_spike_holds_them(self):
        _, guide = made()
        medians, probabilities = guide.median(), guide.inclusion_probabilities()
        for name in guide.site_names:
            assert (medians[name][probabilities[name] < 0.5] == 0).all()
            assert torch.equal(medians[name], guide.quantiles(torch.tensor([0.5]))[name][0])

    @pytest.mark.parametrize("coded", [False, True])
    def test_mean_and_quantiles_are_those_of_draws(self, coded):
        _, guide = made(temperature=1.0)
        if coded:
            guide.start_coding()
        for name, q in guide.get_posterior(X).items():
            draws = q.sample((20_000,))
            assert draws.shape[1:] == guide.site_guides()[name].shape
            torch.testing.assert_close(guide.mean()[name], draws.mean(0), atol=0.02, rtol=0)
            below = (draws <= guide.quantiles([0.3])[name]).float().mean(0)
            assert (below >= 0.3 - 0.02).all()
            assert guide.mean()[name].requires_grad is False

    def test_predictive_draws_have_the_mean(self):
        _, guide = made()
        draws = Predictive(guide, num_samples=4000, parallel=True)(X)
        for name, mean in guide.mean().items():
            torch.testing.assert_close(draws[name].reshape(4000, *mean.shape).mean(0), mean, atol=0.05, rtol=0)

    def test_random_inclusions_have_quantiles_too(self):
        _, guide = made(HierarchicalInclusion())
        beta = guide.get_posterior()["0.weight.inclusion"]
        expected = scipy.stats.beta(beta.concentration1.item(), beta.concentration0.item()).ppf([0.1, 0.9])
        assert guide.quantiles([0.1, 0.9])["0.weight.inclusion"].tolist() == pytest.approx(
            expected.tolist(), rel=1e-5
        )

    def test_impossible_quantiles(self):
        with pytest.raises(ArgumentError, match=r"between 0 and 1"):
            made()[1].quantiles([0.5, 1.5])


class TestEvidence:
    """A linear model whose inclusion probabilities the sum over all models gives exactly."""

    prior, noise, slab = 0.3, 0.5, 1.0

    def data(self):
        generator = torch.Generator().manual_seed(1)
        x = torch.linalg.qr(torch.randn(40, 4, generator=generator)).Q * 3  # orthogonal features
        y = x @ torch.tensor([1.0, 0.4, 0.12, 0.0]) + self.noise * torch.randn(40, generator=generator)
        return x.contiguous(), y

    def enumerated(self, x, y):
        """Return the log Bayes factor of each feature: log p(y | in) - log p(y | out)."""
        log_joint = {}
        for chosen in itertools.product([False, True], repeat=4):
            columns = x[:, list(chosen)].double()
            covariance = self.noise**2 * torch.eye(40).double() + self.slab**2 * columns @ columns.T
            fit = torch.distributions.MultivariateNormal(torch.zeros(40).double(), covariance).log_prob(y.double())
            log_prior = sum(math.log(self.prior if c else 1 - self.prior) for c in chosen)
            log_joint[chosen] = float(fit) + log_prior
        odds = []
        for i in range(4):
            both = [torch.tensor([v for c, v in log_joint.items() if c[i] is side]) for side in (True, False)]
            odds.append(
                float(both[0].logsumexp(0) - both[1].logsumexp(0)) - math.log(self.prior / (1 - self.prior))
            )
        return torch.tensor(odds)

    def test_network(self):
        x, y = self.data()
        prior = SpikeAndSlab(torch.tensor(self.prior), dist.Normal(0.0, self.slab))
        net = nn.Linear(4, 1, bias=False)
        model = BayesianNetwork(net, prior, lambda out: dist.Normal(out[:, 0], self.noise), num_data=40)
        guide = SpikeGMMGuide(model, num_components=1)
        svi = SVI(model, guide, NaturalGradient(guide, 0.1, 0.1, steps=400), SQSELBO())
        for _ in range(400):
            svi.step(x, y)
        expected = self.enumerated(x, y).clamp(max=15 - math.log(0.3 / 0.7))  # gates stay within ±15
        torch.testing.assert_close(guide.evidence()["weight"][0], expected, atol=0.2, rtol=0.12)
        assert (expected < 0).any() and (expected > 3).any()
        guide.prune({"weight": torch.tensor([[1, 1, 0, 1]])})
        assert guide.evidence()["weight"].isinf().tolist() == [[False, False, True, False]]

    def test_plain_model(self):
        def model(x):
            pyro.sample("w", SpikeAndSlab(0.2, dist.Normal(0.0, 1.0)).expand((4,)).to_event(1))

        guide = SpikeGMMGuide(model, num_components=1, init={"w": torch.ones(4)}, initial_gate=1.0)
        torch.testing.assert_close(guide.evidence(X)["w"], torch.full((4,), 1.0 - math.log(0.25)))

    def test_random_inclusion_counts_by_its_expected_logit(self):
        _, guide = made(HierarchicalInclusion())
        beta = guide.get_posterior()["0.weight.inclusion"]
        draws = beta.sample((200_000,)).logit().mean()
        found = guide.site_guides()["0.weight"].gate_logit.detach() - guide.evidence()["0.weight"]
        torch.testing.assert_close(found, draws.expand_as(found), atol=0.02, rtol=0)

    def test_priors_without_a_spike_are_refused(self):
        with pytest.raises(NetworkError, match="no inclusion probability"):
            made(dist.Normal(0.0, 1.0))[1].evidence()


def with_noise():
    """A model with a random site of the user's own, inside the likelihood."""

    def likelihood(output):
        return dist.Normal(output[:, 0], pyro.sample("sigma", dist.LogNormal(0.0, 1.0)))

    return BayesianNetwork(network(), likelihood=likelihood, num_data=12)


class TestInAnAutoGuideList:
    @pytest.mark.parametrize("other", [AutoNormal, AutoDelta])
    def test_beside_an_autoguide(self, other):
        model = with_noise()
        guide = AutoGuideList(model)
        guide.append(SpikeGMMGuide(model, num_components=3))
        guide.append(other(poutine.block(model, expose=["sigma"])))
        before = {name: p.detach().clone() for name, p in guide[0].named_parameters()}
        trained(model, guide)
        moved = {
            name.rsplit(".", 1)[1] for name, p in guide[0].named_parameters() if not torch.equal(p, before[name])
        }
        assert moved >= {"latent_unconstrained", "latent_scale_unconstrained", "gate_logit_unconstrained"}
        assert set(guide(X)) == set(guide.median(X)) == {"0.weight", "2.weight", "sigma"}
        if other is AutoNormal:  # AutoDelta has no quantiles
            assert {name: len(v) for name, v in guide.quantiles([0.1, 0.9]).items()}["0.weight"] == 2
        samples = Predictive(model, guide=guide, num_samples=3)(X)
        assert samples["obs"].shape == (3, 12) and samples["sigma"].shape[0] == 3
        assert diagnose(model, guide) == diagnose(model, guide[0])

    def test_copies_keep_the_list_they_are_in(self):
        model = with_noise()
        guide = AutoGuideList(model)
        guide.append(SpikeGMMGuide(model, num_components=3))
        twin = copy.deepcopy(guide)
        assert guide[0].master() is guide and twin[0].master() is twin
        assert guide[0].model is model

    def test_sites_of_a_function_beside_it(self):
        model = with_noise()
        own = SpikeGMMGuide(model, num_components=3)

        def guide(x, y=None):
            scale = pyro.param("scale", torch.tensor(0.1), constraint=dist.constraints.positive)
            own(x, y)
            pyro.sample("sigma", dist.LogNormal(pyro.param("loc", torch.tensor(0.0)), scale))

        trained(model, guide)
        assert pyro.param("loc").item() != 0

    def test_diagnose_says_what_it_needs(self):
        model = with_noise()
        with pytest.raises(NetworkError, match="without a SpikeGMMGuide"):
            diagnose(model, AutoNormal(model))


def test_diagnose_in_the_dense_stage():
    model, guide = made(SpikeAndSlab(torch.tensor(0.5), dist.Normal(0.0, 1.0)))
    assert diagnose(model, guide) == []
    for site in guide.site_guides().values():
        site.gate_logit = torch.full(site.shape, -9.0)
    assert {found.kind for found in diagnose(model, guide)} == {"gates_closed"}


class TestCopiesAndStates:
    def same(self, guide, other):
        draws = []
        for each in (guide, other):
            pyro.clear_param_store()
            torch.manual_seed(0)
            draws.append(Predictive(each, num_samples=2)(X))
        assert all(torch.equal(draws[0][name], draws[1][name]) for name in guide.site_names)
        assert other.stage == guide.stage and not any(
            torch.equal(guide.site_guides()[n].latent_scale, made()[1].site_guides()[n].latent_scale)
            for n in guide.site_names
        )

    @pytest.mark.parametrize("way", [copy.deepcopy, lambda guide: pickle.loads(pickle.dumps(guide))])
    def test_copies(self, way):
        model, guide = made()
        trained(model, guide)
        twin = way(guide)
        self.same(guide, twin)
        assert guide.model is model and list(twin.model.site_values()) == list(model.site_values())
        before = guide.site_guides()["0.weight"].latent.detach().clone()
        trained(twin.model, twin)
        assert torch.equal(guide.site_guides()["0.weight"].latent, before)

    def test_state_dict_has_widths(self):
        model, guide = made()
        trained(model, guide)
        other = SpikeGMMGuide(model, num_components=3)
        other.load_state_dict(guide.state_dict())
        self.same(guide, other)

    def test_through_the_parameter_store(self, tmp_path):
        model, guide = made()
        trained(model, guide)
        pyro.get_param_store().save(tmp_path / "store.pt")
        pyro.clear_param_store()
        other_model = BayesianNetwork(network(), num_data=12, include=".*")
        other = SpikeGMMGuide(other_model, num_components=3)
        pyro.get_param_store().load(tmp_path / "store.pt")
        other(X)
        self.same(guide, other)
