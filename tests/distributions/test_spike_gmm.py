"""SpikeGMM against scipy and closed forms, its limits, its three estimators and its sentences."""

import numpy as np
import pyro
import pytest
import scipy.stats
import torch

from sqs_pyro.distributions import SpikeGMM
from sqs_pyro.testing.distributions import WeightDistributionContract
from sqs_pyro.testing.statistics import (
    FAILURE_RATE,
    assert_distribution,
    assert_rate,
    component_edges,
    mixture_logpdf,
)

F64 = torch.float64
LOC, SCALE = torch.tensor([-1.0, 0.2, 0.9], dtype=F64), torch.tensor([0.3, 0.1, 0.5], dtype=F64)
PHI = torch.tensor([[0.2, 0.3, 0.5], [0.9, 0.1, 0.0], [1 / 3, 1 / 3, 1 / 3]], dtype=F64)
GATES = torch.tensor([0.25, 0.8, 0.6], dtype=F64)


def law(**changes) -> SpikeGMM:
    options = {"gates": GATES, "loc": LOC, "scale": SCALE, "responsibilities": PHI} | changes
    return SpikeGMM(**options)


class TestSpikeGMM(WeightDistributionContract):
    def make(self):
        return law()

    def edges(self):
        return component_edges(LOC.numpy(), SCALE.numpy())


class TestFromLogits(TestSpikeGMM):
    """The same law given as logits at another temperature."""

    def make(self):
        return law(responsibilities=None, logits=0.3 * PHI.log(), temperature=0.3)


class TestAtTemperature(TestSpikeGMM):
    """The same law reached from another temperature, by given responsibilities, and from an inexact estimator."""

    def make(self):
        hot = law(responsibilities=law(temperature=1.0).responsibilities_at(2.5), temperature=2.5)
        hot.estimator = "discrete"
        return hot.at_temperature(1.0)


class TestCodebookPerWeight(WeightDistributionContract):
    """Every weight its own loc and scale."""

    def make(self):
        shift = torch.tensor([0.0, 0.1, -0.3], dtype=F64)[:, None]
        return law(loc=LOC + shift, scale=SCALE * (1 + shift))

    def edges(self):
        return np.linspace(-8, 8, 1601)


def test_log_prob_against_scipy():
    value = torch.tensor([0.4, -1.1, 0.0], dtype=F64)
    mixture = mixture_logpdf(value.numpy()[:, None], PHI.numpy(), LOC.numpy()[None], SCALE.numpy()[None])[:, 0]
    expected = [np.log(0.25) + mixture[0], np.log(0.8) + mixture[1], np.log(0.4)]
    np.testing.assert_allclose(law().log_prob(value).numpy(), expected, rtol=1e-12)


def test_log_prob_far_from_every_component_stays_finite():
    value = torch.tensor([1e3, -1e3, 50.0])
    single = SpikeGMM(GATES.float(), LOC.float(), SCALE.float(), responsibilities=PHI.float())
    assert single.log_prob(value).isfinite().all()


def test_gate_limits():
    closed, opened = law(gates=torch.zeros(3, dtype=F64)), law(gates=torch.ones(3, dtype=F64))
    zero, value = torch.zeros(3, dtype=F64), torch.full((3,), 0.4, dtype=F64)
    assert (closed.sample((200,)) == 0).all() and closed.log_prob(zero).tolist() == [0.0] * 3
    assert (closed.log_prob(value) == -torch.inf).all() and (closed.variance == 0).all()
    assert (opened.sample((200,)) != 0).all() and (opened.log_prob(zero) == -torch.inf).all()
    torch.testing.assert_close(opened.log_prob(value), opened.slab_log_prob(value))


def test_one_component_is_a_gaussian():
    one = torch.ones(1, dtype=F64)
    gaussian = SpikeGMM(one, 0.3 * one, 0.7 * one, logits=torch.zeros(1, 1, dtype=F64))
    value = torch.linspace(-2, 2, 9, dtype=F64)[:, None] + 0.01
    expected = torch.distributions.Normal(0.3 * one, 0.7 * one)
    torch.testing.assert_close(gaussian.log_prob(value), expected.log_prob(value))
    assert_distribution(gaussian.sample((5000,)).squeeze(1).numpy(), scipy.stats.norm(0.3, 0.7).cdf)


def test_temperature_to_zero_is_the_hard_code():
    logits = torch.tensor([[0.1, 0.0, -0.2], [0.0, 0.3, 0.2], [-1.0, 0.0, 0.4]], dtype=F64)
    hard = law(responsibilities=None, logits=logits, temperature=1e-3, gates=torch.ones(3, dtype=F64))
    assert hard.codes.tolist() == [0, 1, 2]
    torch.testing.assert_close(hard.responsibilities, torch.eye(3, dtype=F64))
    torch.testing.assert_close(hard.assignment_entropy, torch.zeros(3, dtype=F64))
    for value in (hard.mean, hard.mode, hard.discrete_sample()):
        torch.testing.assert_close(value, LOC)


def test_entropy_and_responsibilities_at_another_temperature():
    q = law()
    np.testing.assert_allclose(q.assignment_entropy.numpy(), scipy.stats.entropy(PHI.numpy(), axis=1))
    flatter = q.responsibilities_at(2.0).numpy()
    expected = np.sqrt(PHI.numpy()) / np.sqrt(PHI.numpy()).sum(1, keepdims=True)
    np.testing.assert_allclose(flatter, expected)


def test_straight_through_is_the_hard_network_with_the_soft_gradient():
    gates, loc = GATES.clone().requires_grad_(), LOC.clone().requires_grad_()
    logits = PHI.clamp(min=1e-3).log().requires_grad_()
    q = SpikeGMM(gates, loc, SCALE, logits=logits)
    value = q.rsample((2,))
    assert torch.equal(value, q.mode.expand(2, 3)) and value[0].tolist() == [0.0, -1.0, -1.0]
    upstream = torch.randn(2, 3, dtype=F64)
    hard = torch.autograd.grad(value, (gates, loc, logits), upstream)
    soft = torch.autograd.grad(q.mean.expand(2, 3), (gates, loc, logits), upstream)
    for a, b in zip(hard, soft, strict=True):
        torch.testing.assert_close(a, b)


def test_straight_through_value_is_exactly_a_codebook_value_in_float32():
    gates, logits = torch.rand(1000), torch.randn(1000, 16)
    loc = torch.randn(16)
    value = SpikeGMM(gates, loc, torch.ones(16), logits=logits).rsample()
    assert torch.isin(value[gates > 0.5], loc).all() and (value[gates <= 0.5] == 0).all()


def test_soft_is_the_mean():
    q = law(estimator="soft")
    assert torch.equal(q.rsample((2,)), q.mean.expand(2, 3))


def test_concrete_tends_to_discrete_draws():
    q = law(estimator="concrete", responsibilities=None, logits=1e-3 * PHI.clamp(min=1e-9).log(), temperature=1e-3)
    draws = q.rsample((20_000,))[:, 0]
    for value, probability in zip([0.0, *LOC], [0.75, *(0.25 * PHI[0])], strict=True):
        assert_rate(int(((draws - value).abs() < 1e-3).sum()), len(draws), float(probability))


def test_concrete_gradients_reach_every_parameter():
    gates, loc, logits = (x.clone().requires_grad_() for x in (GATES, LOC, PHI.clamp(min=1e-3).log()))
    SpikeGMM(gates, loc, SCALE, logits=logits, temperature=0.5, estimator="concrete").rsample().sum().backward()
    for parameter in (gates, loc, logits):
        assert parameter.grad.isfinite().all() and (parameter.grad != 0).all()


@pytest.mark.parametrize("temperature", [None, 3.0])
def test_discrete_draws_have_the_right_frequencies(temperature):
    q = law()
    draws = q.discrete_sample(temperature, (20_000,))
    phi = q.responsibilities_at(temperature)
    assert draws.shape == (20_000, 3) and torch.isin(draws, torch.cat([LOC, torch.zeros(1, dtype=F64)])).all()
    for i in range(3):
        expected = torch.cat([1 - GATES[i : i + 1], GATES[i] * phi[i]]).numpy()
        counts = np.array([int((draws[:, i] == v).sum()) for v in [0.0, *LOC]])
        keep = expected > 0
        assert counts[~keep].sum() == 0
        assert scipy.stats.chisquare(counts[keep], 20_000 * expected[keep]).pvalue > FAILURE_RATE


def test_discrete_estimator_samples_codebook_values():
    q = law(estimator="discrete")
    assert not q.has_rsample and torch.isin(q(), torch.cat([LOC, torch.zeros(1, dtype=F64)])).all()


@pytest.mark.parametrize("gate", [0.0, 0.5, 1.0])
def test_log_prob_gradients_are_finite(gate):
    gates = torch.full((2,), gate, dtype=F64, requires_grad=True)
    logits = torch.tensor([0.0, -torch.inf, 1.0], dtype=F64, requires_grad=True)  # an excluded component
    log_prob = SpikeGMM(gates, LOC, SCALE, logits=logits).log_prob(torch.tensor([0.0, 0.3], dtype=F64))
    log_prob[log_prob.isfinite()].sum().backward()
    assert gates.grad.isfinite().all() and logits.grad.isfinite().all()


def test_in_plates_with_scale_and_mask():
    q = law()

    def guide():
        with pyro.plate("rows", 4, dim=-2), pyro.plate("columns", 3, dim=-1):
            return pyro.sample("w", q)

    mask = torch.tensor([True, False, True])
    with pyro.poutine.trace() as recorded, pyro.poutine.scale(scale=3.0), pyro.poutine.mask(mask=mask):
        guide()
    recorded.trace.compute_log_prob()
    site = recorded.trace.nodes["w"]
    assert site["value"].shape == (4, 3) and site["fn"].batch_shape == (4, 3)
    torch.testing.assert_close(site["log_prob"], (3 * q.log_prob(site["value"])).where(mask, 0.0))


def test_a_shared_codebook_is_not_copied_by_expand():
    q = law().expand((100, 3))
    assert q.loc.shape == (3,) and q.gates.untyped_storage().nbytes() == 24


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"gates": GATES + 0.5}, r"SpikeGMM: gates must lie in \[0, 1\], but got values from 0.75 to 1.3"),
        ({"logits": PHI}, "exactly one of responsibilities and logits, but both"),
        ({"responsibilities": None}, "exactly one of responsibilities and logits, but neither"),
        ({"responsibilities": 2 * PHI}, r"responsibilities must lie in \[0, 1\]"),
        ({"responsibilities": 0.5 * PHI}, "must sum to 1 over the last dimension, but a sum is off by 0.5"),
        ({"scale": SCALE - 0.1}, "scale must be positive, but its smallest value is 0"),
        ({"loc": LOC / 0}, "loc must be finite"),
        ({"loc": LOC[:2]}, r"last dimension of loc must be the number of components, 3.*got shape \(2,\)"),
        ({"temperature": 0.0}, "temperature must be positive, but got 0"),
        ({"estimator": "gumbel"}, "estimator must be one of local, pathwise, straight_through.*got 'gumbel'"),
    ],
)
def test_bad_arguments(changes, sentence):
    with pytest.raises(ValueError, match=sentence):
        law(**changes)
