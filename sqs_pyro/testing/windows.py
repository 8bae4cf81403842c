"""Contract kit: any window strategy inherits these tests; it supplies ``make() -> Windows``."""

import numpy as np
import pytest
import torch
from torch import Tensor

from sqs_pyro.inference.guides.windows import Windows

VALUES = {
    "normal": lambda rng: rng.normal(size=1000),
    "heavy tails": lambda rng: rng.standard_t(1.5, size=1000),
    "no outliers": lambda rng: rng.uniform(-1, 1, size=1000),
    "few distinct values": lambda rng: rng.choice([-1.0, 0.0, 0.5, 3.0], size=500),
    "mostly zero": lambda rng: rng.normal(size=400) * (rng.random(400) < 0.1),
    "constant": lambda rng: np.full(100, 0.25),
    "all zero": lambda rng: np.zeros(64),
    "one far outlier": lambda rng: np.append(rng.normal(size=300), 1e4),
    "three weights": lambda rng: np.array([0.3, -2.0, 0.1]),
    "two weights": lambda rng: np.array([1.0, -1.0]),
    "one weight": lambda rng: np.array([0.7]),
    "tiny": lambda rng: rng.normal(size=200) * 1e-30,
}


class WindowsContract:
    """What holds for every way of cutting a layer's weights into windows."""

    def make(self) -> Windows:
        """Return the strategy under test."""
        raise NotImplementedError

    @pytest.fixture(params=VALUES)
    def values(self, request: pytest.FixtureRequest) -> Tensor:
        """Return weights of every shape of histogram, ``[N]``."""
        return torch.from_numpy(VALUES[request.param](np.random.default_rng(0))).float()

    def test_edges_ascend_inside_the_range(self, values: Tensor) -> None:
        edges = self.make().edges(values)
        assert edges.dim() == 1 and edges.dtype == values.dtype
        assert (edges.diff() > 0).all()
        assert ((edges >= values.min()) & (edges <= values.max())).all()

    def test_represented_by_values_of_the_same_order(self, values: Tensor) -> None:
        """A window's mean lies within it, so the order of weights is kept (ties appear, inversions do not)."""
        windows = self.make()
        means = windows.represent(values, windows.edges(values))
        assert means.shape == values.shape and means.dtype == values.dtype
        assert means.isfinite().all()
        ordered = means[values.argsort()]
        assert (ordered.diff() >= -1e-6 * values.abs().max()).all()

    def test_keeps_the_means_of_windows_and_of_the_layer(self, values: Tensor) -> None:
        windows = self.make()
        edges = windows.edges(values)
        means = windows.represent(values, edges)
        if len(edges):
            window = np.searchsorted(edges.numpy(), values.numpy())  # independent of torch.bucketize
            for w in np.unique(window):
                inside = torch.from_numpy(window == w)
                expected = values[inside].double().mean().expand(int(inside.sum()))
                torch.testing.assert_close(means[inside].double(), expected, rtol=1e-5, atol=1e-30)
        size = float(values.abs().double().mean())  # the mean itself may cancel to nothing
        assert float(means.double().mean()) == pytest.approx(
            float(values.double().mean()), abs=1e-5 * size + 1e-38
        )

    def test_representing_twice_changes_nothing(self, values: Tensor) -> None:
        windows = self.make()
        edges = windows.edges(values)
        once = windows.represent(values, edges)
        torch.testing.assert_close(windows.represent(once, edges), once, rtol=1e-5, atol=1e-30)

    def test_any_shape(self) -> None:
        windows, values = self.make(), torch.randn(4, 3, 5)
        edges = windows.edges(values)
        flat = windows.represent(values.flatten(), edges)
        assert torch.equal(windows.represent(values, edges), flat.view(4, 3, 5))

    def test_values_beyond_the_edges_belong_to_the_outermost_windows(self) -> None:
        """Edges are kept between renewals while the weights move on."""
        windows, values = self.make(), torch.randn(500)
        edges = windows.edges(values)
        assert windows.represent(torch.cat([values, torch.tensor([100.0, -100.0])]), edges).isfinite().all()

    def test_does_not_change_what_it_is_given(self, values: Tensor) -> None:
        before = values.clone()
        windows = self.make()
        windows.represent(values, windows.edges(values))
        assert torch.equal(values, before)

    def test_is_a_value(self) -> None:
        """Strategies are compared and printed in recipes."""
        assert self.make() == self.make() and hash(self.make()) == hash(self.make())
