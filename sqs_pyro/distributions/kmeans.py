"""One-dimensional K-means by sorting: an exact Lloyd step costs O(K log n) after one sort.

In one dimension every cluster is an interval of the sorted values, so with prefix sums a cluster's mean is two
look-ups. Ten million weights take about the time of one sort. Where ranks have some of the values each, all that
is sent are such sums between boundaries.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Clustering:
    """K clusters of each of G groups of weights, in ascending order of ``loc``.

    Attributes:
        loc: cluster means μ, ``[G, K]``.
        scale: pooled within-cluster standard deviation σ of the group, ``[G, K]``; the same for its K
            components, so that the most probable component is the nearest one up to the mixing weights.
        mixing: share π of the group's weights in each cluster, ``[G, K]``, smoothed so that none is 0.
        inertia: summed squared distance to the nearest mean, ``[G]``.
    """

    loc: Tensor
    scale: Tensor
    mixing: Tensor
    inertia: Tensor


_FINE_BINS, _COARSE_BINS = 512, 128  # a histogram's bins for few groups, and for many
_FINE_GROUPS = 16  # rows handled at once: their error matrices take at most 16 · 512² · 8 bytes = 34 MB
_TINY = 1e-300
_CELLS, _LEAST_CELLS = 8192, 16  # of all ranks' values, to which each rank adds its share, but so many at least


def kmeans_1d(
    values: Tensor,
    num_components: int,
    weights: Tensor | None = None,
    max_iterations: int = 300,
    gathered: Callable[[Tensor], Tensor] | None = None,
) -> Clustering:
    """Cluster each row of ``values`` by weighted 1-D K-means.

    The start is the best partition of a histogram of the row (dynamic programming over its bins), which
    Lloyd's algorithm then refines on all values: as good as many random starts, and deterministic.

    Args:
        values: ``[G, n]``.
        num_components: K, at most n.
        weights: non-negative weight of each value, ``[G, n]``; 0 leaves a value out (a pruned weight).
        max_iterations: of Lloyd's algorithm; it stops earlier when no mean moves.
        gathered: returns a tensor of all ranks, ``[ranks, ...]``, where each has some values of one group,
            ``[1, n]`` with any n. The start is then K-means of 8,192 cells, each of a single value where there are
            fewer, and Lloyd's steps are exact; each rank adds up the same numbers in the same order.
    """
    # In float64: variances below are differences of sums over all values.
    ordered, order = values.detach().double().sort(dim=1)
    mass = torch.ones_like(ordered) if weights is None else weights.double().gather(1, order)
    moments = [_prefix_sums(mass * ordered**power) for power in range(3)]  # each [G, n + 1]
    if gathered is None:
        start = _best_histogram_partition(ordered, mass, moments, num_components)
    else:
        start = _means_of_cells(ordered, mass, moments, num_components, gathered)
    fit = _lloyd(ordered, moments, start, max_iterations, gathered or (lambda own: own[None]))
    return Clustering(*(column.to(values.dtype) for column in (fit.loc, fit.scale, fit.mixing, fit.inertia)))


def _prefix_sums(values: Tensor) -> Tensor:
    # Entry i sums the first i values, so that the sum of an interval is a difference of two entries.
    return torch.nn.functional.pad(values.cumsum(1), (1, 0))


def _best_histogram_partition(ordered: Tensor, mass: Tensor, moments: list[Tensor], k: int) -> Tensor:
    """Return means of the K intervals of least squared error whose ends are bin ends, ``[G, K]``."""
    # Time and memory grow with groups times bins squared; Lloyd's steps make up for coarser starts.
    bins = _FINE_BINS if len(ordered) <= _FINE_GROUPS else _COARSE_BINS
    ends = _bin_ends(ordered, mass, moments[0], bins)  # positions in `ordered`, [G, bins + 1] or fewer
    starts = []
    for rows in torch.arange(len(ordered), device=ordered.device).split(_FINE_GROUPS):
        below = [moment[rows].gather(1, ends[rows]) for moment in moments]  # each [g, bins + 1]
        cuts = _optimal_cuts(below, k)  # [g, K + 1]
        count, total = (b.gather(1, cuts).diff(dim=1) for b in below[:2])
        # An interval of pruned weights alone has no mean: any of its values does, and K means stay K.
        middle = ordered[rows].gather(1, ends[rows].gather(1, cuts[:, 1:]).sub(1).clamp_min(0))
        starts.append(torch.where(count > 0, total / count.clamp_min(_TINY), middle))
    return torch.cat(starts)


def _bin_ends(ordered: Tensor, mass: Tensor, mass_below: Tensor, bins: int) -> Tensor:
    """Put half of the ends by the cube root of the density, the rest at even quantiles and on an even grid.

    The best quantizer of a density f has codewords of density f^(1/3) (Panter & Dite 1951), which between two
    values a gap Δ apart is (mass / Δ)^(1/3) Δ. Quantiles alone starve heavy tails, a grid alone the bulk.
    """

    def shares(count: int) -> Tensor:
        return torch.arange(1, count, dtype=ordered.dtype, device=ordered.device) / count

    # (mass / Δ)^(1/3) Δ = (mass Δ²)^(1/3)
    gaps = (ordered.diff(dim=1) ** 2 * (mass[:, 1:] + mass[:, :-1])) ** (1 / 3)
    codewords_below = torch.nn.functional.pad(gaps, (1, 0)).cumsum(1)
    by_codewords = torch.searchsorted(codewords_below.contiguous(), shares(bins // 2) * codewords_below[:, -1:])
    by_mass = torch.searchsorted(mass_below.contiguous(), shares(bins // 4) * mass_below[:, -1:])
    # The grid spans what is used: pruned outliers would stretch it.
    used = mass > 0
    low = ordered.masked_fill(~used, torch.inf).amin(1, keepdim=True).nan_to_num(posinf=0.0)
    high = ordered.masked_fill(~used, -torch.inf).amax(1, keepdim=True).nan_to_num(neginf=0.0)
    by_value = torch.searchsorted(ordered.contiguous(), low + (high - low) * shares(bins // 4))
    first, last = torch.zeros_like(by_mass[:, :1]), torch.full_like(by_mass[:, :1], ordered.shape[1])
    ends = torch.cat([first, by_codewords, by_mass, by_value, last], dim=1).sort(dim=1).values
    # Bins of nothing change no partition, but each takes as much time as another. Rows have other numbers of them:
    # they go to the end, behind the last weight.
    empty = torch.nn.functional.pad(ends[:, 1:] == ends[:, :-1], (1, 0))
    kept = ends.masked_fill(empty, ordered.shape[1]).sort(dim=1).values
    return kept[:, : int((~empty).sum(1).max())]


def _optimal_cuts(below: list[Tensor], k: int) -> Tensor:
    """Return bin ends that split the bins into K intervals of least squared error, ``[g, K + 1]``.

    ``best_j[e]``, the least error of covering the bins before end e by j intervals, follows from
    ``best_j[e] = min_s best_{j-1}[s] + error(s, e)``.
    """
    if k == 1:
        first = torch.zeros_like(below[0][:, 0], dtype=torch.long)
        return torch.stack([first, torch.full_like(first, below[0].shape[1] - 1)], dim=1)
    # Starts last, where their minimum is looked for, and in place: memory is what takes the time. [g, end, start]
    count, total, square = (b[:, :, None] - b[:, None, :] for b in below)
    # Σ w x² - (Σ w x)² / Σ w, the squared error around the interval's mean.
    error = square.sub_(total.square_().div_(count.clamp_min(_TINY))).clamp_min_(0).masked_fill_(count <= 0, 0.0)
    size = error.shape[-1]
    # An interval that ends before it starts is none.
    backwards = torch.ones(size, size, dtype=torch.bool, device=error.device).triu(1)
    error.masked_fill_(backwards, torch.inf)
    best, choices, sums = error[:, :, 0], [], total  # one interval, from the first bin; `total` is used up
    for _ in range(k - 1):
        best, choice = torch.add(best[:, None, :], error, out=sums).min(dim=2)  # over starts: [g, end]
        choices.append(choice)
    cuts = [torch.full_like(below[0][:, 0], size - 1, dtype=torch.long)]
    # Back from the last end: each choice says where the interval that ends there has started.
    for choice in reversed(choices):
        cuts.append(choice.gather(1, cuts[-1][:, None])[:, 0])
    cuts.append(torch.zeros_like(cuts[0]))
    return torch.stack(cuts[::-1], dim=1)


def _means_of_cells(
    ordered: Tensor, mass: Tensor, moments: list[Tensor], k: int, gathered: Callable[[Tensor], Tensor]
) -> Tensor:
    """Return means of K clusters of the cells that all ranks' values are in, ``[1, K]``."""
    ranks = len(gathered(moments[0][:, -1]))
    bins = max(_CELLS // ranks, _LEAST_CELLS)
    own = torch.nn.functional.pad(ordered[0], (0, 1), value=torch.inf)
    if len(own) > bins:  # else each value is a cell
        own = own[_bin_ends(ordered, mass, moments[0], bins - 1)[0]]
    own = torch.nn.functional.pad(own, (0, bins - len(own)), value=torch.inf)
    ends = gathered(own).flatten().sort().values[None]
    # Of pruned weights, too: a cell of them alone has no other mean.
    unweighted = [_prefix_sums(ordered**power) for power in range(2)]
    cells = gathered(_moments_between(ordered, unweighted + moments[:2], ends)).sum(0)[:, 0]  # [4, cells]
    number, sums, count, total = cells[:, cells[0] > 0]
    means = torch.where(count > 0, total / count.clamp_min(_TINY), sums / number)
    return kmeans_1d(means[None], k, count[None]).loc


def _lloyd(
    ordered: Tensor,
    moments: list[Tensor],
    start: Tensor,
    max_iterations: int,
    gathered: Callable[[Tensor], Tensor],
) -> Clustering:
    loc = start.sort(dim=1).values  # ascending, as midpoints need it

    def clusters() -> Tensor:
        midpoints = (loc[:, 1:] + loc[:, :-1]) / 2
        return gathered(_moments_between(ordered, moments, midpoints)).sum(0)

    for _ in range(max_iterations):
        count, total, _ = clusters()
        updated = torch.where(count > 0, total / count.clamp_min(_TINY), loc).sort(dim=1).values
        # Exactly: then the partition is the same, and stays so.
        if torch.equal(updated, loc):
            break
        loc = updated
    count, total, square = clusters()
    inertia = (square - 2 * loc * total + loc**2 * count).sum(1).clamp_min(0)  # [G]
    mass = count.sum(1, keepdim=True).clamp_min(1)
    pooled = (inertia[:, None] / mass).sqrt()
    spread = (square.sum(1, keepdim=True) / mass).sqrt()  # root mean square of the group
    # A width of 0, of weights that lie on K values, would make the KL infinite; a group of zeros has no size to go
    # by.
    floor = 1e-3 * torch.where(spread > 0, spread, torch.ones_like(spread))
    # Half a count more: log π of a cluster that nothing uses stays finite.
    mixing = (count + 0.5) / (count + 0.5).sum(1, keepdim=True)
    return Clustering(loc, pooled.maximum(floor).expand_as(loc).clone(), mixing, inertia)


def _moments_between(ordered: Tensor, moments: list[Tensor], ends: Tensor) -> Tensor:
    """Return sums below, between and from ascending ends ``[G, E]`` on, ``[moments, G, E + 1]``."""
    cuts = torch.searchsorted(ordered.contiguous(), ends.contiguous())
    first = torch.nn.functional.pad(cuts, (1, 0))  # [G, E + 1]: where each interval begins
    last = torch.nn.functional.pad(cuts, (0, 1), value=ordered.shape[1])
    return torch.stack([prefix.gather(1, last) - prefix.gather(1, first) for prefix in moments])
