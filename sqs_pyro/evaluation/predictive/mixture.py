"""Mixtures ``1/S Σ_s N(m_s, σ_s²)``: what a posterior over networks predicts under normal noise."""

import math

import torch
from torch import Tensor


def mixture_log_density(means: Tensor, scale: Tensor, y: Tensor) -> Tensor:
    """Return ``log 1/S Σ_s N(y; m_s, σ_s²)``, ``[n]``, of means and scales ``[S, n]``."""
    log_density = torch.distributions.Normal(means, scale).log_prob(y)
    return log_density.logsumexp(0) - math.log(len(means))


def mixture_cdf(means: Tensor, scale: Tensor, y: Tensor) -> Tensor:
    """Return ``1/S Σ_s Φ((y - m_s) / σ_s)``, ``[n]``, of means and scales ``[S, n]``: the PIT value of y."""
    return torch.special.ndtr((y - means) / scale).mean(0)


def mixture_quantile(means: Tensor, scale: Tensor, p: float) -> Tensor:
    """Return where the mixture's distribution function is p, ``[n]``, of means and scales ``[S, n]``.

    The quantile of a mixture lies between the smallest and the largest of its components'; bisection halves that
    64 times, which leaves float64's rounding.
    """
    components = means + scale * torch.special.ndtri(torch.tensor(p, dtype=means.dtype, device=means.device))
    low, high = components.min(0).values, components.max(0).values
    for _ in range(64):
        middle = (low + high) / 2
        below = mixture_cdf(means, scale, middle) < p
        low, high = torch.where(below, middle, low), torch.where(below, high, middle)
    return (low + high) / 2


def mixture_interval(means: Tensor, scale: Tensor, level: float) -> tuple[Tensor, Tensor]:
    """Return the ends of the central interval that holds the probability ``level``, ``[n]`` each."""
    return mixture_quantile(means, scale, (1 - level) / 2), mixture_quantile(means, scale, (1 + level) / 2)


def mixture_crps(means: Tensor, scale: Tensor, y: Tensor) -> Tensor:
    """Return the continuous ranked probability score ``[n]`` of means and scales ``[S, n]``, exactly.

    ``1/S Σ_s A(y - m_s, σ_s²) - 1/2S² Σ_st A(m_s - m_t, σ_s² + σ_t²)`` with ``A(μ, σ²) = E|N(μ, σ²)|`` (Grimit et
    al. 2006, equation 5).
    """
    distance = _mean_absolute(y - means, scale).mean(0)
    spread = torch.zeros_like(distance)
    for m, s in zip(means, scale, strict=True):  # one row of [S, S, n] at a time
        spread += _mean_absolute(m - means, (s.square() + scale.square()).sqrt()).mean(0)
    return distance - spread / (2 * len(means))


def _mean_absolute(loc: Tensor, scale: Tensor) -> Tensor:
    """Return ``E|N(μ, σ²)| = μ (2 Φ(μ/σ) - 1) + 2 σ φ(μ/σ)``."""
    z = loc / scale
    density = (-z.square() / 2).exp() / math.sqrt(2 * math.pi)
    return loc * torch.special.erf(z / math.sqrt(2)) + 2 * scale * density
