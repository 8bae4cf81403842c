"""Figures of predicted numbers against quadrature, scipy, and what is known of one normal distribution."""

import numpy as np
import pytest
import torch
from scipy.integrate import quad
from scipy.optimize import brentq
from scipy.stats import kstest, norm

from sqs_pyro.errors import ArgumentError, DataError
from sqs_pyro.evaluation.predictive.mixture import (
    mixture_cdf,
    mixture_crps,
    mixture_log_density,
    mixture_quantile,
)
from sqs_pyro.evaluation.predictive.regression import evaluate_mixture, evaluate_samples, sample_crps
from sqs_pyro.testing.statistics import FAILURE_RATE


@pytest.fixture
def mixture():
    """Means and scales [3, 4] and observations [4]."""
    random = np.random.default_rng(1)
    return random.normal(0, 2, (3, 4)), random.uniform(0.2, 1.5, (3, 4)), random.normal(0, 2, 4)


def tensors(*arrays):
    return tuple(map(torch.from_numpy, arrays))


def test_mixture_by_scipy(mixture):
    m, s, y = mixture
    density, cdf = norm.pdf(y, m, s).mean(0), norm.cdf(y, m, s).mean(0)
    np.testing.assert_allclose(mixture_log_density(*tensors(m, s, y)), np.log(density))
    np.testing.assert_allclose(mixture_cdf(*tensors(m, s, y)), cdf)
    for p in (0.01, 0.5, 0.97):
        expected = [
            brentq(lambda x, i=i, p=p: norm.cdf(x, m[:, i], s[:, i]).mean() - p, -30, 30) for i in range(4)
        ]
        np.testing.assert_allclose(mixture_quantile(*tensors(m, s), p), expected, atol=1e-9)


def test_crps_by_quadrature(mixture):
    """``∫ (F(x) - [x >= y])² dx``, the definition."""
    m, s, y = mixture
    found = mixture_crps(*tensors(m, s, y))
    for i in range(4):
        below = quad(lambda x, i=i: norm.cdf(x, m[:, i], s[:, i]).mean() ** 2, -40, y[i], limit=300)[0]
        above = quad(lambda x, i=i: (1 - norm.cdf(x, m[:, i], s[:, i]).mean()) ** 2, y[i], 40, limit=300)[0]
        assert float(found[i]) == pytest.approx(below + above, abs=1e-6)


def test_crps_of_samples_is_that_of_their_steps():
    x, y = np.random.default_rng(2).normal(size=(7, 5)), np.linspace(-2, 2, 5)
    expected = abs(x - y).mean(0) - abs(x[:, None] - x[None]).mean((0, 1)) / 2
    np.testing.assert_allclose(sample_crps(*tensors(x, y)), expected)


def test_what_generated_the_data_is_calibrated():
    mean = torch.randn(20_000, dtype=torch.float64)
    y = mean + 0.5 * torch.randn_like(mean)
    found = evaluate_mixture(mean[None], 0.5, y)
    assert found.nll == pytest.approx(norm.entropy(0, 0.5), abs=5 * np.sqrt(0.5 / 20_000))
    assert found.rmse == pytest.approx(0.5, rel=0.03)
    assert found.crps == pytest.approx(0.5 / np.sqrt(np.pi), rel=0.03)  # of the true normal distribution
    assert kstest(found.pit, "uniform").pvalue > FAILURE_RATE
    for interval in found.intervals:
        error = 5 * np.sqrt(interval.level * (1 - interval.level) / 20_000)
        assert interval.coverage == pytest.approx(interval.level, abs=error)
        assert interval.width == pytest.approx(2 * 0.5 * norm.ppf((1 + interval.level) / 2))


def test_samples_of_a_mixture_have_its_figures(mixture):
    m, s, y = tensors(*mixture)
    pick = torch.randint(3, (40_000,))
    samples = m[pick] + s[pick] * torch.randn(40_000, 4, dtype=torch.float64)
    exact, sampled = evaluate_mixture(m, s, y), evaluate_samples(samples, y)
    assert sampled.nll is None and sampled.num_examples == exact.num_examples == 4
    assert sampled.rmse == pytest.approx(exact.rmse, rel=0.02)
    assert sampled.crps == pytest.approx(exact.crps, rel=0.02)
    torch.testing.assert_close(sampled.pit, exact.pit, atol=0.015, rtol=0)
    for one, other in zip(sampled.intervals, exact.intervals, strict=True):
        assert one.coverage == other.coverage and one.width == pytest.approx(other.width, rel=0.03)


def test_quantiles_of_samples_are_numpys():
    samples, y = torch.randn(23, 6), torch.zeros(6)
    (found,) = evaluate_samples(samples, y, levels=(0.8,)).intervals
    low, high = np.quantile(samples.double().numpy(), [0.1, 0.9], axis=0)
    assert found.width == pytest.approx((high - low).mean())


def test_several_numbers_of_an_example_count_one_by_one():
    m, y = torch.randn(3, 5, 2), torch.randn(5, 2)
    whole, flat = evaluate_mixture(m, 0.3, y), evaluate_mixture(m.flatten(1), 0.3, y.flatten())
    assert whole.num_examples == 10 and whole.nll == flat.nll and whole.intervals == flat.intervals


def test_a_point_has_the_absolute_error_for_its_score():
    samples, y = torch.tensor([[1.0, 2.0]]), torch.tensor([3.0, 2.0])
    found = evaluate_samples(samples, y)
    assert found.crps == 1 and found.pit.tolist() == [1.0, 0.5] and found.intervals[0].width == 0


def test_what_does_not_fit_is_refused():
    with pytest.raises(DataError, match=r"shape \[3, 4\] and observations of the shape \[5\]"):
        evaluate_samples(torch.zeros(3, 4), torch.zeros(5))
    with pytest.raises(ArgumentError, match=r"level 90 is asked for.*0\.9"):
        evaluate_mixture(torch.zeros(3, 4), 1.0, torch.zeros(4), levels=(90,))
