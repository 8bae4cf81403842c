"""KL terms: exact pieces against scipy, bounds against quadrature, gradients against finite differences."""

from pathlib import Path

import hypothesis.strategies as st
import numpy as np
import pyro.distributions as dist
import pytest
import scipy.stats
import torch
from hypothesis import given, settings
from torch.distributions import kl_divergence

from sqs_pyro.distributions import (
    SpikeAndSlab,
    SpikeGMM,
    certified_bracket,
    gate_divergence,
    kl_bound,
    monte_carlo_kl,
    register_bound,
    sampled_kl,
)
from sqs_pyro.distributions.kl import component_divergence
from sqs_pyro.testing.statistics import bernoulli_kl, critical_z, mixture_kl, panels

F64 = torch.float64
METHOD = Path(__file__).parents[2] / "docs" / "method.md"
CASES = 100  # random laws a hypothesis example; 100 examples make 10,000


def draw_case(seed: int, components: int, temperature: float, log_width: float, slab_scale: float):
    """``CASES`` random laws q as arrays, and a prior: gates, φ, μ, σ, λ₀, σ₀."""
    rng = np.random.default_rng(seed)
    logits = rng.normal(size=(CASES, components)) / temperature
    phi = np.exp(logits - logits.max(1, keepdims=True))
    phi /= phi.sum(1, keepdims=True)
    loc = rng.normal(size=(CASES, components)) * 2
    scale = np.exp(log_width + rng.normal(size=(CASES, components)) * 0.7)
    gates = rng.beta(0.5, 0.5, size=CASES)
    return gates, phi, loc, scale, rng.uniform(0.02, 0.98), slab_scale


def as_laws(gates, phi, loc, scale, inclusion, slab_scale) -> tuple[SpikeGMM, SpikeAndSlab]:
    q = SpikeGMM(*(torch.from_numpy(x) for x in (gates, loc, scale)), responsibilities=torch.from_numpy(phi))
    p = SpikeAndSlab(inclusion, dist.Normal(torch.zeros((), dtype=F64), slab_scale))
    return q, p


def true_kl(gates, phi, loc, scale, inclusion, slab_scale) -> np.ndarray:
    slab = mixture_kl(phi, loc, scale, scipy.stats.norm(0, slab_scale).logpdf)
    return bernoulli_kl(gates, inclusion) + gates * slab


CASE = st.builds(
    draw_case,
    seed=st.integers(0, 2**32 - 1),
    components=st.integers(1, 6),
    temperature=st.floats(0.05, 3.0),
    log_width=st.floats(-2.5, 1.0),
    slab_scale=st.floats(0.2, 5.0),
)


@settings(max_examples=100)
@given(CASE)
def test_bracket_holds_for_ten_thousand_cases(case):
    lower, upper = (bound.numpy() for bound in certified_bracket(*as_laws(*case)))
    true = true_kl(*case)
    tolerance = 1e-8 * (1 + np.abs(true))
    assert (true <= upper + tolerance).all()
    assert (lower <= true + tolerance).all()
    entropy = scipy.stats.entropy(case[1], axis=1)
    np.testing.assert_allclose(upper - lower, case[0] * entropy, atol=1e-9)


@settings(max_examples=25)
@given(CASE)
def test_dominant_is_kappa_of_the_most_probable_component(case):
    gates, phi, loc, scale, inclusion, slab_scale = case
    kappa = np.log(slab_scale / scale) + (scale**2 + loc**2) / (2 * slab_scale**2) - 0.5
    at = kappa[np.arange(CASES), phi.argmax(1)]
    bound = kl_bound(*as_laws(*case), "dominant").numpy()
    np.testing.assert_allclose(bound, bernoulli_kl(gates, inclusion) + gates * at, atol=1e-9)


@pytest.mark.parametrize("phi", [(0.6, 0.4), (0.4, 0.6)])
def test_dominant_is_no_bound_in_either_direction(phi):
    """The rows of the table in docs/method.md."""
    case = (np.array([1.0]), np.array([phi]), np.array([[0.0, 3.0]]), np.array([[1.0, 1.0]]), 1.0, 1.0)
    q, p = as_laws(*case)
    bound = {kind: kl_bound(q, p, kind).item() for kind in ("lower", "jensen", "dominant")}
    numbers = (bound["lower"], true_kl(*case)[0], bound["jensen"], bound["dominant"])
    row = f"| {phi} | " + " | ".join(f"{number:.3f}" for number in numbers) + " |"
    assert row in METHOD.read_text(encoding="utf-8")
    assert not bound["lower"] <= bound["dominant"] <= bound["jensen"]


def test_all_kinds_agree_for_hard_codes():
    case = draw_case(seed=5, components=4, temperature=1e-4, log_width=0.0, slab_scale=1.0)
    q, p = as_laws(*case)
    for kind in ("dominant", "lower"):
        np.testing.assert_allclose(kl_bound(q, p, kind), kl_bound(q, p, "jensen"), atol=1e-9)
    np.testing.assert_allclose(true_kl(*case), kl_bound(q, p), atol=1e-6)


@settings(max_examples=10)
@given(CASE)
def test_monte_carlo_agrees_within_its_error(case):
    mean, error = monte_carlo_kl(*as_laws(*case), 2000)
    off = np.abs(mean.numpy() - true_kl(*case)) - critical_z(10 * CASES) * error.numpy()
    assert (off <= 1e-9).all()  # K = 1 against its own family has no variance but rounding


@settings(max_examples=10)
@given(CASE)
def test_monte_carlo_of_drawn_components_agrees_within_its_error(case):
    estimates = sampled_kl(*as_laws(*case), 4000, stratified=False)
    error = estimates.std(0).numpy() / 4000**0.5
    off = np.abs(estimates.mean(0).numpy() - true_kl(*case)) - critical_z(10 * CASES) * error
    assert (off <= 1e-3).all()  # a component of tiny φ may never be drawn: then the error is not seen either


def test_monte_carlo_gradient_is_the_gradient_of_the_true_kl():
    case = draw_case(seed=1, components=3, temperature=1.0, log_width=-0.5, slab_scale=1.0)
    point, prior, replicates = [x[:4] for x in case[:4]], case[4:], 2000
    leaves = [torch.from_numpy(x).repeat(replicates, *[1] * x.ndim).requires_grad_() for x in point]
    gates, phi, loc, scale = leaves  # [R, 4] and [R, 4, K]: independent estimates at the same point
    q = SpikeGMM(gates, loc, scale, logits=phi.log())
    p = SpikeAndSlab(prior[0], dist.Normal(torch.zeros((), dtype=F64), prior[1]))
    sampled_kl(q, p, 5).mean(0).sum().backward()

    def kl(index: int, at: tuple[int, ...], step: float) -> float:
        moved = [x.copy() for x in point]
        moved[index][at] += step
        moved[1] /= moved[1].sum(1, keepdims=True)  # φ enters through a softmax of its logarithm
        return true_kl(*moved, *prior).sum()

    for index, leaf in enumerate(leaves):
        mean, error = leaf.grad.mean(0).numpy(), (leaf.grad.std(0) / replicates**0.5).numpy()
        for at in np.ndindex(*point[index].shape):
            numeric = (kl(index, at, 1e-5) - kl(index, at, -1e-5)) / 2e-5
            assert abs(mean[at] - numeric) < critical_z(mean.size) * error[at] + 1e-5


@pytest.mark.parametrize("kind", ["jensen", "dominant", "lower"])
@pytest.mark.parametrize("slab", ["normal", "laplace"])
def test_gradients_against_finite_differences(kind, slab):
    gates, phi, loc, scale, inclusion, _ = draw_case(3, 3, 1.0, -0.5, 1.0)
    inputs = (gates[:5].clip(0.05, 0.95), np.log(phi[:5]), loc[:5], np.log(scale[:5]), inclusion, -0.2)
    inputs = [torch.tensor(x, dtype=F64, requires_grad=True) for x in inputs]

    def bound(gates, logits, loc, log_scale, inclusion, log_slab):
        law = {"normal": dist.Normal, "laplace": dist.Laplace}[slab]
        q = SpikeGMM(gates, loc, log_scale.exp(), logits=logits, temperature=0.7)
        return kl_bound(q, SpikeAndSlab(inclusion, law(torch.zeros((), dtype=F64), log_slab.exp())), kind)

    assert torch.autograd.gradcheck(bound, inputs)


@given(st.floats(0, 1), st.floats(0.01, 0.99))
def test_gate_divergence_against_scipy(gate, inclusion):
    got = gate_divergence(torch.tensor(gate, dtype=F64), torch.tensor(inclusion, dtype=F64)).item()
    assert got == pytest.approx(bernoulli_kl(gate, inclusion), rel=1e-9, abs=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_gate_divergence_at_the_ends(dtype):
    gate = torch.tensor([0.0, 1.0, 0.0, 1.0], dtype=dtype, requires_grad=True)
    prior = torch.tensor([0.3, 0.3, 0.0, 1.0], dtype=dtype, requires_grad=True)
    value = gate_divergence(gate, prior)
    expected = torch.tensor([-np.log(0.7), -np.log(0.3), 0.0, 0.0], dtype=dtype)
    torch.testing.assert_close(value.detach(), expected)
    value.sum().backward()
    assert gate.grad.isfinite().all() and prior.grad.isfinite().all()
    assert gate.grad[0] < 0 < gate.grad[1]  # towards the prior from both ends
    impossible = gate_divergence(torch.tensor([0.5, 0.5]), torch.tensor([0.0, 1.0]))
    assert impossible.tolist() == [torch.inf, torch.inf]


def test_gate_divergence_gradient_against_finite_differences():
    gate = torch.rand(20, dtype=F64).clamp(0.01, 0.99).requires_grad_()
    prior = torch.rand(20, dtype=F64).clamp(0.01, 0.99).requires_grad_()
    assert torch.autograd.gradcheck(gate_divergence, (gate, prior))


def test_component_divergence_is_computed_once_for_a_shared_codebook():
    q = SpikeGMM(torch.rand(50, 20), torch.randn(4), torch.ones(4), logits=torch.zeros(50, 20, 4))
    assert component_divergence(q, dist.Normal(0.0, 1.0)).shape == (4,)
    per_column = dist.Normal(torch.zeros(20), torch.rand(20) + 0.5)
    assert component_divergence(q, per_column).shape == (20, 4)
    assert kl_bound(q, SpikeAndSlab(0.5, per_column).expand([50, 20])).shape == (50, 20)


def test_slab_per_weight_matches_each_weight_alone():
    gates, loc, scale = (
        torch.rand(3, 2, dtype=F64),
        torch.randn(3, 1, 4, dtype=F64),
        torch.rand(4, dtype=F64) + 0.1,
    )
    logits = torch.randn(3, 2, 4, dtype=F64)
    slab_loc, slab_scale = torch.randn(2, dtype=F64), torch.rand(3, 1, dtype=F64) + 0.5
    q = SpikeGMM(gates, loc, scale, logits=logits)
    together = kl_bound(q, SpikeAndSlab(0.3, dist.Normal(slab_loc, slab_scale)))
    for i, j in np.ndindex(3, 2):
        alone = SpikeGMM(gates[i, j], loc[i, 0], scale, logits=logits[i, j])
        prior = SpikeAndSlab(0.3, dist.Normal(slab_loc[j], slab_scale[i, 0]))
        torch.testing.assert_close(kl_bound(alone, prior), together[i, j])


class TestNormalAgainstStudentT:
    """KL by a quadrature in another variable than the one it is compared with."""

    @pytest.mark.parametrize("degrees_of_freedom", [0.5, 1.0, 4.0, 30.0])
    def test_against_quadrature(self, degrees_of_freedom):
        loc, scale = (x.ravel() for x in np.meshgrid([0.0, 0.3, -5.0, 40.0], [1e-3, 0.1, 1.0, 10.0, 300.0]))
        slab = dist.StudentT(torch.tensor(degrees_of_freedom, dtype=F64), torch.tensor(0.2, dtype=F64), 0.7)
        got = kl_divergence(dist.Normal(torch.from_numpy(loc), torch.from_numpy(scale)), slab).numpy()
        for mu, sigma, value in zip(loc, scale, got, strict=True):
            law = scipy.stats.norm(mu, sigma)
            reach = np.geomspace(1e-4, 12 * sigma + 12, 400)  # around the mean and around the slab's peak
            edges = np.unique(np.concatenate([mu - reach, [mu, 0.2], mu + reach, 0.2 - reach, 0.2 + reach]))
            x, weights = panels(edges[np.abs(edges - mu) <= 12 * sigma])
            log_ratio = law.logpdf(x) - scipy.stats.t.logpdf(x, degrees_of_freedom, 0.2, 0.7)
            expected = (weights * law.pdf(x) * log_ratio).sum()
            assert value == pytest.approx(expected, rel=1e-7, abs=1e-6)

    def test_gradients(self):
        loc, scale = torch.randn(20, dtype=F64), torch.randn(20, dtype=F64)
        inputs = [x.requires_grad_() for x in (loc, scale.exp(), torch.tensor([0.5, 4.0], dtype=F64)[:, None])]

        def divergence(loc, scale, slab_scale):
            return kl_divergence(dist.Normal(loc, scale), dist.StudentT(3.0, 0.1, slab_scale))

        assert torch.autograd.gradcheck(divergence, inputs)


class TestDispatch:
    def test_most_specific_pair_wins(self):
        class MyPrior(SpikeAndSlab):
            pass

        class MyGMM(SpikeGMM):
            pass

        q = MyGMM(torch.rand(2), torch.zeros(2), torch.ones(2), logits=torch.zeros(2, 2))
        p = MyPrior(0.5, dist.Normal(0.0, 1.0))
        inherited = kl_bound(q, p)
        register_bound("jensen", SpikeGMM, MyPrior)(lambda q, p: q.gates * 7)
        assert torch.equal(kl_bound(q, p), q.gates * 7)
        assert torch.equal(kl_divergence(q, p), q.gates * 7)  # torch's entry point sees the same
        assert torch.equal(kl_bound(q, p, "lower"), kl_bound(q, SpikeAndSlab(0.5, dist.Normal(0.0, 1.0)), "lower"))
        register_bound("jensen", MyGMM, SpikeAndSlab)(lambda q, p: q.gates * 8)
        assert torch.equal(kl_bound(q, p), q.gates * 7)  # p before q
        register_bound("jensen", MyGMM, MyPrior)(lambda q, p: q.gates * 9)
        assert torch.equal(kl_bound(q, p), q.gates * 9)
        assert inherited.shape == (2,)

    def test_exact_kl_stands_for_every_kind(self):
        q, p = dist.Normal(0.3, 0.5), dist.Normal(0.0, 1.0)
        for kind in ("jensen", "dominant", "lower"):
            assert torch.equal(kl_bound(q, p, kind), kl_divergence(q, p))

    def test_unequal_event_dimensions(self):
        q = SpikeGMM(torch.rand(3, 4), torch.zeros(2), torch.ones(2), logits=torch.zeros(2))
        p = SpikeAndSlab(0.5, dist.Normal(0.0, 1.0)).expand([3, 4])
        with pytest.raises(NotImplementedError):
            kl_bound(q.to_event(2), p.to_event(1))
        assert kl_bound(q.to_event(1), p.to_event(1)).shape == (3,)

    def test_masked_on_both_sides(self):
        q = SpikeGMM(torch.rand(3), torch.zeros(2), torch.ones(2), logits=torch.zeros(2))
        p = SpikeAndSlab(0.5, dist.Normal(0.0, 1.0)).expand([3])
        a, b = torch.tensor([True, True, False]), torch.tensor([True, False, True])
        expected = kl_bound(q, p) * torch.tensor([1.0, 0.0, 0.0])
        assert torch.equal(kl_bound(q.mask(a), p.mask(b)), expected)

    def test_sentences(self):
        q = SpikeGMM(torch.rand(3), torch.zeros(2), torch.ones(2), logits=torch.zeros(2))
        with pytest.raises(ValueError, match="must be one of jensen, dominant, lower, but got 'exact'"):
            kl_bound(q, q, "exact")
        with pytest.raises(ValueError, match="two distribution classes, but got 3"):
            register_bound("jensen", SpikeGMM, 3)
        with pytest.raises(NotImplementedError):
            kl_bound(q, dist.StudentT(3.0))
        with pytest.raises(ValueError, match="num_samples must be at least 2, but got 1"):
            monte_carlo_kl(q, q, 1)


class TestSpikeAgainstDensity:
    """A density gives the spike no mass."""

    loc, scale, logits = torch.tensor([0.0, 1.0]), torch.tensor([0.5, 0.5]), torch.zeros(3, 2)
    gates = torch.tensor([0.9, 1.0, 0.0])

    @pytest.mark.parametrize("kind", ["jensen", "dominant", "lower"])
    def test_infinite_unless_the_gate_is_one(self, kind):
        q = SpikeGMM(self.gates, self.loc, self.scale, logits=self.logits)
        kl = kl_bound(q, dist.Normal(0.0, 1.0), kind)
        assert kl.isinf().tolist() == [True, False, True]

    def test_monte_carlo_says_the_same(self):
        q = SpikeGMM(self.gates, self.loc, self.scale, logits=self.logits)
        mean, error = monte_carlo_kl(q, dist.Normal(0.0, 1.0), 2000)
        exact = mixture_kl(
            np.array([0.5, 0.5]), np.array([0.0, 1.0]), np.array([0.5, 0.5]), scipy.stats.norm.logpdf
        )
        assert mean.isinf().tolist() == [True, False, True]
        assert abs(mean[1].item() - exact) < critical_z() * error[1].item()


class TestSpikeAndSlabPairs:
    def test_exact_against_quadrature(self):
        gates, loc, scale = np.array([0.0, 0.3, 1.0]), np.array([0.1, -0.4, 2.0]), np.array([0.2, 1.0, 0.5])
        q = SpikeAndSlab(torch.from_numpy(gates), dist.Normal(torch.from_numpy(loc), torch.from_numpy(scale)))
        p = SpikeAndSlab(0.25, dist.Laplace(torch.zeros((), dtype=F64), 0.8))
        slab = mixture_kl(np.ones((3, 1)), loc[:, None], scale[:, None], scipy.stats.laplace(0, 0.8).logpdf)
        expected = bernoulli_kl(gates, 0.25) + gates * slab
        np.testing.assert_allclose(kl_divergence(q, p).numpy(), expected, atol=1e-4)  # the kink at 0
        mean, error = monte_carlo_kl(q, p, 5000)
        assert (np.abs(mean.numpy() - expected) <= critical_z(3) * error.numpy() + 1e-4).all()

    def test_a_gaussian_pays_for_the_spike_it_never_uses(self):
        q, p = dist.Normal(0.3, 0.5), SpikeAndSlab(0.25, dist.Normal(0.0, 1.0))
        mean, error = monte_carlo_kl(q, p, 20_000)
        assert abs(kl_divergence(q, p) - mean) < critical_z() * error

    def test_support_that_does_not_cover_is_infinite_only_where_it_has_mass(self):
        q = SpikeAndSlab(torch.tensor([0.0, 0.5]), dist.Normal(0.0, 1.0))
        assert kl_divergence(q, SpikeAndSlab(0.5, dist.Gamma(1.0, 1.0))).isinf().tolist() == [False, True]
