"""Window strategies: the inherited contract, and what is particular to each."""

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sqs_pyro.distributions.kmeans import kmeans_1d
from sqs_pyro.errors import RecipeError
from sqs_pyro.inference.guides.windows import EqualMass, OutlierAware, PerWeight, Windows, fences
from sqs_pyro.testing.windows import WindowsContract


class TestPerWeight(WindowsContract):
    def make(self):
        return PerWeight()

    def test_is_the_identity_with_its_gradient(self):
        values = torch.randn(10, requires_grad=True)
        represented = PerWeight().represent(values, PerWeight().edges(values))
        assert represented is values


class TestEqualMass(WindowsContract):
    def make(self):
        return EqualMass(32)

    @pytest.mark.parametrize(("n", "count"), [(1000, 10), (1003, 10), (64, 64), (100, 7)])
    def test_windows_hold_the_same_number_of_weights(self, n, count):
        values = torch.randn(n)
        sizes = torch.bincount(torch.bucketize(values, EqualMass(count).edges(values)))
        assert len(sizes) == count
        assert int(sizes.max()) - int(sizes.min()) <= 1

    def test_edges_are_quantiles(self):
        values = torch.randn(100_000)
        edges = EqualMass(8).edges(values)
        expected = torch.quantile(values, torch.arange(1, 8) / 8)
        torch.testing.assert_close(edges, expected, atol=1e-3, rtol=0)

    def test_more_windows_than_weights_gives_each_weight_its_own(self):
        values = torch.randn(20)
        windows = EqualMass(256)
        torch.testing.assert_close(windows.represent(values, windows.edges(values)), values)

    def test_one_window_is_the_mean(self):
        values = torch.randn(50)
        windows = EqualMass(1)
        assert len(windows.edges(values)) == 0
        torch.testing.assert_close(windows.represent(values, windows.edges(values)), values.mean().expand(50))


class TestOutlierAware(WindowsContract):
    def make(self):
        return OutlierAware(32, tail_count=4)

    def outliers(self, values: torch.Tensor) -> torch.Tensor:
        q1, q3 = torch.quantile(values, torch.tensor([0.25, 0.75]))
        return (values < q1 - 1.5 * (q3 - q1)) | (values > q3 + 1.5 * (q3 - q1))

    def test_tails_have_windows_of_their_own(self, values):
        outlier = self.outliers(values)
        if outlier.all():
            pytest.skip("no bulk")
        window = torch.bucketize(values, self.make().edges(values))
        shared = set(window[outlier].tolist()) & set(window[~outlier].tolist())
        assert not shared

    def test_evenly_filled_tails_are_split_evenly(self):
        bulk, upper, lower = torch.rand(10_000), torch.linspace(20, 40, 80), torch.linspace(-90, -50, 40)
        edges = OutlierAware(16, tail_count=4).edges(torch.cat([bulk, upper, lower]))
        windows = [torch.bucketize(part, edges).unique(return_counts=True) for part in (lower, bulk, upper)]
        assert torch.cat([window for window, _ in windows]).tolist() == list(range(4 + 16 + 4))
        assert [count.unique().tolist() for _, count in windows] == [[10], [625], [20]]

    def test_tails_are_split_with_the_least_squared_error(self):
        """Against every way of cutting a tail of 14 weights into 3 windows."""
        tail = (10 * torch.rand(14).add(0.05).pow(-1.5)).sort().values + 10
        values = torch.cat([torch.rand(1000), tail])
        windows = OutlierAware(16, tail_count=3)
        error = (windows.represent(values, windows.edges(values)) - values)[-14:].double().square().sum()
        pieces = [(tail[:i], tail[i:j], tail[j:]) for i, j in itertools.combinations(range(1, 14), 2)]
        least = min(sum((p.double() - p.double().mean()).square().sum() for p in cut) for cut in pieces)
        torch.testing.assert_close(error, least, rtol=1e-4, atol=0)

    def test_no_window_reaches_across_the_gap_that_pruning_leaves(self):
        values = torch.randn(2000)
        values = values[values.abs() > 0.7]
        windows = OutlierAware(9, 2)
        means = windows.represent(values, windows.edges(values))
        assert torch.equal(means.sign(), values.sign()) and float(means.abs().min()) > 0.7

    def test_heavy_tails_lose_no_more_than_twice_what_they_lose_weight_by_weight(self):
        """Equal mass in the tails would lose four times as much, windows without tails as well."""
        values = torch.from_numpy(np.random.default_rng(0).standard_t(3, 50_000)).float()
        outlier = self.outliers(values)

        def lost(windows: Windows) -> float:
            anchor = windows.represent(values, windows.edges(values))
            loc = kmeans_1d(anchor[None], 16).loc[0]
            nearest = loc[(anchor[:, None] - loc).abs().argmin(1)]
            return float((nearest - values)[outlier].square().sum())

        each = lost(PerWeight())
        assert lost(OutlierAware(256, 8)) < 2 * each
        assert lost(EqualMass(256)) > 3 * each

    def test_keeps_the_tail_where_equal_mass_windows_drown_it(self):
        values = torch.cat([torch.rand(10_000), torch.tensor([30.0])])
        aware, plain = OutlierAware(64, 8), EqualMass(64)
        assert float(aware.represent(values, aware.edges(values))[-1]) == 30.0
        assert float(plain.represent(values, plain.edges(values))[-1]) < 2.0

    def test_without_outliers_it_is_equal_mass(self):
        values = torch.rand(101)
        assert not self.outliers(values).any()
        torch.testing.assert_close(OutlierAware(10).edges(values), EqualMass(10).edges(values))

    def test_everything_but_the_median_is_an_outlier(self):
        values = torch.cat([torch.zeros(80), torch.tensor([1.0, 2.0, -3.0])])  # the IQR is 0
        window = torch.bucketize(values, OutlierAware(8, 4).edges(values))
        assert set(window[values == 0].tolist()).isdisjoint(window[values != 0].tolist())


@given(st.lists(st.floats(-1e3, 1e3, width=32), min_size=1, max_size=60))
def test_fences_are_tukeys(values):
    values = torch.tensor(values, dtype=torch.float64)
    q1, q3 = torch.quantile(values, torch.tensor([0.25, 0.75], dtype=torch.float64))
    low, high = fences(values)
    torch.testing.assert_close(low, q1 - 1.5 * (q3 - q1))
    torch.testing.assert_close(high, q3 + 1.5 * (q3 - q1))


def test_fences_of_more_values_than_torch_quantile_takes():
    values = torch.arange(16_777_217, dtype=torch.float32)  # 2²⁴ + 1
    with pytest.raises(RuntimeError, match="too large"):
        torch.quantile(values, 0.25)
    low, high = fences(values)
    assert float(low) == pytest.approx(-0.5 * 2**24) and float(high) == pytest.approx(1.5 * 2**24)


@pytest.mark.parametrize("make", [lambda n: EqualMass(n), lambda n: OutlierAware(n), lambda n: OutlierAware(9, n)])
@pytest.mark.parametrize("count", [0, -3])
def test_no_windows_at_all_is_an_error(make, count):
    with pytest.raises(RecipeError, match=rf"is {count}, but must be at least 1 window"):
        make(count)
