"""Risk over coverage against sorting by hand, and the area in closed form."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sqs_pyro.errors import DataError
from sqs_pyro.evaluation.predictive.selective import risk_coverage


@given(st.integers(0, 1000), st.integers(1, 40))
def test_without_ties_it_is_the_running_mean_in_order(seed, n):
    random = np.random.default_rng(seed)
    uncertainty, loss = random.permutation(n).astype(float), random.integers(0, 2, n)
    curve = risk_coverage(torch.from_numpy(uncertainty), torch.from_numpy(loss))
    expected = np.cumsum(loss[np.argsort(uncertainty)]) / np.arange(1, n + 1)
    np.testing.assert_allclose(curve.risk, expected)
    np.testing.assert_allclose(curve.coverage, np.arange(1, n + 1) / n)
    assert curve.area == pytest.approx(expected.mean())


def test_ties_are_the_mean_over_all_orders():
    random = np.random.default_rng(0)
    uncertainty, loss = random.integers(0, 3, 12).astype(float), random.integers(0, 2, 12).astype(float)
    orders = []
    for _ in range(20_000):  # the largest of 12 standard errors is 0.0036
        order = np.lexsort((random.random(12), uncertainty))
        orders.append(np.cumsum(loss[order]) / np.arange(1, 13))
    found = risk_coverage(torch.from_numpy(uncertainty), torch.from_numpy(loss)).risk
    np.testing.assert_allclose(found, np.mean(orders, 0), atol=0.018)


def test_ends():
    errors = torch.tensor([0, 0, 0, 1])
    assert risk_coverage(torch.tensor([1.0, 2, 3, 4]), errors).area == pytest.approx(1 / 16)  # the best order
    assert risk_coverage(torch.tensor([4.0, 3, 2, 1]), errors).area == pytest.approx(
        (1 + 1 / 2 + 1 / 3 + 1 / 4) / 4
    )
    torch.testing.assert_close(risk_coverage(torch.zeros(4), errors).risk, torch.full((4,), 0.25).double())


@pytest.mark.parametrize(("uncertainty", "loss"), [([], []), ([1.0], [0.0, 1.0]), ([[1.0]], [[1.0]])])
def test_one_of_each(uncertainty, loss):
    with pytest.raises(DataError, match="one number of each for every example"):
        risk_coverage(torch.tensor(uncertainty), torch.tensor(loss))
