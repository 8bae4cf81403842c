"""Windows: weights of one window share one responsibility vector φ, that of the window's mean.

With as many windows as weights (:class:`PerWeight`) each weight has its own φ. The paper groups weights into
windows of equal mass; outlier-aware windows keep the tails apart, so that a few large weights are not averaged
into the bulk (paper, section on outlier-aware windowing).
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor

from sqs_pyro.arguments import is_whole
from sqs_pyro.distributions.kmeans import kmeans_1d
from sqs_pyro.errors import ArgumentError


class Windows(ABC):
    """A way to cut the real line into windows, given the weights of a layer."""

    @abstractmethod
    def edges(self, values: Tensor) -> Tensor:
        """Return inner window boundaries in ascending order, ``[number of windows - 1]``, for values ``[n]``."""

    def bulk(self, values: Tensor) -> tuple[Tensor, Tensor] | None:
        """Return the range of values ``[n]`` outside of which weights have windows of their own, if any."""
        return None

    def represent(self, values: Tensor, edges: Tensor) -> Tensor:
        """Return each value replaced by the mean of its window, same shape; a constant for gradients."""
        flat = values.detach().flatten()
        window = torch.bucketize(flat, edges)  # [n], 0 .. W - 1
        count = torch.bincount(window, minlength=len(edges) + 1).clamp_min(1)  # [W]; an empty one divides by 1
        # In float64: a window of a large layer sums a hundred thousand numbers.
        total = torch.bincount(window, weights=flat.double(), minlength=len(edges) + 1)
        return (total / count).to(values.dtype)[window].view_as(values)


@dataclass(frozen=True)
class PerWeight(Windows):
    """Every weight is its own window: no averaging, gradients reach the latent weight."""

    def edges(self, values: Tensor) -> Tensor:
        """Return no boundaries."""
        return values.new_empty(0)

    def represent(self, values: Tensor, edges: Tensor) -> Tensor:
        """Return the values themselves."""
        return values


@dataclass(frozen=True)
class EqualMass(Windows):
    """``count`` windows that hold the same number of weights each (quantile bins)."""

    count: int = 256

    def __post_init__(self) -> None:
        _check_count("EqualMass count", self.count)

    def edges(self, values: Tensor) -> Tensor:
        """Return the quantiles between neighbouring windows; equal quantiles (ties) make one boundary."""
        return _equal_mass_edges(values, self.count)


@dataclass(frozen=True)
class OutlierAware(Windows):
    """Equal-mass windows inside ``[Q1 - 1.5 IQR, Q3 + 1.5 IQR]``, and windows of their own for each tail.

    A tail's windows are those of least squared error (K-means). Of equal mass, the last of them would average
    what is a little outside with what is far out, and lose the largest weights as windows without tails do: of
    the tails of a Student-t layer (3 degrees of freedom, K = 16) 12 % of their energy instead of 4 %.

    No window reaches across zero: pruning leaves a gap there, and the mean of a window across it is a value near
    zero that none of its weights has.
    """

    count: int = 256
    tail_count: int = 8

    def __post_init__(self) -> None:
        _check_count("OutlierAware count", self.count)
        _check_count("OutlierAware tail_count", self.tail_count)

    def bulk(self, values: Tensor) -> tuple[Tensor, Tensor]:
        """Return Tukey's fences."""
        return fences(values)

    def edges(self, values: Tensor) -> Tensor:
        """Return boundaries of the lower tail's, the bulk's and the upper tail's windows, both fences, zero."""
        flat = values.detach().flatten()
        # Five kinds of edges that may coincide; `unique` also puts them in order.
        low, high = fences(flat)  # a weight on a fence is inside; on an edge, it is in the window below
        below, above = flat[flat < low], flat[flat > high]
        inside = flat[(flat >= low) & (flat <= high)]
        pieces = [
            _least_squares_edges(below, self.tail_count),
            # bucketize gives an edge's own value to the window below: the fence's edge lies just under it.
            torch.nextafter(low, low - torch.inf)[None] if len(below) and len(inside) else flat.new_empty(0),
            _equal_mass_edges(inside, self.count),
            flat.new_zeros(1) if (inside < 0).any() and (inside > 0).any() else flat.new_empty(0),
            high[None] if len(above) and len(inside) else flat.new_empty(0),
            _least_squares_edges(above, self.tail_count),
        ]
        return torch.cat(pieces).unique()


def fences(values: Tensor) -> tuple[Tensor, Tensor]:
    """Return Tukey's fences, ``Q1 - 1.5 IQR`` and ``Q3 + 1.5 IQR``, of values ``[n]``; outliers are outside."""
    ordered = values.detach().flatten().sort().values
    q1, q3 = (_quantile(ordered, q) for q in (0.25, 0.75))
    return q1 - 1.5 * (q3 - q1), q3 + 1.5 * (q3 - q1)


def _quantile(ordered: Tensor, q: float) -> Tensor:
    """Interpolate between order statistics (torch.quantile refuses more than 16 million values)."""
    position = q * (len(ordered) - 1)
    index = int(position)
    upper = min(index + 1, len(ordered) - 1)
    return torch.lerp(ordered[index], ordered[upper], position - index)


def _equal_mass_edges(values: Tensor, count: int) -> Tensor:
    ordered = values.detach().flatten().sort().values
    if len(ordered) < 2:
        return ordered.new_empty(0)
    cuts = torch.arange(1, count, device=values.device) * len(ordered) // count  # places in order, [W - 1]
    cuts = cuts[cuts > 0]
    # Midway between neighbours in order; several cuts through one tie make one edge.
    edges = ((ordered[cuts - 1] + ordered[cuts]) / 2).unique()
    return edges[(edges > ordered[0]) & (edges < ordered[-1])]


def _least_squares_edges(values: Tensor, count: int) -> Tensor:
    flat = values.detach().flatten()
    count = min(count, len(flat))
    if count < 2:
        return flat.new_empty(0)
    means = kmeans_1d(flat[None], count).loc[0]
    # Between means, where the nearest one changes: least squares' own boundaries.
    edges = ((means[1:] + means[:-1]) / 2).unique()
    return edges[(edges >= flat.min()) & (edges < flat.max())]


def _check_count(name: str, value: int) -> None:
    if not is_whole(value, 1):
        raise ArgumentError(f"{name} is {value!r}, but must be at least 1 window.")
