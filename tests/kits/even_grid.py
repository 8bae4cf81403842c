"""The simplest competitor: weights rounded to an even grid, as fine as so many bits let it be."""

import math

import torch
from torch import Tensor


def rounded_to(bits: float, weight: Tensor) -> Tensor:
    """Return a weight on the finest even grid whose symbols have an entropy of at most ``bits``."""
    low, high = 1e-3, 2.0
    while high - low > 1e-4:
        step = 0.5 * (low + high)
        counts = (weight / step).round().unique(return_counts=True)[1].double()
        entropy = float(torch.special.entr(counts / counts.sum()).sum()) / math.log(2)
        low, high = (step, high) if entropy > bits else (low, step)
    return (weight / high).round() * high
