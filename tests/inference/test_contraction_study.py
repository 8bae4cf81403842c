"""The pieces of benchmarks/contraction.py: its distance, its slopes, its networks and what bounds its figures."""

import importlib
import math
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.integrate import quad
from scipy.stats import norm
from torch.nn import functional as F

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture(scope="module")
def study():
    sys.path.insert(0, str(BENCHMARKS))
    try:
        yield importlib.import_module("contraction")
    finally:
        sys.path.remove(str(BENCHMARKS))


@pytest.mark.parametrize(("mean", "noise"), [(0.2, 0.3), (1.5, 0.3), (-4.0, 2.0)])
def test_hellinger_distance_is_the_integral(study, mean, noise):
    affinity, _ = quad(lambda y: math.sqrt(norm.pdf(y, mean, noise) * norm.pdf(y, 0.7, noise)), -30, 30, limit=200)
    ours = study.squared_hellinger(torch.tensor(mean), torch.tensor(0.7), noise)
    assert float(ours) == pytest.approx(1 - affinity, abs=1e-7)


def test_slope_has_its_interval(study):
    """Against the normal equations; and about 57 of 60 intervals hold the slope that made the data."""
    random, sizes = np.random.default_rng(0), np.repeat(study.SIZES, 5)
    made = [np.exp(1 - 0.9 * np.log(sizes) + 0.3 * random.normal(size=len(sizes))) for _ in range(60)]
    fits = [study.slope_of(sizes, distances) for distances in made]
    design = np.stack([np.ones(len(sizes)), np.log(sizes)], 1)
    assert fits[0].slope == pytest.approx(np.linalg.solve(design.T @ design, design.T @ np.log(made[0]))[1])
    inside = sum(fit.interval[0] < -0.9 < fit.interval[1] for fit in fits)
    assert 51 <= inside <= 60


def test_stacked_networks_are_those_of_torch(study):
    """Each copy beside plain layers: linear ones, convolutions, and scaled dot-product attention."""
    torch.manual_seed(0)
    x = {name: study.uniform(name, 6, 2, torch.Generator().manual_seed(1)) for name in study.NETWORKS}
    for name, (make, _) in study.NETWORKS.items():
        net = make(2)
        for weight in net.parameters():
            torch.nn.init.normal_(weight)
        weights = {key.split(".")[0]: value for key, value in net.state_dict().items()}
        for c in range(2):
            plain = PLAIN[name]({key: value[c] for key, value in weights.items()}, x[name][:, c])
            torch.testing.assert_close(net(x[name])[:, c], plain, atol=1e-5, rtol=1e-5)


def linear(x, weight):
    return F.linear(x, weight[:-1].T, weight[-1])


def fully_connected(w, x):
    return linear(linear(linear(x, w["first"]).tanh(), w["second"]).tanh(), w["last"])[:, 0]


def convolutional(w, x):
    kernel = w["second"][:-1].view(6, 3, 6).permute(2, 0, 1)  # [out, in, place]
    hidden = F.conv1d(x[:, None], w["first"][:-1].T[:, None], w["first"][-1]).tanh()
    hidden = F.conv1d(F.avg_pool1d(hidden, 2), kernel, w["second"][-1]).tanh()
    return linear(hidden.mean(2), w["last"])[:, 0]


def attention(w, x):
    attended = F.scaled_dot_product_attention(x @ w["query"], x @ w["key"], x @ w["value"])
    return linear(linear(attended, w["mixed"]).tanh().mean(1), w["last"])[:, 0]


PLAIN = {"fully connected": fully_connected, "convolutional": convolutional, "attention": attention}


def test_bound_is_above_that_of_a_point_and_falls_with_n(study):
    """No q with a density has less than its KL; a wrong sign or a lost factor n would show in the ratio."""
    places = study.uniform("attention", 200, 1, torch.Generator().manual_seed(0))
    bounds = [study.bound("attention", n, places) for n in (1000, 10000)]
    gates = 12 * math.log(1 / study.INCLUSION) + 73 * math.log(1 / (1 - study.INCLUSION))
    assert bounds[0] > gates / 1000 and bounds[1] > gates / 10000
    assert bounds[0] / 10 < bounds[1] < bounds[0] / 5  # like log n / n


def test_rate_of_the_theorem(study):
    """By hand, at s = 1, n = 100: (2 log e + log(2 · 10)) / 100."""
    assert study.theorem_rate(100, 1, 1, math.e, 2) == pytest.approx((2 + math.log(20)) / 100)
