"""Logarithms and products with exact values and finite gradients at probabilities 0 and 1."""

import torch
from torch import Tensor


def log_or_neg_inf(probability: Tensor) -> Tensor:
    """Elementwise ``log p``; exactly ``-inf`` with gradient 0 (autograd: inf, then NaN) where ``p = 0``."""
    positive = probability > 0
    return torch.where(positive, probability.where(positive, 1.0).log(), -torch.inf)


def plogp(probability: Tensor) -> Tensor:
    """Elementwise ``p log p``, 0 at ``p = 0``, where its gradient is ``log tiny`` (-87 in float32)."""
    return probability * probability.clamp(min=torch.finfo(probability.dtype).tiny).log()


def weighted(weight: Tensor, value: Tensor) -> Tensor:
    """``weight * value`` with the measure-theoretic ``0 * inf = 0``: what has no mass contributes nothing."""
    contributes = (weight > 0) | value.isfinite()
    return torch.where(contributes, weight * value.where(contributes, 0.0), 0.0)
