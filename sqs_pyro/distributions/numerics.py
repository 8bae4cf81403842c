"""Logarithms, products and divergences: exact values, finite gradients at probabilities 0 and 1."""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


def log_or_neg_inf(probability: Tensor) -> Tensor:
    """Return elementwise ``log p``; exactly ``-inf`` with gradient 0 (autograd: inf, then NaN) where ``p = 0``."""
    positive = probability > 0
    # A where inside as well: the branch that is not taken has a gradient, too, and inf times 0 is NaN.
    return torch.where(positive, probability.where(positive, 1.0).log(), -torch.inf)


def plogp(probability: Tensor) -> Tensor:
    """Return elementwise ``p log p``, 0 at ``p = 0``, where its gradient is ``log tiny`` (-87 in float32)."""
    return probability * log_or_log_tiny(probability)


def weighted(weight: Tensor, value: Tensor) -> Tensor:
    """Return ``weight * value`` with measure theory's ``0 * inf = 0``: what has no mass contributes nothing."""
    contributes = (weight > 0) | value.isfinite()
    return torch.where(contributes, weight * value.where(contributes, 0.0), 0.0)


def log_or_log_tiny(probability: Tensor) -> Tensor:
    """Return elementwise ``log p``, but ``log tiny`` (-87 in float32) at 0: for products with what is 0 there."""
    return probability.clamp(min=torch.finfo(probability.dtype).tiny).log_()


class BernoulliDivergence(torch.autograd.Function):
    """``KL(Bern(p)‖Bern(p₀))``, elementwise with broadcasting.

    Fused because every weight of a network passes here at every step; the gradient needs one saved tensor.
    """

    @staticmethod
    def forward(ctx: Any, gate: Tensor, prior: Tensor) -> Tensor:
        """Return nats; inf where p₀ excludes what p allows."""
        off = 1 - gate
        log_on, log_off = log_or_log_tiny(gate), log_or_log_tiny(off)
        ctx.save_for_backward(gate, prior, log_on - log_off)
        # Masked after the product: 0 times infinity, where the prior has no mass either, is NaN and stands for 0.
        on_part = (log_on - prior.log()).mul_(gate).masked_fill_(gate == 0, 0.0)
        off_part = (log_off - (1 - prior).log()).mul_(off).masked_fill_(off == 0, 0.0)
        return on_part.add_(off_part)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None]:
        """Return the gradients ``logit p - logit p₀`` (clamped logarithms) and ``(1-p)/(1-p₀) - p/p₀``."""
        gate, prior, logit = ctx.saved_tensors
        # Where the prior is 0 or 1, gradients are large and finite.
        tiny = torch.finfo(prior.dtype).tiny
        to_gate = to_prior = None
        if ctx.needs_input_grad[0]:
            prior_logit = log_or_log_tiny(prior) - log_or_log_tiny(1 - prior)
            to_gate = (logit - prior_logit).mul_(grad).sum_to_size(gate.shape)  # undoes broadcasting
        if ctx.needs_input_grad[1]:
            slope = (1 - gate) / (1 - prior).clamp(min=tiny) - gate / prior.clamp(min=tiny)
            to_prior = (slope * grad).sum_to_size(prior.shape)
        return to_gate, to_prior
