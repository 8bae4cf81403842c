r"""``KL(Normal‖StudentT)``, which torch does not know, by a quadrature that converges at every width.

With ``x ~ N(a, b)`` in units of ``s √ν``, the expectation that has no closed form is, by Frullani's integral
``log(1 + x²) = ∫₀^∞ (1 - exp(-t x²)) exp(-t) dt / t``,

    E log(1 + x²) = ∫ [1 - (1 + 2bt)^{-1/2} exp(-a² t / (1 + 2bt))] exp(-t) dy,      t = exp(y).

In y the integrand is analytic and bounded for ``|Im y| < π/2``, so the trapezoidal rule with step h errs by
``O(exp(-π²/h))``, whatever a and b; Gauss-Hermite nodes would fail for components wider than the slab.
"""

import math
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.distributions import Normal, StudentT, register_kl

_STEP = 0.5  # exp(-π²/h) = 3e-9
_LOWEST, _HIGHEST = -24.0, 3.5  # exp(-exp(3.5)) = 4e-15
_NODES = [math.exp(_LOWEST + i * _STEP) for i in range(round((_HIGHEST - _LOWEST) / _STEP) + 1)]  # 56
_AT_ONCE = 1 << 14  # numbers, of all nodes that are looked at together: few weights would wait for 56 of each call


class ExpectedLogOnePlusSquare(torch.autograd.Function):
    """``E log(1 + x²)`` for ``x ~ N(a, b)``, elementwise; absolute error below 1e-8 for ``a² + b < 1e6``.

    One pass over the nodes gives value and derivatives; nothing of size nodes x N is kept, but of few numbers.
    """

    @staticmethod
    def forward(ctx: Any, loc: Tensor, variance: Tensor) -> Tensor:
        """Args: a, b > 0, of the same shape."""
        square = loc.square()
        value, to_loc, to_variance = (torch.zeros_like(square) for _ in range(3))
        passes: list[tuple[Any, Any]]
        count = _AT_ONCE // max(1, square.numel())
        if count > 1:  # [nodes, *shape]
            nodes = torch.tensor(_NODES, dtype=torch.float64, device=loc.device)
            parts = nodes.view(-1, *[1] * loc.dim()).split(count)
            passes = [(t.to(square), (_STEP * (-t).exp()).to(square)) for t in parts]
        else:  # numbers of Python's, and no dimension to sum over
            passes = [(t, _STEP * math.exp(-t)) for t in _NODES]
        for t, weight in passes:
            width = 2 * t * variance + 1
            log_kept = -0.5 * width.log() - t * square / width  # log E exp(-t x²)
            kept = log_kept.exp() * weight
            # expm1: at the lowest nodes 1 - E exp(-t x²) is about t, far below float32's digits of 1.
            terms = (
                torch.expm1(log_kept) * -weight,
                kept * (2 * t) * loc / width,
                kept * t / width * (1 - 2 * t * square / width),
            )
            for total, term in zip((value, to_loc, to_variance), terms, strict=True):
                total += term.sum(0) if count > 1 else term
        ctx.save_for_backward(to_loc, to_variance)
        # Nodes below the lowest: there the integrand is (a² + b) t, a geometric series in the step.
        return value + (square + variance) * (
            math.exp(_LOWEST) / math.expm1(_STEP) * _STEP
        )  # the rest, to the left

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor]:
        """Return gradients of a and b."""
        (grad,) = grads
        to_loc, to_variance = ctx.saved_tensors
        return grad * to_loc, grad * to_variance


@register_kl(Normal, StudentT)
def _kl_normal_student_t(q: Normal, p: StudentT) -> Tensor:
    """Return ``-½ log(2πe σ²) + log(s √(νπ) Γ(ν/2) / Γ((ν+1)/2)) + ½ (ν+1) E log(1 + x²)``."""
    width = p.scale * p.df.sqrt()  # s √ν, the unit of x
    loc, scale = torch.broadcast_tensors((q.loc - p.loc) / width, q.scale / width)
    log_normaliser = 0.5 * math.log(math.pi) + torch.lgamma(p.df / 2) - torch.lgamma((p.df + 1) / 2)
    entropy = 0.5 * math.log(2 * math.pi * math.e) + scale.log()
    return log_normaliser - entropy + (p.df + 1) / 2 * ExpectedLogOnePlusSquare.apply(loc, scale.square())
