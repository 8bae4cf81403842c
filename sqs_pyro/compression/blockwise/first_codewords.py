r"""What codewords start from: the even grid that β asks for, merged to K values, or K-means where K is few.

All of it looks at one histogram of a layer's weights
(:class:`~sqs_pyro.compression.blockwise.laplace.Histogram`), which costs one pass for every β that is tried.
"""

import math
from heapq import heapify, heappop, heappush

import torch
from torch import Tensor

from sqs_pyro.compression.blockwise.laplace import PLACES, Histogram, LayerLikelihood
from sqs_pyro.compression.finetune.rate_distortion import fit_symbol_prior
from sqs_pyro.distributions.kmeans import kmeans_1d
from sqs_pyro.packing.coded import MAX_COMPONENTS

_LEAST = 1e-300  # of a pair's mass
_SPARE = 0.35  # nats by which the entropy of K values stays below log(1 + K) where an even grid has enough of them
_ROUNDS = 20  # in which few values and the symbols of independent weights follow from each other


def grid(likelihood: LayerLikelihood, beta: float, max_components: int = MAX_COMPONENTS) -> tuple[Tensor, Tensor]:
    """Return codewords and rates to start from: the even grid that high-resolution theory gives for β.

    An even grid of step Δ loses ``h Δ²/24`` a weight of precision h and takes ``-log Δ`` plus a constant, so that
    the best is ``Δ = √(12 β / h)``, h the mean of ``g_i / v_j``.

    Args:
        likelihood: of the layer.
        beta: β.
        max_components: points of a grid with more are merged until so many are left.

    Returns:
        codewords ``[K]``, ascending, and their rates in nats, ``[1 + K]``, zero first.
    """
    return merged_grid(even_grid(likelihood, beta), max_components, likelihood)


def few(likelihood: LayerLikelihood, beta: float, codewords: Tensor) -> tuple[Tensor, Tensor]:
    """Return codewords and rates to start from where values are few: as if all weights were independent.

    A weight of precision h then has the symbol of the least ``h (w̄ - c_z)² / 2 + β rate_z``, and codewords are the
    means of those that have them, each weight counted h times; in turn, from K-means
    (:func:`~sqs_pyro.compression.finetune.rate_distortion.posterior` does the same for a layer of SVI).

    Args:
        likelihood: of the layer.
        beta: β.
        codewords: to begin with, float64 ``[K]``.
    """
    found = likelihood.histogram
    used = found.counts > 0
    values, counts, mass = found.values[used], found.counts[used], found.mass[used]
    precision, size = (mass / counts)[:, None], 1 + len(codewords)
    rates = values.new_zeros(size)
    for _ in range(_ROUNDS):
        difference = values[:, None] - with_zero(codewords)
        symbols = (0.5 * precision * difference.square() + beta * rates).argmin(1)
        taken = torch.bincount(symbols, counts, minlength=size)
        rates = fit_symbol_prior(taken[None]).rates[0]
        total, along = (torch.bincount(symbols, w, minlength=size)[1:] for w in (mass, mass * values))
        codewords = torch.where(total > 0, along / total, codewords)
    return codewords.sort().values.to(likelihood.mean), rates


def is_few(even: Histogram, num_components: int) -> bool:
    """Return whether K values are too few for weights at an even grid: by their entropy."""
    entropy = float(torch.special.entr(even.counts / even.counts.sum()).sum())
    return entropy > math.log(1 + num_components) - _SPARE


def clusters(likelihood: LayerLikelihood, num_components: int) -> Tensor:
    """Return K-means of weights, each counted by its precision, but for the one at zero: float64 ``[K]``."""
    found = likelihood.histogram
    used = found.mass > 0
    values, mass = found.values[used], found.mass[used]
    means = kmeans_1d(values[None], min(1 + num_components, len(values)), mass[None]).loc[0]
    zero = int(means.abs().argmin())
    others = torch.cat([means[:zero], means[zero + 1 :]])
    return others if len(others) else values.new_ones(1)  # of a layer of zeros: one that is never chosen


def even_grid(likelihood: LayerLikelihood, beta: float) -> Histogram:
    """Return the weights at the even grid of β."""
    found, reach = likelihood.histogram, likelihood.reach
    # No finer than the histogram.
    step = max(math.sqrt(12 * beta / likelihood.mean_precision), reach / PLACES)
    step = min(step, reach) or 1.0  # at least the largest weight is no zero, unless all are
    half = max(math.ceil(reach / step), 1)
    values = step * torch.arange(-half, half + 1, dtype=torch.float64, device=found.values.device)
    return Histogram(values, *found.gathered((found.values / step).round().long() + half, len(values)))


def merged_grid(grid: Histogram, max_components: int, likelihood: LayerLikelihood) -> tuple[Tensor, Tensor]:
    """Return the values of a grid that weights are at, but for zero, merged to K, and the rates of all symbols."""
    half, used = len(grid.values) // 2, grid.counts > 0
    used[half] = False  # zero is no codeword
    if not used.any():
        used[-1] = True  # of a layer of zeros: a codeword that is never chosen
    found, others = _merged(grid.values[used], grid.counts[used], grid.mass[used], max_components)
    rates = fit_symbol_prior(torch.cat([grid.counts[half, None], others])[None]).rates[0]
    return found.to(likelihood.mean), rates


def with_zero(codewords: Tensor) -> Tensor:
    """Return the values of all symbols, ``[1 + K]``."""
    return torch.cat([codewords.new_zeros(1), codewords])


def _merged(values: Tensor, counts: Tensor, mass: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """Merge neighbours, the pair that adds least squared error first, until ``size`` values are left.

    Args:
        values: ascending, ``[n]``.
        counts: how often each occurs, ``[n]``; those of a pair are added up.
        mass: what an error in each counts, ``[n]``.
        size: at most so many are left.

    Returns:
        values that are left, and their counts.
    """
    n = len(values)
    if n <= size:
        return values, counts
    value, count, weight = values.tolist(), counts.tolist(), mass.tolist()
    before, after = list(range(-1, n - 1)), list(range(1, n + 1))  # neighbours among those that are left

    def added(i: int) -> float:
        j = after[i]
        if j == n:
            return math.inf  # the last has no next to be merged with
        apart = value[j] - value[i]
        return weight[i] * weight[j] / max(weight[i] + weight[j], _LEAST) * (apart * apart)

    errors = [added(i) for i in range(n)]
    queue = [(error, i) for i, error in enumerate(errors)]
    heapify(queue)
    merged: set[int] = set()
    while n - len(merged) > size:
        error, i = heappop(queue)
        if i in merged or error != errors[i]:
            continue  # of a pair that there is no longer
        j = after[i]
        total = weight[i] + weight[j]
        value[i] = (weight[i] * value[i] + weight[j] * value[j]) / total if total > 0 else value[i]
        count[i], weight[i], after[i] = count[i] + count[j], total, after[j]
        merged.add(j)
        if after[i] < n:
            before[after[i]] = i
        for k in (before[i], i):  # the pairs that the merged value is in
            if k >= 0:
                errors[k] = added(k)
                heappush(queue, (errors[k], k))
    left = [i for i in range(n) if i not in merged]
    return values.new_tensor([value[i] for i in left]), counts.new_tensor([count[i] for i in left])
