"""Contract kits: any distribution of a weight, and any prior, inherits these tests.

A distribution supplies ``make() -> distribution`` (float64, ``batch_shape == (3,)``, ``event_shape == ()``) whose
``log_prob`` is with respect to δ₀ + Lebesgue when ``has_atom_at_zero``, and ``edges()``: panel edges that resolve
its density. A prior is one for which ``kl_bound(SpikeGMM, prior)`` is registered (``has_bound``), or left to
Monte Carlo.
"""

import pickle
from collections.abc import Callable
from functools import partial
from typing import Any, Literal

import numpy as np
import pyro
import pytest
import torch
from pyro.distributions import TorchDistribution

from sqs_pyro import SQSELBO, BayesianNetwork, SpikeGMMGuide
from sqs_pyro.distributions import SpikeGMM, certified_bracket, kl_bound, monte_carlo_kl
from sqs_pyro.distributions.monte_carlo import has_atom
from sqs_pyro.testing.statistics import assert_distribution, assert_rate, component_edges, critical_z, panels

DRAWS = 20_000  # a rate of a half is then known to 0.35 %, one standard error


class WeightDistributionContract:
    """Shapes, mass, moments and draws of a distribution that may have an atom at zero."""

    def make(self) -> TorchDistribution:
        """Return the distribution under test, of three weights."""
        raise NotImplementedError

    def edges(self) -> np.ndarray:
        """Sorted edges over the support of the continuous part, avoiding panels across a jump of the density."""
        return np.linspace(-20, 20, 801)

    def atom(self, distribution: TorchDistribution) -> np.ndarray:
        """Return the mass at zero by its own log_prob, ``[3]``."""
        if not getattr(distribution, "has_atom_at_zero", False):
            return np.zeros(3)
        return distribution.log_prob(torch.zeros(3, dtype=torch.float64)).exp().detach().numpy()

    def integrate(
        self, distribution: TorchDistribution, function: Callable[[np.ndarray], np.ndarray]
    ) -> np.ndarray:
        """Return ``E[function]`` over the continuous part by quadrature, ``[3]``."""
        x, weights = panels(self.edges())  # [P]; no node is at zero, where log_prob is that of the atom
        density = distribution.log_prob(torch.from_numpy(x)[:, None].expand(-1, 3)).exp().detach().numpy()
        return (weights[:, None] * density * function(x)[:, None]).sum(0)

    def test_shapes(self) -> None:
        distribution = self.make()
        assert distribution.batch_shape == (3,) and distribution.event_shape == ()
        for shape in ((), (2,), (4, 2)):
            draws = distribution.sample(shape)
            assert draws.shape == (*shape, 3) and not draws.requires_grad
            assert distribution.log_prob(draws).shape == (*shape, 3)
            if distribution.has_rsample:
                assert distribution.rsample(shape).shape == (*shape, 3)
        assert distribution.mean.shape == distribution.variance.shape == (3,)
        assert distribution.support.check(distribution.sample((5,))).all()

    def test_expand_and_to_event(self) -> None:
        distribution = self.make()
        wide = distribution.expand((4, 2, 3))
        value = distribution.sample((4, 2))
        assert wide.batch_shape == (4, 2, 3) and wide.sample((5,)).shape == (5, 4, 2, 3)
        assert torch.equal(wide.log_prob(value), distribution.log_prob(value))
        assert torch.equal(wide.mean, distribution.mean.expand(4, 2, 3))
        assert torch.equal(wide.variance, distribution.variance.expand(4, 2, 3))
        joint = wide.to_event(2)
        assert joint.batch_shape == (4,) and joint.event_shape == (2, 3)
        torch.testing.assert_close(joint.log_prob(value), distribution.log_prob(value).sum((1, 2)))

    def test_mask(self) -> None:
        distribution, mask = self.make(), torch.tensor([True, False, True])
        value = distribution.sample()
        masked = distribution.mask(mask).log_prob(value)
        assert torch.equal(masked, distribution.log_prob(value).where(mask, torch.zeros(3, dtype=torch.float64)))

    def test_total_mass_is_one(self) -> None:
        distribution = self.make()
        mass = self.atom(distribution) + self.integrate(distribution, np.ones_like)
        np.testing.assert_allclose(mass, 1.0, atol=1e-7)

    def test_moments(self) -> None:
        distribution = self.make()
        mean = self.integrate(distribution, lambda x: x)
        second = self.integrate(distribution, np.square)
        np.testing.assert_allclose(distribution.mean.detach().numpy(), mean, atol=1e-7)
        np.testing.assert_allclose(distribution.variance.detach().numpy(), second - mean**2, atol=1e-6)

    def test_draws_follow_the_density(self) -> None:
        distribution = self.make()
        draws, atom, edges = distribution.sample((DRAWS,)).numpy(), self.atom(distribution), self.edges()
        edges = np.unique(edges)
        edges = np.interp(np.arange(4 * len(edges) - 3) / 4, np.arange(len(edges)), edges)  # a CDF linear between
        x, weights = panels(edges)
        density = distribution.log_prob(torch.from_numpy(x)[:, None].expand(-1, 3)).exp().detach().numpy()
        masses = (weights[:, None] * density).reshape(len(edges) - 1, -1, 3).sum(1)  # of each panel
        for i in range(3):
            zeros = int((draws[:, i] == 0).sum())
            assert_rate(zeros, DRAWS, atom[i])
            cumulative = (np.append(0.0, masses[:, i].cumsum()) / (1 - atom[i])).clip(0, 1)
            cdf: Callable[..., Any] = partial(np.interp, xp=edges, fp=cumulative)
            assert_distribution(draws[draws[:, i] != 0, i], cdf)

    def test_log_prob_has_finite_gradients_at_zero(self) -> None:
        distribution = self.make()
        value = torch.tensor([0.0, 0.5, 0.0], dtype=torch.float64, requires_grad=True)
        distribution.log_prob(value).sum().backward()
        assert value.grad is not None and value.grad.isfinite().all()


class PriorContract(WeightDistributionContract):
    """A prior also has a KL from the variational family, and a life in a network, in Predictive and in SVI."""

    has_bound = True  # False: no KL bound is known, the ELBO falls back to Monte Carlo
    has_atom = True  # False: a density, against which the guide's spike is a Gaussian
    exact_for_one_component = True  # the KL of a single Gaussian is a formula, not a bound
    spike_scale = 0.15  # of the guide's spike, against a density

    def guide(self, components: int = 4) -> SpikeGMM:
        """Return a member of the variational family over the same three weights."""
        generator = torch.Generator().manual_seed(3)

        def normal(*shape: int) -> torch.Tensor:
            return torch.randn(*shape, dtype=torch.float64, generator=generator)

        spike = None if self.has_atom else self.spike_scale
        gates, loc, scale = normal(3).sigmoid(), normal(components), 0.2 * normal(components).exp()
        return SpikeGMM(gates, loc, scale, logits=normal(3, components), temperature=0.7, spike_scale=spike)

    def true_kl(self, q: SpikeGMM, p: TorchDistribution) -> np.ndarray:
        """Return ``KL(q‖p)`` from the two log-densities by quadrature, ``[3]``; kinks are among ``edges``."""
        # The spike, a Gaussian against a density, is one more component at zero.
        resolve = component_edges(np.append(q.loc.numpy(), 0.0), np.append(q.scale.numpy(), self.spike_scale))
        own = self.edges()
        inside = own[(own > resolve[0]) & (own < resolve[-1])]
        x, weights = panels(np.unique(np.concatenate([resolve, inside])))
        at = torch.from_numpy(x)[:, None].expand(-1, 3)
        log_q, log_p = q.log_prob(at).numpy(), p.log_prob(at).detach().numpy()
        continuous = (weights[:, None] * np.exp(log_q) * (log_q - log_p)).sum(0)
        if not self.has_atom:
            return continuous
        # Both have mass at zero: with respect to δ₀ + Lebesgue it is one more term of the sum.
        zero = torch.zeros(3, dtype=torch.float64)
        log_q0, log_p0 = q.log_prob(zero).numpy(), p.log_prob(zero).detach().numpy()
        return continuous + np.exp(log_q0) * (log_q0 - log_p0)

    def test_declares_its_atom(self) -> None:
        assert has_atom(self.make()) is self.has_atom

    def test_bounds_hold(self) -> None:
        q, p = self.guide(), self.make()
        true = self.true_kl(q, p)
        if not self.has_bound:
            with pytest.raises(NotImplementedError):
                certified_bracket(q, p)
            return
        lower, upper = certified_bracket(q, p)
        assert (lower.detach().numpy() <= true + 1e-7).all() and (true - 1e-7 <= upper.detach().numpy()).all()

    def test_kl_of_one_component_is_the_integral(self) -> None:
        q, p = self.guide(components=1), self.make()
        if not self.has_bound:
            return
        true, upper = self.true_kl(q, p), kl_bound(q, p).detach().numpy()
        if self.exact_for_one_component:
            np.testing.assert_allclose(upper, true, rtol=1e-4)
        assert (kl_bound(q, p, "lower").detach().numpy() <= true * (1 + 1e-7)).all()

    def test_monte_carlo_agrees(self) -> None:
        q, p = self.guide(), self.make()
        mean, error = monte_carlo_kl(q, p, 4000)
        off = np.abs(mean.detach().numpy() - self.true_kl(q, p)) / error.detach().numpy()
        assert off.max() < critical_z(3)  # the worst of three weights

    def test_bounds_sum_over_events(self) -> None:
        q, p = self.guide(), self.make()
        for kind in ("jensen", "dominant", "lower") if self.has_bound else ():
            each = kl_bound(q, p, kind)
            torch.testing.assert_close(kl_bound(q.to_event(1), p.to_event(1), kind), each.sum())
            torch.testing.assert_close(kl_bound(q.expand((2, 3)), p.expand((2, 3)), kind), each.expand(2, 3))

    def test_survives_pickling(self) -> None:
        distribution = self.make()
        value = distribution.sample((4,))
        assert torch.equal(pickle.loads(pickle.dumps(distribution)).log_prob(value), distribution.log_prob(value))

    def network(self) -> BayesianNetwork:
        """Return a linear layer of 4 x 3 weights, each column with one of the three distributions."""
        torch.manual_seed(0)
        net = torch.nn.Linear(3, 4, bias=False, dtype=torch.float64)
        return BayesianNetwork(net, prior=self.make(), num_data=20)

    def test_moves_with_its_network(self) -> None:
        model, value = self.network(), self.make().sample((4,))
        expected = self.make().log_prob(value).sum()
        got = model.to(torch.float32).priors["weight"].log_prob(value.float())
        assert got.dtype == torch.float32
        torch.testing.assert_close(got.double(), expected, rtol=1e-4, atol=1e-4)

    def test_prior_predictive(self) -> None:
        draws = pyro.infer.Predictive(self.network(), {}, num_samples=300)(torch.randn(5, 3, dtype=torch.float64))
        assert draws["obs"].shape == (300, 5)
        weights, atom = draws["weight"].reshape(-1, 3), self.atom(self.make())
        for i in range(3):
            assert_rate(int((weights[:, i] == 0).sum()), len(weights), atom[i])

    @pytest.mark.parametrize("estimator", ["straight_through", "soft"])
    def test_svi_is_the_same(self, estimator: Literal["straight_through", "soft"]) -> None:
        model = self.network()
        guide = SpikeGMMGuide(model, num_components=3, temperature=0.5, estimator=estimator, initial_gate=1.0)
        before = {name: p.detach().clone() for name, p in guide.named_parameters()}
        svi = pyro.infer.SVI(model, guide, pyro.optim.Adam({"lr": 1e-2}), loss=SQSELBO())
        x, y = torch.randn(20, 3, dtype=torch.float64), torch.arange(20) % 4
        assert np.isfinite([svi.step(x, y) for _ in range(3)]).all()
        learning = {name: p for name, p in guide.named_parameters() if p.requires_grad}
        assert {"latent_unconstrained", "gate_logit_unconstrained", "loc_unconstrained"} <= {
            name.rsplit(".", 1)[1] for name in learning
        }
        for name, parameter in learning.items():
            assert parameter.isfinite().all() and not torch.equal(parameter, before[name]), name
