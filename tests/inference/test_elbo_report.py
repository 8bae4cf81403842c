"""The report's numbers against quadrature and against SQSELBO; asking for it changes nothing."""

import copy
import json

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import scipy.stats
import torch
from rich.console import Console
from torch import nn

from sqs_pyro import SQSELBO, BayesianNetwork, SpikeAndSlab, SpikeGMM, SpikeGMMGuide, elbo_report
from sqs_pyro.errors import RecipeError
from sqs_pyro.inference import kl_bounds
from sqs_pyro.models import (
    HierarchicalInclusion,
    LearnedPrior,
    gaussian_spike_prior,
    normal_prior,
    scale_matched_prior,
)
from sqs_pyro.testing.statistics import (
    bernoulli_kl,
    component_edges,
    critical_z,
    mixture_kl,
    mixture_logpdf,
    panels,
)

F64 = torch.float64
TAUS = (0.1, 1.0, 4.0)


class FourWeights:
    """Four weights with their own gates and logits; a tiny guide whose every number quadrature can check."""

    gates = np.array([0.0, 0.3, 0.9, 1.0])
    logits = np.array([[0.0, 1.0, -1.0], [0.5, 0.2, 0.1], [2.0, 0.0, 0.0], [-1.0, 0.3, 0.2]])
    loc, scale = np.array([-0.8, 0.1, 0.9]), np.array([0.4, 0.5, 0.3])
    inclusion, noise = 0.4, 0.8
    x = np.linspace(-1, 1, 4)
    y = np.array([0.3, -0.2, 0.5, 0.1])

    def slab(self):
        return dist.Normal(torch.zeros((), dtype=F64), 0.7)

    slab_logpdf = staticmethod(scipy.stats.norm(0, 0.7).logpdf)

    def model(self):
        prior = SpikeAndSlab(self.inclusion, self.slab())
        w = pyro.sample("w", prior.expand([4]).to_event(1))
        with pyro.plate("data", 4):
            pyro.sample("y", dist.Normal(w * torch.from_numpy(self.x), self.noise), obs=torch.from_numpy(self.y))

    def guide(self):
        given = (torch.from_numpy(x) for x in (self.gates, self.loc, self.scale))
        pyro.sample("w", SpikeGMM(*given, logits=torch.from_numpy(self.logits), temperature=2.0).to_event(1))

    def phi(self, temperature: float) -> np.ndarray:
        return scipy.special.softmax(self.logits / temperature, axis=1)

    def true_kl(self, temperature: float) -> float:
        shape = np.broadcast_to(self.loc, (4, 3)), np.broadcast_to(self.scale, (4, 3))
        slab = mixture_kl(self.phi(temperature), *shape, self.slab_logpdf)
        return float((bernoulli_kl(self.gates, self.inclusion) + self.gates * slab).sum())

    def expected_nll(self, temperature: float) -> float:
        """``-Σᵢ E_q log N(yᵢ; wᵢ xᵢ, noise)``, each by quadrature over the slab plus the atom."""
        w, weights = panels(component_edges(self.loc, self.scale))
        total = 0.0
        for gate, phi, x, y in zip(self.gates, self.phi(temperature), self.x, self.y, strict=True):
            density = np.exp(mixture_logpdf(w, phi, self.loc, self.scale))
            slab = (weights * density * scipy.stats.norm.logpdf(y, w * x, self.noise)).sum()
            total -= (1 - gate) * scipy.stats.norm.logpdf(y, 0, self.noise) + gate * slab
        return total


class HeavyTails(FourWeights):
    """A slab for which no KL is known in closed form."""

    def slab(self):
        return dist.StudentT(torch.tensor(3.0, dtype=F64), 0.0, 0.5)

    slab_logpdf = staticmethod(scipy.stats.t(3.0, 0, 0.5).logpdf)


def without_bounds(problem: FourWeights):
    """Its prior as a type of its own for which nothing is registered, whatever is for spike-and-slab."""

    class Unregistered(dist.TorchDistribution):
        has_atom_at_zero, support, arg_constraints = True, dist.constraints.real, {}

        def __init__(self, batch_shape=()):
            super().__init__(torch.Size(batch_shape), validate_args=False)

        def expand(self, batch_shape, _instance=None):
            return Unregistered(batch_shape)

        def sample(self, sample_shape=()):
            return torch.zeros(torch.Size(sample_shape) + self.batch_shape, dtype=F64)

        def log_prob(self, value):
            return SpikeAndSlab(problem.inclusion, problem.slab()).expand(self.batch_shape).log_prob(value)

    return lambda: pyro.sample("w", Unregistered([4]).to_event(1))


@pytest.fixture(scope="module")
def report():
    torch.manual_seed(0)
    problem = FourWeights()
    return elbo_report(problem.model, problem.guide, temperatures=TAUS, num_samples=4000, num_particles=100)


class TestAgainstQuadrature:
    problem = FourWeights()

    @pytest.mark.parametrize("index", range(len(TAUS)))
    def test_bracket_estimate_and_parts(self, report, index):
        (site,), problem, tau = report.at[index].sites, self.problem, TAUS[index]
        true, gates, phi = problem.true_kl(tau), problem.gates, problem.phi(tau)
        assert site.lower <= true <= site.jensen
        assert abs(site.monte_carlo - true) < critical_z(2 * len(TAUS)) * site.monte_carlo_error
        assert site.monte_carlo_error < 0.02 * true
        kappa = np.log(0.7 / problem.scale) + (problem.scale**2 + problem.loc**2) / (2 * 0.49) - 0.5
        gate_kl = bernoulli_kl(gates, problem.inclusion).sum()
        assert site.gate_kl == pytest.approx(gate_kl)
        assert site.jensen == pytest.approx(gate_kl + (gates * (phi @ kappa)).sum())
        assert site.dominant == pytest.approx(gate_kl + (gates * kappa[phi.argmax(1)]).sum())
        lower = gates * ((phi @ kappa) - scipy.stats.entropy(phi, axis=1))
        assert site.dominant_below == (gates * kappa[phi.argmax(1)] < lower - 1e-9).sum()
        entropy = (gates * scipy.stats.entropy(phi, axis=1)).sum()
        assert site.code_entropy == pytest.approx(entropy)
        assert site.width == pytest.approx(entropy)
        assert site.bits_per_weight == pytest.approx(site.jensen / 4 / np.log(2))

    @pytest.mark.parametrize("index", range(len(TAUS)))
    def test_likelihood_and_elbo(self, report, index):
        at, tau = report.at[index], TAUS[index]
        expected = self.problem.expected_nll(tau)
        slack = critical_z(len(TAUS)) * at.nll_error
        assert abs(at.nll - expected) < slack
        low, high = at.elbo
        assert low - slack <= -(expected + self.problem.true_kl(tau)) <= high + slack

    def test_the_present_temperature_is_the_default(self):
        report = elbo_report(self.problem.model, self.problem.guide, num_samples=2, num_particles=2)
        (site,) = report.at[0].sites
        entropy = scipy.stats.entropy(self.problem.phi(2.0), axis=1)
        assert site.code_entropy == pytest.approx((self.problem.gates * entropy).sum())

    def estimate(self, num_samples: int) -> tuple[float, float]:
        (q, p) = (
            pyro.poutine.trace(f).get_trace().nodes["w"]["fn"] for f in (self.problem.guide, self.problem.model)
        )
        bounds = kl_bounds.kl_bounds("w", q, p, num_samples)
        return bounds.monte_carlo, bounds.monte_carlo_error

    def test_chunks_of_one_draw_estimate_the_same(self, monkeypatch):
        monkeypatch.setattr(kl_bounds, "_CHUNK", 1)
        mean, error = self.estimate(200)
        assert abs(mean - self.problem.true_kl(2.0)) < critical_z() * error

    def test_error_is_that_of_repeated_estimates(self):
        values, errors = np.array([self.estimate(50) for _ in range(150)]).T
        assert values.std() == pytest.approx(errors.mean(), rel=0.25)  # the spread of 150 is known to 6 %

    def test_scale_and_mask_of_the_guides_site_count(self):
        def scaled():
            with pyro.poutine.scale(scale=3.0):
                self.problem.guide()

        plain, tripled = (
            elbo_report(self.problem.model, g, num_samples=2).at[0].total for g in (self.problem.guide, scaled)
        )
        for name in ("lower", "jensen", "dominant", "gate_kl", "code_entropy"):
            assert getattr(tripled, name) == pytest.approx(3 * getattr(plain, name))


def test_weights_whose_dominant_value_is_certainly_too_small_are_counted():
    """The two rows of the table in docs/method.md: only the first is below."""
    phi, loc = torch.tensor([[0.6, 0.4], [0.4, 0.6]], dtype=F64), torch.tensor([0.0, 3.0], dtype=F64)
    q = SpikeGMM(torch.ones(2, dtype=F64), loc, torch.ones(2, dtype=F64), responsibilities=phi)
    p = SpikeAndSlab(1.0, dist.Normal(torch.zeros((), dtype=F64), 1.0)).expand([2])
    assert kl_bounds.kl_bounds("w", q, p, num_samples=2).dominant_below == 1


class TestOtherPriors:
    def test_without_a_bound_the_estimate_stands_alone(self):
        problem = HeavyTails()
        report = elbo_report(without_bounds(problem), problem.guide, temperatures=[1.0], num_samples=4000)
        at = report.at[0]
        (site,) = at.sites
        assert (site.lower, site.jensen, site.dominant, site.width) == (None, None, None, None)
        assert abs(site.monte_carlo - problem.true_kl(1.0)) < critical_z() * site.monte_carlo_error
        assert site.gate_kl == pytest.approx(bernoulli_kl(problem.gates, problem.inclusion).sum())
        assert at.uncertified == ("w",)
        assert at.elbo[0] == at.elbo[1] == -(at.nll + site.monte_carlo)
        json.dumps(report.to_dict(), allow_nan=False)

    @pytest.mark.parametrize(
        "law", [dist.Beta(torch.tensor(3.0), torch.tensor(5.0)), dist.Delta(torch.tensor(0.4))]
    )
    def test_hyper_site(self, law):
        problem = FourWeights()

        def model():
            inclusion = pyro.sample("inclusion", dist.Beta(2.0, 2.0))
            pyro.sample("w", SpikeAndSlab(inclusion.double(), problem.slab()).expand([4]).to_event(1))

        def guide():
            pyro.sample("inclusion", law)
            problem.guide()

        at = elbo_report(model, guide, num_samples=500).at[0]
        hyper, weights = at.sites
        assert (hyper.name, hyper.num_weights, hyper.gate_kl) == ("inclusion", 1, None)
        exact = -dist.Beta(2.0, 2.0).log_prob(torch.tensor(0.4)).item()
        if isinstance(law, dist.Beta):
            exact = torch.distributions.kl_divergence(law, dist.Beta(2.0, 2.0)).item()
            assert hyper.jensen == hyper.lower == pytest.approx(exact)
        assert abs(hyper.monte_carlo - exact) <= critical_z() * hyper.monte_carlo_error + 1e-6
        assert weights.lower <= weights.jensen

    def test_a_density_as_prior_gives_infinity_and_json_all_the_same(self):
        problem = FourWeights()
        report = elbo_report(
            lambda: pyro.sample("w", dist.Normal(0.0, 1.0).expand([4]).to_event(1)), problem.guide
        )
        (site,) = report.at[0].sites
        assert site.lower == site.jensen == site.monte_carlo == np.inf
        assert (site.width, site.gate_kl) == (0.0, None)
        assert json.loads(json.dumps(report.to_dict(), allow_nan=False))["temperatures"][0]["elbo_low"] is None

    def test_sentences(self):
        problem = FourWeights()
        with pytest.raises(RecipeError, match="num_samples is 1, but must be at least 2"):
            elbo_report(problem.model, problem.guide, num_samples=1)
        with pytest.raises(RecipeError, match="a temperature is 0, but must be positive"):
            elbo_report(problem.model, problem.guide, temperatures=[1.0, 0])
        with pytest.raises(ValueError, match="samples 'w' but the guide does not"):
            elbo_report(problem.model, lambda: None)


PRIORS = {
    "normal": lambda: scale_matched_prior(0.3),
    "laplace": lambda: scale_matched_prior(0.3, slab="laplace"),
    "student_t": lambda: scale_matched_prior(0.3, slab="student_t"),
    "plain_normal": normal_prior,
    "gaussian_spike": lambda: gaussian_spike_prior(0.3),
    "hierarchical": lambda: HierarchicalInclusion(1.0, 1.0, scope="layer"),
    "learned": lambda: LearnedPrior(0.3, scope="global"),
}


@pytest.mark.parametrize("kind", PRIORS)
def test_every_prior_has_a_certified_bracket(kind):
    net = nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 2))
    model = BayesianNetwork(net, prior=PRIORS[kind](), num_data=60)
    guide = SpikeGMMGuide(model, 4, estimator="straight_through")
    x = torch.randn(60, 6)
    report = elbo_report(model, guide, x, (x[:, 0] > 0).long(), temperatures=(0.1, 2.0), num_particles=2)
    for at in report.at:
        total, slack = at.total, critical_z(2 * len(PRIORS)) * at.total.monte_carlo_error
        assert at.uncertified == ()
        assert total.lower - slack <= total.monte_carlo <= total.jensen + slack
    json.dumps(report.to_dict(), allow_nan=False)


class TestNetwork:
    X, Y = torch.randn(6, 1, 8), torch.tensor([0, 1, 2, 0, 1, 2])

    @pytest.fixture
    def model(self):
        net = nn.Sequential(nn.Conv1d(1, 4, 3), nn.BatchNorm1d(4), nn.ReLU(), nn.Flatten(), nn.Linear(24, 3))
        return BayesianNetwork(net, num_data=60)

    @pytest.fixture(params=["dense", "coded", "frozen"])
    def guide(self, request, model):
        guide = SpikeGMMGuide(
            model, 4, temperature=0.7, refresh_every=3, stage="dense", estimator="straight_through"
        )
        if request.param != "dense":
            guide.start_coding()
        if request.param == "frozen":
            guide.freeze_codes()
        return guide

    @pytest.mark.parametrize("kind", ["jensen", "dominant"])
    def test_sums_are_those_of_the_elbo(self, model, guide, kind):
        at = elbo_report(model, guide, self.X, self.Y).at[0]
        terms = SQSELBO(kl=kind).terms(model, guide, self.X, self.Y)
        for site in at.sites:
            assert getattr(site, kind) == pytest.approx(terms.kl_by_site[site.name].item(), rel=1e-5)
        assert getattr(at.total, kind) == pytest.approx(terms.kl.item(), rel=1e-5)
        low, high = SQSELBO().bracket(model, guide, self.X, self.Y)
        assert at.elbo[1] - at.elbo[0] == pytest.approx(high - low, rel=1e-3, abs=0.01)
        assert at.total.width == pytest.approx(at.total.code_entropy, rel=1e-3, abs=0.01)

    def test_another_temperature_is_that_of_a_guide_at_it(self, model, guide):
        asked = elbo_report(model, guide, self.X, self.Y, temperatures=[0.2, 3.0]).at[1].total
        guide.temperature = 3.0
        assert asked.jensen == elbo_report(model, guide, self.X, self.Y).at[0].total.jensen

    def test_what_averaging_draws_from_is_no_part_of_it(self, model, guide):
        plain = elbo_report(model, guide, self.X, self.Y).at[0].total
        guide.evaluation_temperature = guide.evaluation_gate_temperature = 30.0
        guide.eval()
        assert elbo_report(model, guide, self.X, self.Y).at[0].total.jensen == plain.jensen
        assert guide.evaluation_temperature == guide.evaluation_gate_temperature == 30.0

    def test_nothing_changes(self, model, guide):
        model.train(), guide.train()
        model.net[1].eval()  # one module in another mode than the rest
        before = copy.deepcopy((model.state_dict(), guide.state_dict()))
        modes = [module.training for module in (*model.modules(), *guide.modules())]
        attributes = guide.temperature, guide.evaluation_temperature, guide.stage, guide.draws
        elbo_report(model, guide, self.X, self.Y, temperatures=TAUS, num_samples=2, num_particles=2)
        for old, new in zip(before, (model.state_dict(), guide.state_dict()), strict=True):
            assert all(torch.equal(old[name], new[name]) for name in old)
        assert modes == [module.training for module in (*model.modules(), *guide.modules())]
        assert attributes == (guide.temperature, guide.evaluation_temperature, guide.stage, guide.draws)
        assert list(pyro.get_param_store()) == []

    def test_table_has_a_row_a_temperature_and_a_row_a_site(self, model):
        guide = SpikeGMMGuide(model, 4, estimator="straight_through")
        report = elbo_report(model, guide, self.X, self.Y, temperatures=[0.5, 2.0], num_samples=2)
        console = Console(width=200)
        with console.capture() as capture:
            console.print(report.table())
        rows = [line.split() for line in capture.get().splitlines() if line.strip()]
        starts = [row[0] for row in rows]
        assert {"0.5", "2", "0.weight", "4.weight", "all"} <= set(starts)
        total = report.at[0].total
        assert f"{total.jensen / total.num_weights:.4f}" in rows[starts.index("0.5")]
