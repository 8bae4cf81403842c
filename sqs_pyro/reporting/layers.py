"""What there is to see of one compressed layer."""

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.floating]
_BINS, _MOST_CODEWORDS = 64, 256


@dataclass(frozen=True)
class LayerPicture:
    """One compressed layer as plain numpy arrays: N weights, K components.

    Attributes:
        name: site name, which is the parameter's name.
        weights: [N], latent values just before hardening.
        values: [N], hardened values: 0 where pruned, else a value of the codebook.
        nonzero: [N], bool, False where the weight was pruned.
        loc: [K], component means μ of the first group.
        scale: [K], component standard deviations σ of the first group.
        mixing: [K], component weights π of the first group; they sum to one over the non-zero weights.
        window_edges: [B-1], boundaries of the B windows that share responsibilities; empty without windows.
        bits: stored bits a weight, everything that belongs to the layer counted.
        bulk: [2], the range outside of which outliers have windows of their own; None without such windows.
    """

    name: str
    weights: Floats
    values: Floats
    nonzero: NDArray[np.bool_]
    loc: Floats
    scale: Floats
    mixing: Floats
    window_edges: Floats
    bits: float
    bulk: Floats | None = None

    def __post_init__(self) -> None:
        # Here, where arrays come together: a picture of mixed layers would look as good as a right one.
        same_length = {"weights": self.weights, "values": self.values, "nonzero": self.nonzero}
        for name, array in same_length.items():
            if array.shape != (self.num_weights,):
                raise ValueError(f"{self.name}: {name} has shape {array.shape}, expected ({self.num_weights},)")
        for name, array in {"scale": self.scale, "mixing": self.mixing}.items():
            if array.shape != self.loc.shape:
                raise ValueError(f"{self.name}: {name} has shape {array.shape}, expected {self.loc.shape}")

    @property
    def num_weights(self) -> int:
        """Number of weights N, zeros included."""
        return int(self.weights.size)

    @property
    def num_nonzeros(self) -> int:
        """Number of weights that survived pruning."""
        return int(self.nonzero.sum())

    @property
    def nonzero_rate(self) -> float:
        """Fraction of the weights that survived pruning; 0 for an empty layer."""
        return self.num_nonzeros / max(self.num_weights, 1)

    @property
    def used_values(self) -> int:
        """How many different non-zero values the hardened layer holds."""
        return int(np.unique(self.values[self.nonzero]).size)


def layer_document(layer: LayerPicture) -> dict[str, Any]:
    """Return a layer's histogram and codebook as plain data.

    Returns:
        ``name``; ``low`` and ``high``, ends of 64 equal bins; ``pruned`` and ``kept``, weights in each by what
        became of them; ``codebook``, pairs of a non-zero value and how many weights have it, if at most 256.
    """
    everything = np.concatenate([layer.weights, layer.values, np.zeros(1)])
    low, high = float(everything.min()), float(everything.max())
    margin = 0.02 * (high - low) or 1e-3  # a constant layer still gets bins
    low, high = low - margin, high + margin
    counts = {
        name: np.histogram(layer.weights[chosen], bins=_BINS, range=(low, high))[0].tolist()
        for name, chosen in (("pruned", ~layer.nonzero), ("kept", layer.nonzero))
    }
    values, times = np.unique(layer.values[layer.nonzero], return_counts=True)
    few = values.size <= _MOST_CODEWORDS  # a codebook a channel has thousands
    codebook = [[_short(value), int(count)] for value, count in zip(values, times, strict=True)] if few else []
    return {"name": layer.name, "low": _short(low), "high": _short(high), **counts, "codebook": codebook}


def _short(value: float) -> float:
    return float(f"{value:.6g}")
