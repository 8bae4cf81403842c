"""Soft and hard assignment of weights to the components of a codebook, without keeping an N x K tensor.

Weights come in G groups of n, codebooks as ``[G, K]``; tensors over components and weights are ``[K, G, n]``:
a softmax over the first dimension is many times faster than one over a short last dimension. Responsibilities
are cheap to recompute and large to keep, so backward passes here recompute them.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from sqs_pyro.distributions.codebook import Codebook

#: exp(-50) = 2e-22 is nothing beside the largest responsibility, but not denormal, even times a small gradient:
#: arithmetic on denormal numbers takes ten times as long.
_NEGLIGIBLE = -50.0


def assignment_logits(latent: Tensor, codebook: Codebook) -> Tensor:
    """Return ``log π_k + log N(w; μ_k, σ_k²)`` up to a constant, ``[K, G, n]``, of latents ``[G, n]``.

    It is what the temperature is to divide.
    """
    loc, scale, log_mixing = codebook
    z = (latent - _over_weights(loc)) / _over_weights(scale)
    return _over_weights(log_mixing - scale.log()) - 0.5 * z**2


@torch.no_grad()
def map_codes(latent: Tensor, codebook: Codebook) -> Tensor:
    """Return each weight's most probable component, ``argmax_k φ_k``, uint8 ``[G, n]``; ties take the first."""
    logits = _scaled_logits(latent, codebook, 1.0)
    # K for the first component down to 1 for the last: the largest among the best ones is the first of them.
    from_last = torch.arange(len(logits), 0, -1, dtype=torch.int16, device=latent.device)
    is_best = (logits == logits.amax(0)).to(torch.int16)
    highest = is_best.mul_(from_last[:, None, None]).amax(0)  # several times faster than argmax over K
    return highest.neg_().add_(len(logits)).to(torch.uint8)


class HardValue(torch.autograd.Function):
    """``1[λ > ½] μ_code`` forward; backward the straight-through estimator.

    The gradient reaches the latent weights of survivors unchanged, the means by summation over the weights
    that use them (which is exact), and the gates through ``λ μ_code``.
    """

    @staticmethod
    def forward(ctx: Any, latent: Tensor, gates: Tensor, loc: Tensor, codes: Tensor) -> Tensor:
        """Args: latent, gates ``[G, n]``; loc ``[G, K]``; codes uint8 ``[G, n]``. Returns ``[G, n]``."""
        keep = gates > 0.5
        # Two bytes a weight: neither gates nor values are kept.
        ctx.save_for_backward(loc, codes, keep)
        return _look_up(loc, codes).mul_(keep)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        """Return gradients of latent, gates and loc."""
        (grad,) = grads
        loc, codes, keep = ctx.saved_tensors
        kept = grad * keep  # [G, n]: the latents', as it is
        # Of closed gates, too: their gradient is what could open them again.
        grad_gates = grad * _look_up(loc, codes) if ctx.needs_input_grad[1] else None
        grad_loc = _sum_by_code(kept, codes, loc) if ctx.needs_input_grad[2] else None
        return kept, grad_gates, grad_loc, None


class ExpectedDivergence(torch.autograd.Function):
    """``Σ_k φ_k κ_k`` of each weight, less ``H(φ)`` if asked for; responsibilities are recomputed in backward.

    With κ of the components it is Jensen's bound on the slab's KL; with ``κ_k = -log π_k``, less the entropy,
    it is ``KL(φ‖π)``.
    """

    @staticmethod
    def forward(
        ctx: Any,
        latent: Tensor,
        loc: Tensor,
        scale: Tensor,
        log_mixing: Tensor,
        divergence: Tensor,
        temperature: float,
        less_entropy: bool = False,
    ) -> Tensor:
        """Args: latent ``[G, n]``; loc, scale, log_mixing, divergence κ ``[G, K]``. Returns ``[G, n]``."""
        phi = _soft_assignment(latent, Codebook(loc, scale, log_mixing), temperature)  # [K, G, n]
        expected = (phi * _with_log(phi, _over_weights(divergence), less_entropy)).sum(0)
        # Nothing of size K N; `expected` spares the backward pass one of its sums.
        ctx.save_for_backward(latent, loc, scale, log_mixing, divergence, expected)
        ctx.temperature, ctx.less_entropy = temperature, less_entropy
        return expected

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        """Return gradients by ``∂/∂logit_k = φ_k (κ_k - Σ_j φ_j κ_j) / τ`` and the chain rule through the logits.

        Less the entropy, ``κ_k + log φ_k`` takes the place of ``κ_k``: the logarithm's own derivative sums to 0.
        """
        (grad,) = grads
        latent, loc, scale, log_mixing, divergence, expected = ctx.saved_tensors
        phi = _soft_assignment(latent, Codebook(loc, scale, log_mixing), ctx.temperature)
        excess = (_with_log(phi, _over_weights(divergence), ctx.less_entropy) - expected).div_(ctx.temperature)
        # In place from here on: at most three tensors [K, G, n] are there at once.
        phi *= grad
        grad_divergence = phi.sum(-1).T  # [K, G] -> [G, K]
        grad_logits = phi.mul_(excess)
        grad_log_mixing = grad_logits.sum(-1).T
        z = (latent - _over_weights(loc)).mul_(_over_weights(scale.reciprocal()))
        first = grad_logits.mul_(z)  # ∂logit/∂w = -z/σ, ∂logit/∂μ = z/σ
        grad_loc = first.sum(-1).T / scale
        grad_latent = -(first * _over_weights(scale.reciprocal())).sum(0)
        grad_scale = (first.mul_(z).sum(-1).T - grad_log_mixing) / scale  # ∂logit/∂σ = (z² - 1)/σ
        return grad_latent, grad_loc, grad_scale, grad_log_mixing, grad_divergence, None, None


class LogSumDivergence(torch.autograd.Function):
    """``-log Σ_k π_k exp(-KL(N(w, s²)‖N(μ_k, σ_k²)))`` of each weight, its K terms recomputed in backward."""

    @staticmethod
    def forward(ctx: Any, latent: Tensor, width: Tensor, loc: Tensor, scale: Tensor, log_mixing: Tensor) -> Tensor:
        """Args: latent w, width s ``[G, n]``; loc, scale, log_mixing ``[G, K]``. Returns ``[G, n]``."""
        ctx.save_for_backward(latent, width, loc, scale, log_mixing)
        # KL(N(w, s²)‖N(μ, σ²)) = log σ/s + (s² + (w - μ)²) / (2 σ²) - ½: what has no k in it stands outside of the
        # sum.
        return -width.log() - 0.5 - _blurred_logits(latent, width, Codebook(loc, scale, log_mixing)).logsumexp(0)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        """Return gradients by ``∂/∂logit_k = -φ_k`` with φ the softmax of the logits."""
        (grad,) = grads
        latent, width, loc, scale, log_mixing = ctx.saved_tensors
        logits = _blurred_logits(latent, width, Codebook(loc, scale, log_mixing))
        weight = logits.softmax(0).mul_(-grad)  # ∂/∂logit_k, [K, G, n]
        grad_log_mixing = weight.sum(-1).T
        precise = weight.mul_(_over_weights(scale**-2))
        distance = latent - _over_weights(loc)
        grad_latent = -(precise * distance).sum(0)
        grad_width = -grad / width - width * precise.sum(0)
        grad_loc = (precise * distance).sum(-1).T
        grad_scale = (precise * distance.square_().add_(width**2)).sum(-1).T / scale - grad_log_mixing / scale
        return grad_latent, grad_width, grad_loc, grad_scale, grad_log_mixing


def _blurred_logits(latent: Tensor, width: Tensor, codebook: Codebook) -> Tensor:
    """Return ``log π_k - log σ_k - (s² + (w - μ_k)²) / (2 σ_k²)``, ``[K, G, n]``."""
    loc, scale, log_mixing = codebook
    squares = (latent - _over_weights(loc)).square_().add_(width**2).mul_(_over_weights(-0.5 * scale**-2))
    return squares.add_(_over_weights(log_mixing - scale.log()))


def _with_log(phi: Tensor, divergence: Tensor, less_entropy: bool) -> Tensor:
    """Return ``κ_k``, or ``κ_k + log φ_k``; φ is nowhere so small that its logarithm is not finite."""
    return phi.log().add_(divergence) if less_entropy else divergence


def _over_weights(codebook: Tensor) -> Tensor:
    """Return ``[G, K]`` as ``[K, G, 1]``."""
    return codebook.T.unsqueeze(-1)  # a view


def _look_up(loc: Tensor, codes: Tensor) -> Tensor:
    """Return ``loc[g, codes[g, i]]``, ``[G, n]``; index_select on a flat table is the fastest form."""
    return loc.flatten().index_select(0, _flat_index(codes, loc.shape[1])).view(codes.shape)


def _sum_by_code(values: Tensor, codes: Tensor, loc: Tensor) -> Tensor:
    # bincount takes the int32 indices, scatter_add would need int64.
    sums = torch.bincount(_flat_index(codes, loc.shape[1]), weights=values.flatten(), minlength=loc.numel())
    return sums.to(loc.dtype).view_as(loc)


def _flat_index(codes: Tensor, num_components: int) -> Tensor:
    index = codes.to(torch.int32)
    if len(codes) > 1:
        # Code k of group g is entry g K + k of the flat table; int32 is enough, and half the memory of int64.
        index += num_components * torch.arange(len(codes), dtype=torch.int32, device=codes.device)[:, None]
    return index.flatten()


def _scaled_logits(latent: Tensor, codebook: Codebook, temperature: float) -> Tensor:
    """Return ``assignment_logits / τ`` outside autograd: one allocation, τ and ½ folded into the codebook."""
    loc, scale, log_mixing = codebook
    # (w - μ)² / (2 τ σ²) = ((w - μ) / (σ √(2τ)))²
    z = (latent - _over_weights(loc)).mul_(_over_weights((scale * (2 * temperature) ** 0.5).reciprocal()))
    return torch.sub(_over_weights((log_mixing - scale.log()) / temperature), z.square_(), out=z)


def _soft_assignment(latent: Tensor, codebook: Codebook, temperature: float) -> Tensor:
    """Return φ, ``[K, G, n]``, outside autograd: one allocation."""
    logits = _scaled_logits(latent, codebook, temperature)
    # The largest becomes 1, so that nothing overflows and the sum below is at least 1.
    phi = logits.sub_(logits.amax(0)).clamp_min_(_NEGLIGIBLE).exp_()
    return phi.div_(phi.sum(0))
