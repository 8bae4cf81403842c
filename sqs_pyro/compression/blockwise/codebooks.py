r"""The codewords of a layer: free ones, or whole numbers times one step.

**Free.** Each of the K codewords goes where the likelihood of the weights that have it is highest, the M-step of
:mod:`~sqs_pyro.compression.blockwise.sequential_coding`. The start is the even grid that β asks for, or, where K
is too small for it, K-means in which each weight counts by its precision.

**Uniform.** Codewords are ``s n`` with n the whole numbers from ``-⌈K/2⌉`` to ``⌊K/2⌋``, as the integer kernels of
other runtimes multiply. Given the n of all weights the likelihood is a quadratic in s, whose best is

    s = Σ_i g_i n_iᵀ H w̄_i / Σ_i g_i n_iᵀ H n_i,

over all rows i while symbols are chosen, and of each row for itself once they are: the scales of outputs, 16 bits
each, that such runtimes keep anyway.
"""

import math
from collections.abc import Callable, Sequence
from heapq import heapify, heappop, heappush
from typing import Protocol

import torch
from torch import Tensor

from sqs_pyro.compression.blockwise.laplace import PLACES, Histogram, LayerLikelihood
from sqs_pyro.compression.finetune.rate_distortion import fit_symbol_prior
from sqs_pyro.distributions.kmeans import kmeans_1d
from sqs_pyro.distributions.uniform_grid import grid_numbers
from sqs_pyro.packing.coded import MAX_COMPONENTS

_LEAST = 1e-300  # of a pair's mass
_SPARE = 0.35  # nats by which the entropy of K values stays below log(1 + K) where an even grid has enough of them
_ROUNDS = 20  # in which few values and the symbols of independent weights follow from each other
_PRECISION = 1e-8  # of the codewords' normal equations, as a share of the squared residual at the start
_STEPS = 24  # tried between that of β and one that reaches the largest weight
_SWEEPS = 2  # over the scales of a row's parts in one M-step


class Codebook(Protocol):
    """How codewords are chosen: first, and given the symbols."""

    def start(self, likelihood: LayerLikelihood, beta: float) -> tuple[Tensor, Tensor]:
        """Return codewords ``[K]``, ascending, and rates in nats ``[1 + K]``, zero first, to begin with."""

    def best(self, likelihood: LayerLikelihood, symbols: Tensor, codewords: Tensor) -> Tensor:
        """Return the codewords ``[K]`` under which symbols ``[n, M]`` are most likely; unused ones may stay."""


class FreeCodebook:
    """At most so many codewords of any values."""

    def __init__(self, max_components: int) -> None:
        self.max_components = max_components
        self._clusters: Tensor | None = None

    def start(self, likelihood: LayerLikelihood, beta: float) -> tuple[Tensor, Tensor]:
        """Return the even grid of β, see :func:`grid`, or where that has too many values :func:`few`."""
        even = _even_grid(likelihood, beta)
        shares = even.counts / even.counts.sum()
        if float(torch.special.entr(shares).sum()) <= math.log(1 + self.max_components) - _SPARE:
            return _without_zero(even, self.max_components, likelihood)
        if self._clusters is None:  # which is the same for every β
            self._clusters = _clusters(likelihood, self.max_components)
        return few(likelihood, beta, self._clusters)

    def best(self, likelihood: LayerLikelihood, symbols: Tensor, codewords: Tensor) -> Tensor:
        """Return the best value of each, see :func:`best_codewords`."""
        return best_codewords(likelihood, symbols, codewords)


class UniformCodebook:
    """K codewords that are whole numbers times one step."""

    def __init__(self, num_components: int) -> None:
        self.places = grid_numbers(num_components)  # n of the symbols 1 to K

    def start(self, likelihood: LayerLikelihood, beta: float) -> tuple[Tensor, Tensor]:
        """Return whole numbers times the step that β asks for, or a wider one where they must reach farther."""
        found, low, high = likelihood.histogram, int(self.places[0]), max(int(self.places[-1]), 0)
        step = self._first_step(likelihood, beta)
        places = (found.values / step).round().clamp(low, high).long() - low
        counts, _ = found.gathered(places, high - low + 1)
        kept = torch.cat([counts[:-low], counts[1 - low :]])
        rates = fit_symbol_prior(torch.cat([counts[-low, None], kept])[None]).rates[0]
        return step * self.places.to(likelihood.mean), rates

    def _first_step(self, likelihood: LayerLikelihood, beta: float) -> float:
        """Return the step that β asks for, or the best wider one where K values do not reach far enough."""
        found, reach = likelihood.histogram, likelihood.reach
        low, high = int(self.places[0]), max(int(self.places[-1]), 0)
        asked = min(math.sqrt(12 * beta / likelihood.mean_precision), reach) or 1.0
        widest = reach / max(high, 1)  # the side of fewer values decides how wide is wide enough
        if widest <= asked:
            return asked

        def error(step: float) -> float:
            rounded = (found.values / step).round().clamp(low, high) * step
            return float(found.mass @ (found.values - rounded).square())

        # Values that do not even reach one root mean square are never best.
        squares = float(found.counts @ found.values.square() / found.counts.sum())
        least = max(asked, math.sqrt(squares) / -low)
        # Where weights are cut off the error is no smooth function of the step: a few of them are looked at.
        tried = [least * (widest / least) ** (i / (_STEPS - 1)) for i in range(_STEPS)]
        return min(tried, key=error)

    def best(self, likelihood: LayerLikelihood, symbols: Tensor, codewords: Tensor) -> Tensor:
        """Return the whole numbers times the best step."""

        def totals(part: slice) -> Tensor:
            g = likelihood.importance[part].clone()
            return torch.stack([value @ g for value in self._quadratic(likelihood, symbols, part)])

        along, size = likelihood.shares.sum(totals).tolist()
        # Of zeros alone any step is as good.
        step = along / size if size > 0 else float(codewords[-1] / self.places[-1])
        return (step * self.places.double()).to(codewords)

    def row_scales(self, likelihood: LayerLikelihood, symbols: Tensor, otherwise: Tensor) -> Tensor:
        """Return the best step of each own row, float16 in float32 ``[n]``.

        Args:
            likelihood: of the layer.
            symbols: uint8 ``[n, M]``.
            otherwise: ``[n]``, of rows of which the symbols say nothing, or nothing positive.
        """
        units = [torch.stack(self._quadratic(likelihood, symbols, part)) for part in likelihood.shares.parts]
        along, square = torch.cat(units, 1) if units else otherwise.new_zeros(2, 0)
        found = along / square
        usable = (square > 0) & (found > 0)
        limits = torch.finfo(torch.float16)
        found = torch.where(usable, found, otherwise.to(found)).float()
        return found.clamp(limits.smallest_normal, limits.max).half().float()

    def _quadratic(self, likelihood: LayerLikelihood, symbols: Tensor, part: slice) -> tuple[Tensor, Tensor]:
        """Return ``n_iᵀ H w̄_i`` and ``n_iᵀ H n_i`` of each row of a unit."""
        n = weights_of(likelihood, symbols, self.places, part)
        image = n @ likelihood.curvature
        return (image * likelihood.mean[part]).sum(1), (image * n).sum(1)


def best_codewords(likelihood: LayerLikelihood, symbols: Tensor, codewords: Tensor) -> Tensor:
    """Return the codewords ``[K]`` that maximise the likelihood given the symbols, the M-step; unused ones stay.

    They solve the normal equations ``A c = b`` with ``A_kl = Σ_i g_i 1[z_i = k]ᵀ H 1[z_i = l]`` and
    ``b_k = Σ_i g_i 1[z_i = k]ᵀ H w̄_i``: here by conjugate gradients from the present codewords, each step of which
    takes one product of the size of the weight with H instead of the K that A itself would take.

    Args:
        likelihood: of the layer.
        symbols: uint8 ``[n, M]``, of the likelihood's own rows.
        codewords: c at present, ``[K]``.
    """
    size, shares = 1 + len(codewords), likelihood.shares
    g, units = likelihood.importance[:, None], likelihood.units  # [n, 1], [n, M]
    price = g if units is None else g * units
    flat = [symbols[part].reshape(-1).long() for part in shares.parts]  # of each unit

    def by_symbol(values: Callable[[slice, Tensor], Sequence[Tensor]]) -> Tensor:
        """Sum each of the ``values`` of all units' weights by symbol, times their g and u: ``[values, K]``."""
        unit = iter(flat)

        def totals(part: slice) -> Tensor:
            places = next(unit)
            # Sums over all weights of a symbol: in float64, where millions of them do not cancel.
            weighted = ((price[part] * value).reshape(-1).double() for value in values(part, places))
            return torch.stack([torch.bincount(places, weights=each, minlength=size)[1:] for each in weighted])

        return shares.sum(totals)

    def image(c: Tensor, part: slice, places: Tensor) -> Tensor:
        """Return the weights of a unit with codewords c, times H."""
        weight = with_zero(c).to(likelihood.mean).index_select(0, places).view(symbols[part].shape)
        return (weight if units is None else weight * units[part]) @ likelihood.curvature

    def normal(c: Tensor) -> Tensor:
        """Return A c."""
        return by_symbol(lambda part, places: [image(c, part, places)])[0]

    found = codewords.double()
    # What is needed of the symbols once, in one message: A's part on the diagonal of H, which is all of it where
    # inputs are uncorrelated and 0 for codewords that are not used; b; and A c.
    scale, wanted, reached = by_symbol(
        lambda part, places: [
            likelihood.curvature.diagonal().expand(symbols[part].shape) * (1 if units is None else units[part]),
            likelihood.image(likelihood.mean, part),
            image(found, part, places),
        ]
    )
    inverse = torch.where(scale > 0, 1 / scale, torch.zeros_like(scale))
    residual = (wanted - reached) * (inverse > 0)
    direction = inverse * residual
    power = first_power = float(residual @ direction)
    for _ in range(size):  # K steps would be enough, were numbers exact
        if power <= _PRECISION * first_power:
            break
        along = normal(direction)
        length = power / float(direction @ along)
        found = found + length * direction
        residual = residual - length * along
        before, power = power, float(residual @ (inverse * residual))
        direction = inverse * residual + power / before * direction
    return found.to(codewords)


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
    return _without_zero(_even_grid(likelihood, beta), max_components, likelihood)


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


def _clusters(likelihood: LayerLikelihood, num_components: int) -> Tensor:
    """Return K-means of weights, each counted by its precision, but for the one at zero: float64 ``[K]``."""
    found = likelihood.histogram
    used = found.mass > 0
    values, mass = found.values[used], found.mass[used]
    clusters = kmeans_1d(values[None], min(1 + num_components, len(values)), mass[None]).loc[0]
    zero = int(clusters.abs().argmin())
    clusters = torch.cat([clusters[:zero], clusters[zero + 1 :]])
    return clusters if len(clusters) else values.new_ones(1)  # of a layer of zeros: one that is never chosen


def _even_grid(likelihood: LayerLikelihood, beta: float) -> Histogram:
    """Return the weights at the even grid of β."""
    found, reach = likelihood.histogram, likelihood.reach
    # No finer than the histogram.
    step = max(math.sqrt(12 * beta / likelihood.mean_precision), reach / PLACES)
    step = min(step, reach) or 1.0  # at least the largest weight is no zero, unless all are
    half = max(math.ceil(reach / step), 1)
    values = step * torch.arange(-half, half + 1, dtype=torch.float64, device=found.values.device)
    return Histogram(values, *found.gathered((found.values / step).round().long() + half, len(values)))


def _without_zero(grid: Histogram, max_components: int, likelihood: LayerLikelihood) -> tuple[Tensor, Tensor]:
    """Return the values of a grid that weights are at, but for zero, merged to K, and the rates of all symbols."""
    half, used = len(grid.values) // 2, grid.counts > 0
    used[half] = False  # zero is no codeword
    if not used.any():
        used[-1] = True  # of a layer of zeros: a codeword that is never chosen
    found, others = _merged(grid.values[used], grid.counts[used], grid.mass[used], max_components)
    rates = fit_symbol_prior(torch.cat([grid.counts[half, None], others])[None]).rates[0]
    return found.to(likelihood.mean), rates


def best_parts(likelihood: LayerLikelihood, symbols: Tensor, codewords: Tensor) -> Tensor:
    """Return the scales of parts of the own rows that are best given symbols and codewords, the M-step.

    With ``w_i = Σ_b s_ib n_ib``, n_ib the codewords of part b of a row, the likelihood is a quadratic in ``s_i``
    of B numbers: one after the other goes where it is highest, from where it is, and is rounded to float16.

    Args:
        likelihood: of the layer, with scales of parts.
        symbols: uint8 ``[n, M]``, of the likelihood's own rows.
        codewords: c, ``[K]``.

    Returns:
        float16 in float32 ``[n, B]``; of a part of zeros alone, or one that should change its sign, as it was.
    """
    assert likelihood.parts is not None
    found, limits = likelihood.parts.clone(), torch.finfo(torch.float16)
    size = likelihood.mean.shape[1] // found.shape[1]
    for unit in likelihood.shares.parts:
        n = with_zero(codewords).to(likelihood.mean)[symbols[unit].long()]
        difference = weights_of(likelihood, symbols, codewords, unit) - likelihood.mean[unit]
        slope = difference @ likelihood.curvature  # [r, M], kept up to date
        for _ in range(_SWEEPS):
            for b in range(found.shape[1]):
                own = slice(b * size, (b + 1) * size)
                image = n[:, own].contiguous() @ likelihood.curvature[own]
                along, square = (slope[:, own] * n[:, own]).sum(1), (image[:, own] * n[:, own]).sum(1)
                before = found[unit, b]
                best = before - along / square
                usable = (square > 0) & (best > 0)
                best = best.clamp(limits.smallest_normal, limits.max).half().to(found)
                change = torch.where(usable, best - before, torch.zeros_like(before))
                slope += change[:, None] * image
                found[unit, b] = before + change
    return found


def weights_of(likelihood: LayerLikelihood, symbols: Tensor, codewords: Tensor, part: slice) -> Tensor:
    """Return the weights that symbols ``[n, M]`` stand for, of a unit of rows, times scales of their parts."""
    weight = with_zero(codewords).to(likelihood.mean)[symbols[part].long()]
    return weight if likelihood.units is None else weight * likelihood.units[part]


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
