"""The KL of one site: its certified bracket, the dominant value, and an unbiased estimate with its error."""

import math
from dataclasses import dataclass
from typing import Any

import torch
from pyro.distributions.util import scale_and_mask
from torch import Tensor
from torch.distributions import Distribution, Independent

from sqs_pyro.distributions import SpikeGMM, gate_divergence, kl_bound, sampled_kl
from sqs_pyro.distributions.kl import BOUNDS, strip_independent
from sqs_pyro.distributions.monte_carlo import draws_exactly, has_atom
from sqs_pyro.distributions.numerics import weighted

_CHUNK = 2**24  # floats of one [samples, weights, K] tensor: 64 MB; a single sample may need more


@dataclass(frozen=True)
class KLBounds:
    """The KL of one site, or of several together, in nats summed over their weights.

    Attributes:
        name: of the site.
        num_weights: scalars in it.
        gate_kl: ``Σ KL(Bern(λ)‖Bern(λ₀))``; None where guide or prior has no spike.
        lower: never above the KL; None where no bound is known, for which ``monte_carlo`` then stands.
        jensen: never below the KL; None likewise.
        dominant: Eq. 8 of the paper, no bound; None likewise.
        dominant_below: weights whose dominant value is below their lower end, hence certainly below their KL.
        monte_carlo: unbiased estimate.
        monte_carlo_error: its standard error.
        code_entropy: ``Σ λ H(φ)``.
    """

    name: str
    num_weights: int
    gate_kl: float | None
    lower: float | None
    jensen: float | None
    dominant: float | None
    dominant_below: int
    monte_carlo: float
    monte_carlo_error: float
    code_entropy: float

    @property
    def width(self) -> float | None:
        """``jensen - lower``; for a spike-and-slab prior ``code_entropy``."""
        if self.jensen is None or self.lower is None:
            return None
        return 0.0 if self.jensen == self.lower else self.jensen - self.lower  # both may be infinite

    @property
    def bits_per_weight(self) -> float:
        """Jensen's bound, or where there is none the estimate, in bits a weight."""
        kl = self.monte_carlo if self.jensen is None else self.jensen
        return kl / math.log(2) / max(self.num_weights, 1)


def kl_bounds(
    name: str, q: Distribution, p: Distribution, num_samples: int, scale: Any = 1.0, mask: Any = None
) -> KLBounds:
    """Bound and estimate KL(q‖p) weight by weight, and sum in float64.

    Args:
        name: of the site.
        q: the guide's distribution of the site.
        p: the model's.
        num_samples: Monte Carlo draws of each weight, at least 2.
        scale: factor of the site, as a Pyro trace has it, broadcastable to ``q.batch_shape``.
        mask: likewise, bool.

    Raises:
        NotImplementedError: when an unbiased estimate is not known, see :func:`sampled_kl`.
    """
    num_weights = (q.batch_shape + q.event_shape).numel()
    factor = torch.as_tensor(scale_and_mask(torch.ones(q.batch_shape), scale=scale, mask=mask))
    # What a weight counts, [*batch_shape]: the scale, or 0 where the site is masked.
    if isinstance(q, Independent) and isinstance(p, Independent):
        q, p, shared = strip_independent(q, p)
        # Event dimensions become batch dimensions of single weights, which share their event's factor.
        factor = factor[(...,) + (None,) * shared]

    def total(per_weight: Tensor) -> float:
        return weighted(factor.to(per_weight.device), per_weight).double().sum().item()

    bounds = {kind: _bound(q, p, kind) for kind in BOUNDS}
    mean, variance = _estimate(q, p, num_samples)
    spikes = has_atom(q) and has_atom(p)
    return KLBounds(
        name=name,
        num_weights=num_weights,
        gate_kl=total(_gate_kl(q, p, like=mean)) if spikes else None,
        **{kind: None if bound is None else total(bound) for kind, bound in bounds.items()},
        dominant_below=_certainly_below(bounds["dominant"], bounds["lower"]),
        monte_carlo=total(mean),
        # Weights are drawn independently, so that variances add; the factor once more, because it scales
        # estimates.
        monte_carlo_error=math.sqrt(total(weighted(factor.to(mean.device), variance))),
        code_entropy=total(weighted(q.gates, q.assignment_entropy)) if isinstance(q, SpikeGMM) else 0.0,
    )


def _bound(q: Distribution, p: Distribution, kind: str) -> Tensor | None:
    """Return each weight's bound, ``[*batch_shape]``, where it is known."""
    try:
        return kl_bound(q, p, kind)
    except NotImplementedError:
        return None


def _certainly_below(dominant: Tensor | None, lower: Tensor | None) -> int:
    """Return how many weights' dominant values are below their lower end by more than rounding."""
    if dominant is None or lower is None:
        return 0
    # float32 rounds to about 1e-7; sums over K and cells add up to less than this.
    return int((dominant < lower - 1e-5 * (1 + lower.abs())).sum())


def _gate_kl(q: Distribution, p: Distribution, like: Tensor) -> Tensor:
    """Return ``KL(Bern(λ)‖Bern(λ₀))`` with ``λ = P(θ ≠ 0)`` under any two distributions with an atom."""
    zero = torch.zeros(q.batch_shape, device=like.device)
    # 1 - P(θ = 0), precise where that is close to 1.
    inclusion = -torch.expm1(p.log_prob(zero))
    gates = q.gates if isinstance(q, SpikeGMM) else -torch.expm1(q.log_prob(zero))
    return gate_divergence(gates, inclusion.to(gates.dtype))


def _estimate(q: Distribution, p: Distribution, num_samples: int) -> tuple[Tensor, Tensor]:
    """Return the Monte Carlo mean of each weight's KL and its variance, ``[*batch_shape]``, float64."""
    # A density of a mixture takes K numbers for each weight.
    floats = q.batch_shape.numel() * getattr(q, "num_components", 1)
    chunk = max(1, min(num_samples, _CHUNK // max(floats, 1)))
    total = squares = torch.zeros(())
    for start in range(0, num_samples, chunk):
        draws = _draws(q, p, min(chunk, num_samples - start)).double()
        total, squares = total + draws.sum(0), squares + draws.square().sum(0)
    mean = total / num_samples
    # Of one sample, divided by n; divided by n - 1 below it is the variance of the mean, without bias.
    spread = (squares / num_samples - mean.square()).clamp_min(0)
    return mean, torch.where(mean.isfinite(), spread / (num_samples - 1), 0.0)


def _draws(q: Distribution, p: Distribution, num_samples: int) -> Tensor:
    """Return independent unbiased estimates, ``[num_samples, *batch_shape]``."""
    # What draws exactly and cannot be reparametrised still has unbiased values, if no gradients.
    if q.has_rsample or not draws_exactly(q):
        return sampled_kl(q, p, num_samples, stratified=False)
    value = q.sample(torch.Size([num_samples]))
    return q.log_prob(value) - p.log_prob(value)
