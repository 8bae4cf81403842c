"""One β for many layers, so that together they take the bits that were asked for."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from sqs_pyro.compression.bisection import beta_for
from sqs_pyro.distributions.kmeans import kmeans_1d

_SAMPLE = 1 << 16  # weights of a layer that its entropy is estimated from
_FINEST = 10_000  # grid points on either side of zero, at most
_FEW = 1 << 12  # weights of a layer that say what few values can take


@dataclass(frozen=True, eq=False)
class LayerRate:
    """How many bits a layer takes at any β, on :func:`~sqs_pyro.compression.blockwise.first_codewords.grid`.

    Attributes:
        sample: some of its weights, ascending.
        weights: how many it has.
        precision: h, mean precision of a weight given the others.
        extra: bits a weight that do not depend on β.
        most: bits that its symbols take where the grid is finer than it has values for.
    """

    sample: Tensor
    weights: int
    precision: float
    extra: float = 0.0
    most: float = math.inf
    _known: dict[float, float] = field(default_factory=dict, repr=False)  # by β

    @classmethod
    def of(
        cls, weight: Tensor, precision: float, extra: float = 0.0, max_components: int | None = None
    ) -> "LayerRate":
        """Make it of a weight of any shape, which is to have ``max_components`` values besides zero at most."""
        stride = max(1, weight.numel() // _SAMPLE)
        sample = weight.detach().reshape(-1)[::stride].float().cpu().contiguous()
        most = math.inf if max_components is None else _entropy_of_few(sample, max_components)
        return cls(sample.sort().values, weight.numel(), precision, extra, most)

    def bits(self, beta: float) -> float:
        """Return the entropy, in bits, of a weight on the grid of step ``√(12 β / h)``, and what comes on top.

        A grid of more values than there may be is merged to them, whatever β: it takes ``most``. What it was asked
        for it knows: from block to block a bisection begins at the same β.
        """
        if beta not in self._known:
            self._known[beta] = min(self._entropy(beta), self.most) + self.extra
        return self._known[beta]

    def _entropy(self, beta: float) -> float:
        reach = float(self.sample[[0, -1]].abs().max())
        # Bounded below for the memory of the counts; 1 for a layer of zeros, which has no bits at any step.
        step = max(math.sqrt(12 * beta / self.precision), reach / _FINEST) or 1.0
        places = self.sample / step
        first, last = places[[0, -1]].round().long().tolist()
        # Where they pass the middles between whole numbers: far fewer than there are weights.
        ends = torch.searchsorted(places, torch.arange(first, last) + 0.5)
        return _entropy_of(ends.diff(prepend=ends.new_zeros(1), append=ends.new_tensor([len(places)])))


def rounded_entropy(values: Tensor) -> float:
    """Return the entropy of values that are rounded to whole numbers, bits."""
    places = values.round().long().reshape(-1)
    return _entropy_of(torch.bincount(places - places.min()))  # numbers from 0, as bincount needs them


def _entropy_of(counts: Tensor) -> float:
    """Return the entropy, in bits, of what occurs so often."""
    return float(torch.special.entr(counts.double() / counts.sum()).sum()) / math.log(2)


def _entropy_of_few(sample: Tensor, max_components: int) -> float:
    """Return the entropy of the nearest of zero and so many values, which K-means has found, bits."""
    if not bool(sample.any()):
        return 0.0
    few = sample[:: max(1, len(sample) // _FEW)]
    values = kmeans_1d(few[None], min(max_components, len(few))).loc[0]
    points = torch.cat([values.new_zeros(1), values]).sort().values
    cuts = 0.5 * (points[1:] + points[:-1])
    return rounded_entropy(torch.bucketize(sample, cuts).float())


class BitBudget:
    """β for the layers still to come; corrected by what finished layers took beyond their forecast.

    Args:
        layers: by name.
        bits: bits a weight, over all layers.
    """

    def __init__(self, layers: Mapping[str, LayerRate], bits: float) -> None:
        self._waiting = dict(layers)
        self._left = bits * sum(layer.weights for layer in layers.values())
        self._excess = self._done = 0.0  # bits beyond the forecast, weights finished

    @property
    def waits(self) -> bool:
        """Whether a layer is still to come."""
        return bool(self._waiting)

    @property
    def left(self) -> float:
        """Bits for each weight of the layers that are still to come."""
        return self._left / sum(layer.weights for layer in self._waiting.values())

    @property
    def unspent(self) -> float:
        """Bits for each weight of all layers that none has taken, once all are finished."""
        return self._left / self._done if self._done else 0.0

    def beta(self) -> float:
        """Return β at which the waiting layers are going to take what is left."""
        weights = sum(layer.weights for layer in self._waiting.values())
        # The entropy of a rounded grid is not yet what a coder takes; layers to come will miss it by as much.
        bias = self._excess / self._done if self._done else 0.0
        target = self._left / weights - bias

        def forecast(beta: float) -> float:
            return sum(layer.weights * layer.bits(beta) for layer in self._waiting.values())

        # log β from -80 to 80: wider than any weights and gradients of float32 can ask for.
        return beta_for(forecast, target * weights, -80.0, 80.0, tolerance=1e-3)

    def spend(self, name: str, bits: float, beta: float) -> None:
        """Note that a layer is finished.

        Args:
            name: which.
            bits: what each of its weights took.
            beta: β it was coded at.
        """
        layer = self._waiting.pop(name)
        self._left -= bits * layer.weights
        self._excess += (bits - layer.bits(beta)) * layer.weights
        self._done += layer.weights
