r"""Unbiased, differentiable Monte Carlo estimates of KL divergences between distributions with an atom at zero.

With ``q = (1-λ) δ₀ + λ m`` the gate is summed exactly and only the continuous part is sampled:

    KL(q‖p) = (1-λ) [log(1-λ) - log p(0)] + λ [log λ + E_m(log m - log p)],

where ``p`` needs only ``log_prob`` with respect to δ₀ + Lebesgue. For a mixture, ``E_m = Σₖ φₖ E_{Nₖ}``
is summed exactly as well and each ``E_{Nₖ}`` takes one reparametrised draw ``μₖ + σₖ ε``: no score function,
no straight-through value, so the gradients with respect to λ, φ, μ and σ are unbiased too. Where only the value
is asked for, draws of m itself cost K times less each, and at equal cost are at least about as good: stratifying
saves the variance between components, which near-one-hot φ do not have, and takes one draw instead of K.
"""

import math
from typing import Any

import torch
from pyro.distributions.util import sum_rightmost
from torch import Tensor
from torch.distributions import Distribution, Independent

from sqs_pyro.distributions.kl import strip_independent
from sqs_pyro.distributions.numerics import plogp, weighted
from sqs_pyro.distributions.spike_and_slab import SpikeAndSlab
from sqs_pyro.distributions.spike_gmm import SpikeGMM


def monte_carlo_kl(q: Distribution, p: Distribution, num_samples: int = 1000) -> tuple[Tensor, Tensor]:
    """Return the mean of ``num_samples`` unbiased estimates of KL(q‖p) and its standard error, ``[*batch_shape]``.

    Holds ``[num_samples, K, *batch_shape]`` (times K inside ``log_prob``) at once.

    Raises:
        ValueError: when fewer than 2 samples are asked for, which give no standard error.
        NotImplementedError: see :func:`sampled_kl`.
    """
    if num_samples < 2:
        raise ValueError(f"monte_carlo_kl: num_samples must be at least 2, but got {num_samples}.")
    estimates = sampled_kl(q, p, num_samples)
    return estimates.mean(0), estimates.std(0) / math.sqrt(num_samples)


def sampled_kl(q: Distribution, p: Distribution, num_samples: int = 1, *, stratified: bool = True) -> Tensor:
    """Return independent unbiased estimates of KL(q‖p), ``[num_samples, *batch_shape]``; differentiable.

    With ``stratified=False`` a spike-and-GMM draws one component by φ instead of summing over all K: it holds
    ``[num_samples, *batch_shape, K]``, not K times that, and only the value is unbiased, not its gradient.

    A prior without ``has_atom_at_zero`` is a density: it gives the spike no mass, so the KL of what has an atom is
    infinite unless its gate is exactly 1.

    Raises:
        NotImplementedError: when q is neither of ours nor reparametrised, or when p couples the weights of
            one event (its event dimensions are not those of an ``Independent``).
    """
    if isinstance(q, Independent) and isinstance(p, Independent):
        q, p, shared = strip_independent(q, p)
        return sum_rightmost(sampled_kl(q, p, num_samples, stratified=stratified), shared)
    if has_atom(q) and (q.event_shape or p.event_shape):
        raise NotImplementedError(
            f"No unbiased KL estimate of {type(q).__name__} with event_shape {tuple(q.event_shape)} against "
            f"{type(p).__name__} with event_shape {tuple(p.event_shape)}: the prior must be independent over "
            "the weights of a site (use .to_event on a prior of scalars), or a bound registered for the pair."
        )
    # A Gaussian spike is one component more, and its gate is open.
    if isinstance(q, SpikeGMM) and not q.has_atom_at_zero:
        q = q.as_mixture()
    if isinstance(q, SpikeGMM):
        sampled = _sampled_mixture if stratified else _drawn_mixture
        return _with_gate(q.gates, p, sampled(q, p, num_samples))
    if isinstance(q, SpikeAndSlab):
        value = q.slab.rsample(torch.Size([num_samples]))  # [S, *batch_shape]
        return _with_gate(q.inclusion, p, q.slab.log_prob(value) - p.log_prob(value))
    if not q.has_rsample:
        raise NotImplementedError(f"No differentiable draws of {type(q).__name__}; register its KL with torch.")
    value = q.rsample(torch.Size([num_samples]))
    return q.log_prob(value) - p.log_prob(value)


def has_atom(distribution: Any) -> bool:
    """Return whether ``log_prob`` is with respect to δ₀ + Lebesgue (looks through ``to_event`` and ``mask``)."""
    # Stops at ours, whose slab may have a base_dist, too.
    while hasattr(distribution, "base_dist") and not hasattr(distribution, "has_atom_at_zero"):
        distribution = distribution.base_dist
    return bool(getattr(distribution, "has_atom_at_zero", False))


def draws_exactly(distribution: Any) -> bool:
    """Return whether ``rsample`` draws from the distribution itself (looks through ``to_event`` and ``mask``).

    One with a spike makes network values instead, from which no KL can be estimated: see :func:`sampled_kl`.
    """
    base = distribution
    while hasattr(base, "base_dist") and not isinstance(base, SpikeGMM):
        base = base.base_dist
    return not (isinstance(base, SpikeGMM) or has_atom(base))


def _sampled_mixture(q: SpikeGMM, p: Distribution, num_samples: int) -> Tensor:
    """Return ``Σₖ φₖ [log m(xₖ) - log p(xₖ)]`` with one ``xₖ ~ N(μₖ, σₖ²)`` each, ``[S, *batch_shape]``."""
    shape = torch.Size([q.num_components]) + q.batch_shape

    def components_first(x: Tensor) -> Tensor:  # [*batch, K] -> [K, *batch]
        return x.expand(*q.batch_shape, q.num_components).movedim(-1, 0)

    loc, scale = components_first(q.loc), components_first(q.scale)
    noise = torch.randn(num_samples, *shape, dtype=loc.dtype, device=loc.device)
    draws = loc + scale * noise  # [S, K, *batch]
    log_ratio = q.slab_log_prob(draws) - p.log_prob(draws)
    return weighted(components_first(q.responsibilities), log_ratio).sum(1)


def _drawn_mixture(q: SpikeGMM, p: Distribution, num_samples: int) -> Tensor:
    """Return ``log m(x) - log p(x)`` with ``x ~ m``, ``[S, *batch_shape]``."""
    value = q.slab_sample(torch.Size([num_samples]))
    return q.slab_log_prob(value) - p.log_prob(value)


def _with_gate(gate: Tensor, p: Distribution, slab_log_ratio: Tensor) -> Tensor:
    """Add the exact gate part to ``log m - log p`` sampled on the continuous part, ``[S, *batch_shape]``."""
    # λ [log λ + E(log m - log p)]; a gate of 0 makes this 0, whatever the draws say.
    slab_part = plogp(gate) + weighted(gate, slab_log_ratio)
    if not has_atom(p):
        return torch.where(gate == 1, slab_part, torch.inf)
    off = 1 - gate  # p.log_prob(0) is log p's atom
    return plogp(off) - weighted(off, p.log_prob(torch.zeros_like(gate))) + slab_part
