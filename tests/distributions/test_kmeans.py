"""1-D K-means against scikit-learn's, and against itself on parts of the problem."""

from concurrent.futures import ThreadPoolExecutor
from threading import Barrier

import numpy as np
import pytest
import torch
from sklearn.cluster import KMeans

from sqs_pyro.distributions.kmeans import Clustering, kmeans_1d

LAWS = {
    "normal": lambda rng, n: rng.normal(size=n),
    "heavy-tailed": lambda rng, n: rng.standard_t(2, size=n),
    "bimodal": lambda rng, n: rng.normal(size=n) * 0.2 + rng.choice([-1.0, 1.0], size=n),
    "skewed": lambda rng, n: rng.exponential(size=n),
}


def inertia_of(values: np.ndarray, loc: np.ndarray, weights: np.ndarray | None = None) -> float:
    """Summed squared distance to the nearest centre, from the full distance matrix."""
    nearest = np.abs(values[:, None] - loc).min(1) ** 2
    return float((nearest if weights is None else nearest * weights).sum())


@pytest.mark.parametrize("law", LAWS)
@pytest.mark.parametrize("k", [2, 5, 16])
def test_inertia_is_within_one_percent_of_scikit_learns_best(law, k):
    values = LAWS[law](np.random.default_rng(k), 2000)
    reference = KMeans(k, n_init=10, random_state=0).fit(values[:, None])
    fit = kmeans_1d(torch.from_numpy(values)[None], k)
    assert float(fit.inertia) <= 1.01 * reference.inertia_
    assert float(fit.inertia) == pytest.approx(inertia_of(values, fit.loc[0].numpy()), rel=1e-9)


@pytest.mark.parametrize("law", LAWS)
def test_many_components(law):
    values = LAWS[law](np.random.default_rng(1), 4000)
    reference = KMeans(64, n_init=10, random_state=0).fit(values[:, None])
    assert float(kmeans_1d(torch.from_numpy(values)[None], 64).inertia) <= 1.01 * reference.inertia_


def test_fit_is_a_fixed_point_and_describes_its_clusters():
    values = torch.from_numpy(np.random.default_rng(0).normal(size=3000))
    fit = kmeans_1d(values[None], 8)
    assert (fit.loc.diff(dim=1) > 0).all()
    code = (values[:, None] - fit.loc).abs().argmin(1)
    for k in range(8):
        torch.testing.assert_close(values[code == k].mean(), fit.loc[0, k])
    share = torch.bincount(code, minlength=8) / len(values)
    torch.testing.assert_close(fit.mixing[0].float(), share, atol=1e-3, rtol=0)
    torch.testing.assert_close(fit.mixing.sum(1), torch.ones(1, dtype=torch.float64))
    pooled = ((values - fit.loc[0, code]) ** 2).mean().sqrt()
    torch.testing.assert_close(fit.scale, pooled.expand(1, 8))


def test_zero_weights_leave_values_out():
    rng = np.random.default_rng(2)
    values, kept = torch.from_numpy(rng.normal(size=1500)), torch.from_numpy(rng.random(1500) < 0.3)
    values[~kept] *= 100  # what is left out must not matter, wherever it lies
    masked = kmeans_1d(values[None], 6, kept[None].double())
    dropped = kmeans_1d(values[kept][None], 6)
    torch.testing.assert_close(masked.loc, dropped.loc)
    torch.testing.assert_close(masked.mixing, dropped.mixing)
    torch.testing.assert_close(masked.scale, dropped.scale)
    torch.testing.assert_close(masked.inertia, dropped.inertia, rtol=1e-9, atol=1e-6)


def test_whole_weights_equal_repeated_values():
    rng = np.random.default_rng(3)
    values, times = rng.normal(size=400), rng.integers(0, 5, size=400)
    weighted = kmeans_1d(torch.from_numpy(values)[None], 5, torch.from_numpy(times)[None].double())
    reference = KMeans(5, n_init=10, random_state=0).fit(values[:, None], sample_weight=times)
    assert float(weighted.inertia) <= 1.01 * reference.inertia_
    assert float(weighted.inertia) == pytest.approx(inertia_of(values, weighted.loc[0].numpy(), times), rel=1e-9)


@pytest.mark.parametrize("groups", [3, 17, 40])  # above 16 groups the histogram is coarser and done in parts
def test_each_group_is_as_good_as_scikit_learn_alone(groups):
    rng = np.random.default_rng(4)
    values = rng.normal(size=(groups, 300)) * rng.uniform(0.1, 10, size=(groups, 1))
    together = kmeans_1d(torch.from_numpy(values), 4)
    for g in range(groups):
        best = KMeans(4, n_init=5, random_state=0).fit(values[g][:, None]).inertia_
        assert float(together.inertia[g]) <= 1.01 * best


def test_groups_do_not_see_each_other():
    values = torch.from_numpy(np.random.default_rng(5).normal(size=(4, 500)))
    together = kmeans_1d(values, 6)
    for g in range(4):
        alone = kmeans_1d(values[g : g + 1], 6)
        torch.testing.assert_close(together.loc[g : g + 1], alone.loc)
        torch.testing.assert_close(together.mixing[g : g + 1], alone.mixing)


@pytest.mark.parametrize("constant", [0.0, -3.5, 1e-20])
def test_constant_values(constant):
    fit = kmeans_1d(torch.full((1, 50), constant), 4)
    torch.testing.assert_close(fit.loc, torch.full((1, 4), constant))
    assert (fit.scale > 0).all() and (fit.mixing > 0).all()
    assert all(column.isfinite().all() for column in (fit.loc, fit.scale, fit.mixing, fit.inertia))


def test_fewer_distinct_values_than_components():
    fit = kmeans_1d(torch.tensor([[1.0, 2.0, 2.0, 5.0] * 10]), 8)
    assert float(fit.inertia) == pytest.approx(0, abs=1e-9)
    assert {round(float(v), 6) for v in fit.loc[0]} == {1.0, 2.0, 5.0}
    assert (fit.loc.diff(dim=1) >= 0).all()


def test_as_many_components_as_values():
    values = torch.tensor([[3.0, -1.0, 0.5, 8.0]])
    fit = kmeans_1d(values, 4)
    torch.testing.assert_close(fit.loc, values.sort().values)
    assert float(fit.inertia) == pytest.approx(0, abs=1e-9)


def test_one_component_is_mean_and_standard_deviation():
    values = torch.from_numpy(np.random.default_rng(6).normal(2.0, 3.0, size=1000))
    fit = kmeans_1d(values[None], 1)
    torch.testing.assert_close(fit.loc, values.mean().view(1, 1))
    torch.testing.assert_close(fit.scale, values.std(unbiased=False).view(1, 1))


def test_nothing_left_by_the_weights():
    fit = kmeans_1d(torch.randn(1, 30), 4, torch.zeros(1, 30))
    assert all(column.isfinite().all() for column in (fit.loc, fit.scale, fit.mixing, fit.inertia))


def test_a_lone_outlier_among_many_has_its_own_component():
    values = torch.cat([torch.randn(100_000) * 1e-2, torch.tensor([50.0])])
    fit = kmeans_1d(values[None], 4)
    assert float(fit.loc[0, -1]) == pytest.approx(50.0)


def test_keeps_dtype_and_asks_for_no_gradient():
    values = torch.randn(2, 100, requires_grad=True)
    fit = kmeans_1d(values, 3)
    assert fit.loc.dtype == fit.scale.dtype == fit.mixing.dtype == torch.float32
    assert not fit.loc.requires_grad


@pytest.mark.slow
def test_ten_million_values():
    values = torch.randn(1, 10_000_000)
    fit = kmeans_1d(values, 16)
    sample = values[0, :20_000].double().numpy()
    reference = KMeans(16, n_init=10, random_state=0).fit(sample[:, None])
    # The reference saw a sample only, so on all values it can only be worse than the optimum.
    assert (
        float(fit.inertia)
        <= 1.01 * inertia_of(values[0, ::10].double().numpy(), reference.cluster_centers_[:, 0]) * 10
    )
    edges = (fit.loc[0, 1:] + fit.loc[0, :-1]) / 2
    code = torch.bucketize(values[0], edges)
    total = torch.bincount(code, weights=values[0].double()) / torch.bincount(code)
    torch.testing.assert_close(total.float(), fit.loc[0], atol=1e-4, rtol=0)


def fit_of_ranks(values: torch.Tensor, weights: torch.Tensor, shares: list[int], k: int) -> list[Clustering]:
    """Return each rank's fit, ranks being threads."""
    sent: list = [None] * len(shares)
    together = Barrier(len(shares), timeout=30)

    def fitted(rank: int, own: torch.Tensor, mass: torch.Tensor) -> Clustering:
        def gathered(value):
            sent[rank] = value
            together.wait()
            everything = torch.stack(sent)
            together.wait()
            return everything

        return kmeans_1d(own[None], k, mass[None], gathered=gathered)

    with ThreadPoolExecutor(len(shares)) as pool:
        return list(pool.map(fitted, range(len(shares)), values.split(shares), weights.split(shares)))


@pytest.mark.parametrize(("law", "k"), [("heavy-tailed", 16), ("bimodal", 4)])
def test_ranks_fit_what_one_fits(law, k):
    rng = np.random.default_rng(k)
    values, kept = torch.from_numpy(LAWS[law](rng, 12000)), torch.from_numpy(rng.random(12000) < 0.7).double()
    # As many as there are cells, or fewer: one rank's fit but for rounding. One of the ranks has none.
    alone = kmeans_1d(values[None, :2000], k, kept[None, :2000])
    for fit in fit_of_ranks(values[:2000], kept[:2000], [1300, 0, 700], k):
        for name in ("loc", "scale", "mixing", "inertia"):
            torch.testing.assert_close(getattr(fit, name), getattr(alone, name))
    # Of more, a fixed point as good.
    alone = kmeans_1d(values[None], k, kept[None])
    first, second = fit_of_ranks(values, kept, [4000, 8000], k)
    assert torch.equal(first.loc, second.loc)
    assert float(first.inertia) == pytest.approx(float(alone.inertia), rel=0.01)
    expected = inertia_of(values.numpy(), first.loc[0].numpy(), kept.numpy())
    assert float(first.inertia) == pytest.approx(expected, rel=1e-9)
    codes = (values[:, None] - first.loc).abs().argmin(1)
    sums = torch.zeros(2, k).double().index_add_(1, codes, torch.stack([kept * values, kept]))
    torch.testing.assert_close(sums[0] / sums[1], first.loc[0])


def test_ranks_with_pruned_weights_alone_or_equal_ones():
    values = torch.randn(40)
    for fit in fit_of_ranks(values, torch.zeros(40), [10, 30], 4):
        assert all(part.isfinite().all() for part in (fit.loc, fit.scale, fit.mixing))
    for fit in fit_of_ranks(torch.full((40,), 0.3), torch.ones(40), [10, 30], 4):
        assert (fit.loc == torch.tensor(0.3)).all()
        assert (fit.scale > 0).all()
