"""Temperature scaling against a minimiser that knows nothing of its derivative."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.optimize import minimize_scalar
from torch import nn

from sqs_pyro.evaluation.calibration import TemperatureScaled, fit_temperature


@given(st.integers(0, 10_000), st.floats(0.2, 10), st.integers(2, 12))
def test_the_smallest_nll(seed, sharpness, classes):
    random = torch.Generator().manual_seed(seed)
    logits = sharpness * torch.randn(300, classes, generator=random, dtype=torch.float64)
    labels = torch.where(
        torch.rand(300, generator=random) < 0.7,
        logits.argmax(-1),
        torch.randint(classes, (300,), generator=random),
    )

    def nll(log_temperature):
        return float(nn.functional.cross_entropy(logits / 2.718281828459045**log_temperature, labels))

    best = minimize_scalar(nll, bounds=(-4.6, 4.6), method="bounded", options={"xatol": 1e-8})
    found = fit_temperature(logits, labels)
    assert found == pytest.approx(2.718281828459045**best.x, rel=1e-3)


def test_a_known_temperature_is_found():
    """Labels drawn from softmax(z / 3): scaling finds 3, from logits and from log-probabilities alike."""
    z = 4 * torch.randn(200_000, 5)
    labels = torch.distributions.Categorical(logits=z / 3).sample()
    assert fit_temperature(z, labels) == pytest.approx(3, rel=0.02)
    assert fit_temperature(z.log_softmax(-1), labels) == pytest.approx(fit_temperature(z, labels), rel=1e-4)


def test_ends_of_the_range():
    logits = torch.eye(3).repeat(4, 1)
    assert fit_temperature(logits, logits.argmax(-1)) == 0.01  # always right: as sure as can be
    assert fit_temperature(logits, logits.argmin(-1)) == 100.0


def test_scaled_network():
    net, x = nn.Linear(3, 4).eval(), torch.randn(5, 3)
    scaled = TemperatureScaled(net, 2.5)
    torch.testing.assert_close(scaled(x), net(x) / 2.5)
    assert not scaled.training
