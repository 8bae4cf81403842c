"""SQSELBO against numerical integration, against Pyro's own ELBO, and in every way Pyro calls it."""

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import scipy.stats
import torch
from pyro.infer import SVI, TraceMeanField_ELBO
from pyro.infer.autoguide import AutoNormal, AutoNormalMessenger, init_to_value
from pyro.nn import PyroModule, PyroParam, PyroSample

from sqs_pyro.distributions import SpikeAndSlab, SpikeGMM
from sqs_pyro.errors import RecipeError
from sqs_pyro.inference.elbo import SQSELBO
from sqs_pyro.testing.statistics import component_edges, critical_z, mixture_kl, mixture_logpdf, panels

F64 = torch.float64


class ExactDraws(SpikeGMM):
    """Samples q itself instead of the training value, so that the likelihood term is E_q as well."""

    def rsample(self, sample_shape=()):
        return self.sample(sample_shape)


class OneWeight:
    """``y = w x + noise``, ``w ~ 0.6 δ₀ + 0.4 N(0, 1)``; a fixed guide with overlapping components."""

    gate, phi = 0.7, np.array([0.5, 0.3, 0.2])
    loc, scale = np.array([0.2, 0.9, -0.4]), np.array([0.3, 0.4, 0.2])
    inclusion, noise = 0.4, 0.8
    x = np.linspace(-1, 1, 12)
    y = 0.6 * x + 0.3 * np.sin(7 * x)

    def model(self):
        w = pyro.sample("w", SpikeAndSlab(self.inclusion, dist.Normal(torch.zeros((), dtype=F64), 1.0)))
        with pyro.plate("data", len(self.x), dim=-1):
            mean = w.unsqueeze(-1) * torch.from_numpy(self.x) if w.dim() == 0 else w * torch.from_numpy(self.x)
            pyro.sample("y", dist.Normal(mean, self.noise), obs=torch.from_numpy(self.y))

    def guide(self):
        parameters = (torch.tensor(self.gate, dtype=F64), torch.from_numpy(self.loc), torch.from_numpy(self.scale))
        pyro.sample("w", ExactDraws(*parameters, responsibilities=torch.from_numpy(self.phi)))

    def log_likelihood(self, w: np.ndarray) -> np.ndarray:
        return scipy.stats.norm.logpdf(self.y, w[..., None] * self.x, self.noise).sum(-1)

    def exact_elbo(self) -> float:
        """``E_q[log p(y, w) - log q(w)]`` by quadrature over the continuous part, plus the atom."""
        w, weights = panels(component_edges(self.loc, self.scale))
        log_q = np.log(self.gate) + mixture_logpdf(w, self.phi, self.loc, self.scale)
        log_p = np.log(self.inclusion) + scipy.stats.norm.logpdf(w)
        continuous = (weights * np.exp(log_q) * (self.log_likelihood(w) + log_p - log_q)).sum()
        spike = self.log_likelihood(np.zeros(())) + np.log(1 - self.inclusion) - np.log(1 - self.gate)
        return float(continuous + (1 - self.gate) * spike)

    def log_evidence(self) -> float:
        w, weights = panels(np.linspace(-10, 10, 2001))
        slab = (weights * np.exp(self.log_likelihood(w) + scipy.stats.norm.logpdf(w))).sum()
        return float(
            np.log((1 - self.inclusion) * np.exp(self.log_likelihood(np.zeros(()))) + self.inclusion * slab)
        )


class TestOneWeight:
    def estimate(self, kl: str) -> tuple[float, float]:
        """Mean ELBO of 40 x 1000 particles and its standard error."""
        problem, elbo = OneWeight(), SQSELBO(kl, num_particles=1000, vectorize_particles=True, max_plate_nesting=1)
        values = np.array([-elbo.loss(problem.model, problem.guide) for _ in range(40)])
        return float(values.mean()), float(values.std(ddof=1) / len(values) ** 0.5)

    def test_monte_carlo_agrees_with_numerical_integration(self):
        mean, error = self.estimate("monte_carlo")
        assert error < 0.02
        assert abs(mean - OneWeight().exact_elbo()) < critical_z() * error

    def test_jensen_is_below_by_no_more_than_the_certified_bracket(self):
        problem = OneWeight()
        mean, error = self.estimate("jensen")
        gap = problem.exact_elbo() - mean
        slack = critical_z() * error
        width = problem.gate * scipy.stats.entropy(problem.phi)
        assert -slack < gap < width + slack
        kappa = -np.log(problem.scale) + (problem.scale**2 + problem.loc**2 - 1) / 2
        mixture = mixture_kl(problem.phi, problem.loc, problem.scale, scipy.stats.norm.logpdf)
        expected_gap = problem.gate * ((problem.phi * kappa).sum() - mixture)
        assert expected_gap > 10 * slack / critical_z() and abs(gap - expected_gap) < slack

    def test_evidence_is_above(self):
        problem = OneWeight()
        assert self.estimate("jensen")[0] < problem.exact_elbo() < problem.log_evidence()

    def test_bracket_contains_the_exact_elbo(self):
        problem, elbo = OneWeight(), SQSELBO(num_particles=20_000, vectorize_particles=True, max_plate_nesting=1)
        low, high = elbo.bracket(problem.model, problem.guide)
        assert low < problem.exact_elbo() < high
        assert high - low == pytest.approx(problem.gate * scipy.stats.entropy(problem.phi))

    def test_without_sampling_error(self):
        """One open gate, one component, no width to speak of: the posterior mean's likelihood and an exact KL."""
        problem = OneWeight()
        problem.gate, problem.phi = 1.0, np.ones(1)
        problem.loc, problem.scale = np.array([0.6]), np.array([1e-9])
        exact = problem.log_likelihood(np.array(0.6)) - (
            -np.log(problem.inclusion) - np.log(1e-9) + (0.36 - 1) / 2
        )
        for kl in ("jensen", "dominant"):
            assert -SQSELBO(kl).loss(problem.model, problem.guide) == pytest.approx(float(exact), abs=1e-6)


def weight_model(x, y, batch_size=None):
    w = pyro.sample("w", SpikeAndSlab(0.5, dist.Normal(0.0, 1.0)).expand([3]).to_event(1))
    with pyro.plate("data", len(x), subsample_size=batch_size) as rows:
        pyro.sample("y", dist.Normal(x[rows] @ w, 0.5), obs=y[rows])


def weight_guide(x, y, batch_size=None):
    gate = pyro.param("gate", torch.tensor([0.9, 0.3, 0.6]), constraint=dist.constraints.unit_interval)
    loc, logits = pyro.param("loc", torch.tensor([-0.5, 0.8])), pyro.param("logits", torch.zeros(3, 2))
    pyro.sample("w", SpikeGMM(gate, loc, torch.tensor([0.1, 0.2]), logits=logits).to_event(1))


X = torch.linspace(-1, 1, 30).reshape(10, 3)
Y = X @ torch.tensor([0.8, 0.0, -0.5])


class TestTerms:
    def test_parts_add_up_and_are_what_they_say(self):
        elbo = SQSELBO(kl_weight=0.25)
        terms = elbo.terms(weight_model, weight_guide, X, Y)
        guide = pyro.poutine.trace(weight_guide).get_trace(X, Y).nodes["w"]
        w = guide["value"]
        assert w.tolist() == pytest.approx([-0.5, 0.0, -0.5])
        nll = -scipy.stats.norm.logpdf(Y.numpy(), (X @ w).detach().numpy(), 0.5).sum()
        assert terms.nll.item() == pytest.approx(nll, rel=1e-5)
        prior = SpikeAndSlab(0.5, dist.Normal(0.0, 1.0)).expand([3]).to_event(1)
        kl = torch.distributions.kl_divergence(guide["fn"], prior)
        torch.testing.assert_close(terms.kl, kl)
        assert list(terms.kl_by_site) == ["w"] and torch.equal(terms.kl_by_site["w"], terms.kl)
        torch.testing.assert_close(terms.loss, terms.nll + 0.25 * terms.kl)
        assert elbo.loss(weight_model, weight_guide, X, Y) == pytest.approx(terms.loss.item())

    def test_kl_weight_can_be_annealed_and_zero_skips_the_kl(self):
        elbo = SQSELBO()
        full = elbo.terms(weight_model, weight_guide, X, Y)
        elbo.kl_weight = 0.5
        assert elbo.loss(weight_model, weight_guide, X, Y) == pytest.approx((full.nll + 0.5 * full.kl).item())
        elbo.kl_weight = 0.0
        skipped = elbo.terms(weight_model, weight_guide, X, Y)
        assert skipped.kl_by_site == {} and skipped.kl.item() == 0 and skipped.loss == skipped.nll

    @pytest.mark.parametrize("options", [{}, {"vectorize_particles": True, "max_plate_nesting": 1}])
    def test_particles_are_averaged(self, options):
        def model(x, y):
            w = pyro.sample("w", SpikeAndSlab(0.5, dist.Normal(0.0, 1.0)).expand([3]).to_event(1))
            with pyro.plate("data", len(x), dim=-1):
                pyro.sample("y", dist.Normal((x * w).sum(-1), 0.5), obs=y)  # w: [3] or [particles, 1, 3]

        one = SQSELBO().terms(model, weight_guide, X, Y)
        terms = SQSELBO(num_particles=4, **options).terms(model, weight_guide, X, Y)
        torch.testing.assert_close(terms.loss, one.loss)
        torch.testing.assert_close(terms.kl, one.kl)

    def test_loss_and_grads_equals_backward_through_terms(self):
        for kl in ("jensen", "dominant", "monte_carlo"):
            gradients = []
            for way in ("loss_and_grads", "terms"):
                pyro.clear_param_store()
                pyro.set_rng_seed(1)
                elbo = SQSELBO(kl, num_particles=3)
                if way == "terms":
                    elbo.terms(weight_model, weight_guide, X, Y).loss.backward()
                else:
                    elbo.loss_and_grads(weight_model, weight_guide, X, Y)
                store = pyro.get_param_store()
                gradients.append({name: store[name].unconstrained().grad for name in store})
            for name, gradient in gradients[0].items():
                assert gradient.isfinite().all() and gradient.abs().sum() > 0
                torch.testing.assert_close(gradient, gradients[1][name])


class TestPyroBehaviour:
    def test_subsampled_data_is_scaled_and_the_kl_is_not(self):
        seen = []

        def model(x, y, batch_size):
            with pyro.poutine.trace() as recorded:
                weight_model(x, y, batch_size)
            seen.append(recorded.trace)

        terms = SQSELBO().terms(model, weight_guide, X, Y, 4)
        rows, w = seen[0].nodes["data"]["value"], seen[0].nodes["w"]["value"].detach()
        assert len(rows) == 4
        nll = -(10 / 4) * scipy.stats.norm.logpdf(Y[rows].numpy(), (X[rows] @ w).numpy(), 0.5).sum()
        assert terms.nll.item() == pytest.approx(nll, rel=1e-5)
        assert terms.kl.item() == pytest.approx(SQSELBO().terms(weight_model, weight_guide, X, Y).kl.item())

    def test_guide_scale_and_mask_reach_the_kl(self):
        mask = torch.tensor([True, False, True])

        def within(function):
            def wrapped():
                with pyro.poutine.scale(scale=2.0), pyro.poutine.mask(mask=mask):
                    return function()

            return wrapped

        prior = SpikeAndSlab(0.5, dist.Normal(0.0, 1.0)).expand([3])
        law = SpikeGMM(torch.rand(3), torch.zeros(2), torch.ones(2), logits=torch.zeros(2))

        def plated(distribution):
            def function():
                with pyro.plate("rows", 3):
                    pyro.sample("w", distribution)

            return function

        terms = SQSELBO().terms(within(plated(prior)), within(plated(law)))
        expected = 2 * torch.distributions.kl_divergence(law, prior)[mask].sum()
        torch.testing.assert_close(terms.kl, expected)

    def test_no_log_density_of_latent_sites_is_evaluated(self):
        class Mute(SpikeAndSlab):
            def log_prob(self, value):
                raise AssertionError("evaluated")

        class MuteGMM(SpikeGMM):
            def log_prob(self, value):
                raise AssertionError("evaluated")

        def model():
            w = pyro.sample("w", Mute(0.5, dist.Normal(torch.zeros(3), 1.0)).to_event(1))
            pyro.sample("y", dist.Normal(w.sum(), 1.0), obs=torch.tensor(0.3))

        def guide():
            gates = pyro.param("gates", torch.full((3,), 0.4))
            pyro.sample("w", MuteGMM(gates, torch.zeros(2), torch.ones(2), logits=torch.zeros(2)).to_event(1))

        for kl_weight in (1.0, 0.0):
            SQSELBO(kl_weight=kl_weight).loss_and_grads(model, guide)
        with pytest.raises(AssertionError, match="evaluated"):
            SQSELBO("monte_carlo").loss(model, guide)

    @pytest.mark.parametrize("known_kl", [True, False])
    def test_ordinary_and_auxiliary_sites_as_in_the_parent(self, known_kl):
        prior = dist.Gamma(2.0, 1.0) if known_kl else dist.HalfCauchy(1.0)

        def model():
            scale = pyro.sample("scale", prior)
            w = pyro.sample("w", dist.Normal(torch.zeros(3), 1.0).to_event(1))
            with pyro.plate("data", 10):
                pyro.sample("y", dist.Normal(X @ w, scale), obs=Y)

        def guide():
            a = pyro.param("a", torch.tensor(0.3))
            pyro.sample("helper", dist.Normal(a, 1.0), infer={"is_auxiliary": True})
            scale = dist.Gamma(pyro.param("c", torch.tensor(3.0)), 2.0) if known_kl else dist.LogNormal(a, 0.3)
            pyro.sample("scale", scale)
            pyro.sample("w", dist.Normal(pyro.param("loc", torch.randn(3)), 0.2).to_event(1))

        results = []
        for elbo in (TraceMeanField_ELBO(num_particles=3), SQSELBO(num_particles=3)):
            pyro.clear_param_store()
            pyro.set_rng_seed(4)
            loss = elbo.loss_and_grads(model, guide)
            store = pyro.get_param_store()
            results.append((loss, {name: store[name].unconstrained().grad for name in store}))
        assert results[0][0] == pytest.approx(results[1][0], rel=1e-5)
        for name, gradient in results[0][1].items():
            torch.testing.assert_close(gradient, results[1][1][name])
        assert set(SQSELBO().terms(model, guide).kl_by_site) == {"helper", "scale", "w"}

    def test_prior_without_a_known_kl_falls_back_to_unbiased_draws(self):
        prior = SpikeAndSlab(0.3, dist.Cauchy(0.0, 1.0)).expand([3]).to_event(1)
        law = SpikeGMM(torch.tensor([0.2, 0.9, 0.6]), torch.tensor([-0.5, 0.8]), torch.tensor([0.1, 0.2]),
                       logits=torch.zeros(3, 2)).to_event(1)  # fmt: skip
        phi, loc, scale = np.full(2, 0.5), np.array([-0.5, 0.8]), np.array([0.1, 0.2])
        slab = mixture_kl(phi, loc, scale, scipy.stats.cauchy.logpdf)
        gates = np.array([0.2, 0.9, 0.6])
        gate_part = gates * np.log(gates / 0.3) + (1 - gates) * np.log((1 - gates) / 0.7)
        elbo = SQSELBO()
        draws = np.array([
            elbo.loss(lambda: pyro.sample("w", prior), lambda: pyro.sample("w", law)) for _ in range(400)
        ])  # fmt: skip
        off = abs(draws.mean() - (gate_part + gates * slab).sum())
        assert off < critical_z() * draws.std() / 20 + 1e-4

    def test_svi_learns_and_module_form_gives_the_same_gradient(self):
        svi = SVI(weight_model, weight_guide, pyro.optim.Adam({"lr": 0.05}), loss=SQSELBO(kl_weight=0.1))
        first = svi.evaluate_loss(X, Y)
        losses = [svi.step(X, Y) for _ in range(200)]
        assert losses[0] == pytest.approx(first) and losses[-1] < first - 1

    def test_module_form(self):
        class Model(PyroModule):
            def __init__(self):
                super().__init__()
                self.w = PyroSample(SpikeAndSlab(0.5, dist.Normal(0.0, 1.0)).expand([3]).to_event(1))

            def forward(self, x, y):
                w = self.w
                with pyro.plate("data", len(x)):
                    pyro.sample("y", dist.Normal(x @ w, 0.5), obs=y)

        class Guide(PyroModule):
            def __init__(self):
                super().__init__()
                self.gate = PyroParam(torch.tensor([0.9, 0.3, 0.6]), dist.constraints.unit_interval)
                self.loc = PyroParam(torch.tensor([-0.5, 0.8]))

            def forward(self, x, y):
                q = SpikeGMM(self.gate, self.loc, torch.tensor([0.1, 0.2]), logits=torch.zeros(3, 2))
                pyro.sample("w", q.to_event(1))

        module = SQSELBO()(Model(), Guide())
        loss = module(X, Y)
        loss.backward()
        assert loss.item() == pytest.approx(SQSELBO().loss(weight_model, weight_guide, X, Y))
        assert {name for name, p in module.named_parameters() if p.grad is not None} == {
            "guide.gate_unconstrained",
            "guide.loc_unconstrained",
        }

    def test_guide_messengers_as_in_the_parent(self):
        def model(x, y):
            w = pyro.sample("w", dist.Normal(torch.zeros(3), 1.0).to_event(1))
            with pyro.plate("data", len(x)):
                pyro.sample("y", dist.Normal(x @ w, 0.5), obs=y)

        losses = []
        for elbo in (TraceMeanField_ELBO(), SQSELBO()):
            pyro.set_rng_seed(2)
            losses.append(elbo.loss(model, AutoNormalMessenger(model), X, Y))
        assert losses[0] == pytest.approx(losses[1], rel=1e-5)

    def test_gaussian_guide_of_a_spike_and_slab_prior(self):
        """Pyro's own AutoNormal works with our prior: it pays -log λ₀ a weight for the spike it cannot use."""
        guide = AutoNormal(weight_model, init_scale=0.2, init_loc_fn=init_to_value(values={"w": torch.ones(3)}))
        guide(X, Y)
        draws = np.array([SQSELBO().terms(weight_model, guide, X, Y).kl.item() for _ in range(400)])
        gaussian = torch.distributions.kl_divergence(dist.Normal(1.0, 0.2), dist.Normal(0.0, 1.0))
        exact = 3 * (
            gaussian.item() + np.log(2)
        )  # AutoNormal's sites are an auxiliary Normal and a Delta: sampled
        assert abs(draws.mean() - exact) < critical_z() * draws.std() / 20

    def test_evaluation_of_a_guide_without_gradients(self):
        def guide(x, y):
            q = SpikeGMM(torch.rand(3), torch.zeros(2), torch.ones(2), logits=torch.zeros(2), estimator="discrete")
            pyro.sample("w", q.to_event(1))

        assert np.isfinite(SQSELBO().loss(weight_model, guide, X, Y))
        with pytest.raises(NotImplementedError, match="site 'w', Independent, has no reparametrised draws"):
            SQSELBO().differentiable_loss(weight_model, guide, X, Y)


class TestChecksStay:
    def test_site_shapes(self):
        def model():
            with pyro.plate("rows", 4):
                pyro.sample("w", SpikeAndSlab(0.5, dist.Normal(torch.zeros(3, 1), 1.0)))

        def guide():
            gates, logits = torch.rand(3, 1), torch.zeros(3, 1, 2)
            with pyro.plate("rows", 4):
                pyro.sample("w", SpikeGMM(gates, torch.zeros(2), torch.ones(2), logits=logits))

        with pytest.raises(ValueError, match="invalid log_prob shape"):
            SQSELBO().loss(model, guide)

    def test_site_order(self):
        def model():
            pyro.sample("a", dist.Normal(0.0, 1.0))
            pyro.sample("b", dist.Normal(0.0, 1.0))

        def guide():
            pyro.sample("b", dist.Normal(0.0, 1.0))
            pyro.sample("a", dist.Normal(0.0, 1.0))

        with pytest.warns(UserWarning, match="mean field restriction"):
            SQSELBO().loss(model, guide)

    def test_missing_site(self):
        with (
            pytest.warns(UserWarning, match="in model but not guide"),
            pytest.raises(ValueError, match="samples 'w' but the guide does not"),
        ):
            SQSELBO().loss(weight_model, lambda x, y: None, X, Y)

    def test_nan_warns(self):
        def model(x, y):
            weight_model(x, y)
            nan = torch.tensor(float("nan"))
            pyro.sample("z", dist.Normal(nan, 1.0, validate_args=False), obs=torch.tensor(0.0))

        with pytest.warns(UserWarning, match="Encountered NaN"):
            assert np.isnan(SQSELBO().loss(model, weight_guide, X, Y))

    @pytest.mark.parametrize(
        ("options", "sentence"),
        [
            ({"kl": "exact"}, "kl must be one of jensen, dominant, monte_carlo, but got 'exact'"),
            ({"kl_weight": -1.0}, "kl_weight must be a finite number >= 0, but got -1.0"),
            ({"kl_weight": float("nan")}, "kl_weight must be a finite number >= 0, but got nan"),
            ({"num_particles": 0}, "num_particles must be at least 1, but got 0"),
        ],
    )
    def test_bad_arguments(self, options, sentence):
        with pytest.raises(RecipeError, match=sentence):
            SQSELBO(**options)
