"""One β for many layers: forecasts against entropies counted directly, and budgets that come out even."""

import math

import numpy as np
import pytest
import torch
from sklearn.cluster import KMeans

from sqs_pyro.compression.blockwise.bit_budget import BitBudget, LayerRate


def rates():
    generator = torch.Generator().manual_seed(0)
    return {
        name: LayerRate.of(scale * torch.randn(shape, generator=generator), precision)
        for name, scale, shape, precision in [
            ("matters", 1.0, (100, 300), 50.0),
            ("large", 1.0, (400, 500), 1.0),
            ("narrow", 0.05, (60, 100), 1.0),
        ]
    }


class TestLayerRate:
    def test_is_the_entropy_on_the_grid(self):
        weight = torch.randn(50, 40)
        rate = LayerRate.of(weight, precision=3.0)
        step = math.sqrt(12 * 0.01 / 3.0)
        _, counts = np.unique(np.round(weight.numpy() / np.float32(step)), return_counts=True)
        p = counts / counts.sum()
        assert rate.bits(0.01) == pytest.approx(-(p * np.log2(p)).sum(), abs=0.01)

    def test_of_a_gaussian_at_high_resolution(self):
        """``½ log2(2πe σ²) - log2 Δ``."""
        rate = LayerRate.of(torch.randn(400, 500), precision=1.0)
        step = 0.25
        expected = 0.5 * math.log2(2 * math.pi * math.e) - math.log2(step)
        assert rate.bits(step**2 / 12) == pytest.approx(expected, abs=0.01)

    def test_falls_with_beta_however_extreme(self):
        rate = LayerRate.of(torch.randn(40, 50), precision=1.0)
        found = [rate.bits(beta) for beta in (1e-30, 1e-6, 1e-3, 1e-1, 1.0, 100.0, 1e30)]
        assert found == sorted(found, reverse=True)
        assert found[-1] == 0

    def test_of_a_layer_of_zeros(self):
        assert LayerRate.of(torch.zeros(5, 5), 1.0).bits(1.0) == 0
        assert LayerRate.of(torch.zeros(5, 5), 1.0, max_components=3).bits(1.0) == 0

    @pytest.mark.parametrize("components", [1, 3, 7])
    def test_few_values_take_no_more_than_they_can(self, components):
        """What scikit-learn's K-means and zero divide the weights into has this entropy."""
        weight = torch.randn(60, 60)
        rate = LayerRate.of(weight, 1.0, 0.5, components)
        flat = weight.reshape(-1, 1).double().numpy()
        found = KMeans(components, n_init=3, random_state=0).fit(flat).cluster_centers_
        nearest = abs(flat - np.append(found, 0.0)).argmin(1)
        p = np.bincount(nearest) / len(flat)
        expected = -(p[p > 0] * np.log2(p[p > 0])).sum()
        assert rate.bits(1e-9) == pytest.approx(expected + 0.5, abs=0.03)
        assert rate.bits(1.0) == LayerRate.of(weight, 1.0, 0.5).bits(1.0), "coarse grids have fewer"


class TestBudget:
    @pytest.mark.parametrize("bits", [1.0, 2.5, 4.0])
    def test_forecast_takes_what_was_asked_for(self, bits):
        layers = rates()
        beta = BitBudget(layers, bits).beta()
        weights = sum(layer.weights for layer in layers.values())
        mean = sum(layer.weights * layer.bits(beta) for layer in layers.values()) / weights
        assert mean == pytest.approx(bits, abs=0.02)

    def test_few_values_take_no_more_at_any_beta(self):
        layer = LayerRate.of(torch.randn(50, 40), 1.0, 0.1, 7)
        assert 2.5 < layer.bits(1e-9) == layer.most + 0.1 < 3.1

    def test_what_nobody_took_is_told(self):
        budget = BitBudget(rates(), 2.5)
        for name in rates():
            budget.spend(name, 2.2, 1.0)
        assert not budget.waits and budget.unspent == pytest.approx(0.3)

    def test_layers_that_matter_get_more(self):
        layers = rates()
        beta = BitBudget(layers, 2.5).beta()
        gained = layers["matters"].bits(beta) - layers["large"].bits(beta)
        assert gained == pytest.approx(0.5 * math.log2(50), abs=0.1)
        assert layers["narrow"].bits(beta) < layers["large"].bits(beta)

    def test_what_one_layer_takes_too_much_the_others_save(self):
        layers = rates()
        budget = BitBudget(layers, 2.5)
        spent = {"matters": 6.5, "narrow": 0.4}
        betas = [budget.beta()]
        for name, bits in spent.items():
            budget.spend(name, bits, betas[-1])
            betas.append(budget.beta())
        weights = {name: layer.weights for name, layer in layers.items()}
        left = 2.5 * sum(weights.values()) - sum(bits * weights[name] for name, bits in spent.items())
        excess = sum(
            (bits - layers[name].bits(beta)) * weights[name]
            for (name, bits), beta in zip(spent.items(), betas, strict=False)
        ) / sum(weights[name] for name in spent)
        forecast = layers["large"].bits(betas[-1])
        assert forecast == pytest.approx(left / weights["large"] - excess, abs=0.02)

    def test_a_budget_that_is_spent_leaves_next_to_nothing(self):
        budget = BitBudget(rates(), 1.0)
        budget.spend("large", 8.0, budget.beta())
        layers = rates()
        assert layers["narrow"].bits(budget.beta()) < 0.01
