"""Statistical comparisons with one failure rate, and quadrature that is independent of the library."""

from collections.abc import Callable

import numpy as np
import scipy.stats

FAILURE_RATE = 1e-5  # chance that any one statistical comparison fails on correct code


def critical_z(comparisons: int = 1) -> float:
    """Return how many standard errors the worst of some comparisons may be off."""
    return float(scipy.stats.norm.isf(FAILURE_RATE / (2 * comparisons)))  # Bonferroni, two-sided


def assert_rate(hits: int, trials: int, probability: float) -> None:
    """Assert that hits among trials are of a probability (exact binomial test)."""
    assert scipy.stats.binomtest(hits, trials, probability).pvalue > FAILURE_RATE


def assert_distribution(draws: np.ndarray, cdf: Callable[[np.ndarray], np.ndarray]) -> None:
    """Assert that continuous draws follow a CDF (Kolmogorov-Smirnov)."""
    assert scipy.stats.kstest(draws, cdf).pvalue > FAILURE_RATE


def panels(edges: np.ndarray, order: int = 6) -> tuple[np.ndarray, np.ndarray]:
    """Return nodes and weights of Gauss-Legendre between sorted edges, ``[..., P] -> [..., (P - 1) order]``."""
    node, weight = np.polynomial.legendre.leggauss(order)
    left, width = edges[..., :-1, None], np.diff(edges)[..., None]
    nodes = left + width * (node + 1) / 2
    weights = np.broadcast_to(width * weight / 2, nodes.shape)
    return nodes.reshape(*edges.shape[:-1], -1), weights.reshape(*edges.shape[:-1], -1)


def component_edges(loc: np.ndarray, scale: np.ndarray, reach: float = 12.0, steps: int = 61) -> np.ndarray:
    """Panel edges that resolve every component, ``[..., K] -> [..., K steps]``, sorted."""
    grid = loc[..., None] + scale[..., None] * np.linspace(-reach, reach, steps)
    return np.sort(grid.reshape(*grid.shape[:-2], -1), axis=-1)


def mixture_logpdf(x: np.ndarray, mixing: np.ndarray, loc: np.ndarray, scale: np.ndarray) -> np.ndarray:
    """Return ``log Σ φ N(x)``; x ``[..., P]``, parameters ``[..., K]``."""
    with np.errstate(divide="ignore"):
        parts = np.log(mixing)[..., None, :] + scipy.stats.norm.logpdf(
            x[..., None], loc[..., None, :], scale[..., None, :]
        )
    return scipy.special.logsumexp(parts, axis=-1)


def mixture_kl(
    mixing: np.ndarray, loc: np.ndarray, scale: np.ndarray, slab_logpdf: Callable[[np.ndarray], np.ndarray]
) -> np.ndarray:
    """Return ``KL(Σ φ N‖slab)`` by quadrature, ``[..., K] -> [...]``."""
    x, weights = panels(component_edges(loc, scale))
    log_m = mixture_logpdf(x, mixing, loc, scale)
    return (weights * np.exp(log_m) * (log_m - slab_logpdf(x))).sum(-1)


def bernoulli_kl(p: np.ndarray, p0: np.ndarray) -> np.ndarray:
    """Return ``KL(Bern(p)‖Bern(p0))``."""
    return scipy.special.rel_entr(p, p0) + scipy.special.rel_entr(1 - p, 1 - p0)
