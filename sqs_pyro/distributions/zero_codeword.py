"""Codebooks whose first codeword is zero: weights fall to it and leave it again, and no gate says which are zero.

The spike of such a mixture is a Gaussian around zero like any other component, so that responsibilities alone
decide: DGMS (Dong et al. 2022, "Finding the task-optimal low-bit sub-distribution in deep neural networks") is
soft responsibilities of it, LSQ (Esser et al. 2020) the nearest of even steps, TTQ (Zhu et al. 2017) of three.
"""

from typing import Any

import torch
from torch import Tensor
from torch.distributions import constraints
from torch.distributions.constraint_registry import biject_to, transform_to
from torch.distributions.transforms import Transform
from torch.nn.functional import pad

from sqs_pyro.distributions.kmeans import Clustering, kmeans_1d
from sqs_pyro.distributions.uniform_grid import grid_numbers

_LEAST = 1e-12  # of a step or width


class ZeroFirst(constraints.Constraint):
    """Codebooks ``[..., 1 + K]``: zero, then K codewords of a form of their own.

    Args:
        others: constraint of these, ``[..., K]``.
    """

    event_dim = 1

    def __init__(self, others: constraints.Constraint) -> None:
        self.others = others
        super().__init__()

    def check(self, value: Tensor) -> Tensor:
        """Return whether codebooks are of the form, ``[...]``."""
        return (value[..., 0] == 0) & self.others.check(value[..., 1:])


class _ZeroFirstTransform(Transform):
    """From what the K others are made of to ``0, μ_1, ..., μ_K``."""

    domain = constraints.independent(constraints.real, 1)
    bijective = True

    def __init__(self, others: constraints.Constraint) -> None:
        super().__init__()
        self.others = others
        self._inner = transform_to(others)

    @property
    def codomain(self) -> constraints.Constraint:  # type: ignore[override]
        """Return the form."""
        return ZeroFirst(self.others)

    def _call(self, x: Tensor) -> Tensor:
        return pad(self._inner(x), (1, 0))

    def _inverse(self, y: Tensor) -> Tensor:
        return self._inner.inv(y[..., 1:])

    def forward_shape(self, shape: Any) -> Any:
        """Return the shape of codebooks."""
        inner = self._inner.forward_shape(shape)
        return (*inner[:-1], inner[-1] + 1)

    def inverse_shape(self, shape: Any) -> Any:
        """Return the shape of what they are made of."""
        return self._inner.inverse_shape((*shape[:-1], shape[-1] - 1))


@transform_to.register(ZeroFirst)
@biject_to.register(ZeroFirst)
def _of_others(constraint: ZeroFirst) -> _ZeroFirstTransform:
    return _ZeroFirstTransform(constraint.others)


def kmeans_with_zero(values: Tensor, num_components: int, weights: Tensor | None = None) -> Clustering:
    """Cluster each row by K-means of K + 1 means, and move the one nearest to zero there, as DGMS begins.

    Args:
        values: ``[G, n]``.
        num_components: K, codewords beside zero.
        weights: of the values, ``[G, n]``.

    Returns:
        Clusters ``[G, 1 + K]``, that of zero first.
    """
    found = kmeans_1d(values, num_components + 1, weights)
    nearest = found.loc.abs().argmin(1, keepdim=True)
    # Others keep their order; sorting a bool is stable.
    order = (torch.arange(num_components + 1, device=values.device) != nearest).int().argsort(dim=1, stable=True)
    loc, scale, mixing = (column.gather(1, order) for column in (found.loc, found.scale, found.mixing))
    loc[:, 0] = 0.0
    return Clustering(loc, scale, mixing, found.inertia)


def lsq_codebook(values: Tensor, num_components: int, weights: Tensor | None = None) -> Clustering:
    """Return zero and whole numbers of LSQ's first step, ``2 mean|w| / √Q_P``, equally wide and probable.

    So the most probable codeword is the nearest. Arguments and shapes as of :func:`kmeans_with_zero`.
    """
    mass = torch.ones_like(values) if weights is None else weights.to(values)
    numbers = pad(grid_numbers(num_components), (1, 0)).to(values)
    mean = (mass * values.abs()).sum(1, keepdim=True) / mass.sum(1, keepdim=True).clamp(min=_LEAST)
    step = (2 * mean / numbers[-1].clamp(min=1).sqrt()).clamp(min=_LEAST)  # [G, 1]
    loc = step * numbers
    inertia = (mass[..., None] * (values[..., None] - loc[:, None]).square()).amin(-1).sum(1)
    width = step / 12**0.5  # of what is rounded away, were it uniform
    return Clustering(loc, width.expand_as(loc).clone(), torch.full_like(loc, 1 / loc.shape[1]), inertia)


def ternary_codebook(values: Tensor, share: float, weights: Tensor | None = None) -> Clustering:
    """Return zero, ``-w_n`` and ``w_p``: of each sign the mean of the weights that :func:`ternary_codes` keeps.

    Args:
        values: ``[G, n]``.
        share: t of the threshold.
        weights: of the values, ``[G, n]``; 0 leaves one out.
    """
    mass = torch.ones_like(values) if weights is None else weights.to(values)
    codes = ternary_codes(values, share)
    of_code = mass[None] * (codes[None] == torch.arange(3, device=values.device)[:, None, None])  # [3, G, n]
    count = of_code.sum(-1).T  # [G, 3]
    size = (mass * values.abs()).sum(1, keepdim=True) / mass.sum(1, keepdim=True).clamp(min=_LEAST)
    # A sign that no weight has keeps a codeword that it may have later.
    fallback = size * torch.tensor([0.0, -1.0, 1.0]).to(values)
    loc = torch.where(count > 0, (of_code * values).sum(-1).T / count.clamp(min=_LEAST), fallback)
    loc[:, 0] = 0.0
    inertia = (mass * (values - loc.gather(1, codes.long())).square()).sum(1, keepdim=True)
    width = (inertia / mass.sum(1, keepdim=True).clamp(min=_LEAST)).sqrt().clamp(min=_LEAST).maximum(1e-3 * size)
    mixing = (count + 0.5) / (count + 0.5).sum(1, keepdim=True)
    return Clustering(loc, width.clamp(min=_LEAST).expand_as(loc).clone(), mixing, inertia[:, 0])


@torch.no_grad()
def ternary_codes(latent: Tensor, share: float) -> Tensor:
    """Return TTQ's codes, uint8 ``[G, n]``: 0 where ``|w| <= t max|w|`` of the group, else 1 below it, 2 above.

    Args:
        latent: w, ``[G, n]``.
        share: t.
    """
    limit = share * latent.abs().amax(1, keepdim=True)
    return (latent > limit).to(torch.uint8) * 2 + (latent < -limit).to(torch.uint8)


# ---- hard values whose gradients are others' than the identity; the arguments are those of `HardValue` ----


def ttq_value(latent: Tensor, gates: Tensor, loc: Tensor, codes: Tensor) -> Tensor:
    """Return ``μ_code``, ``[G, n]``; its gradient goes to latents times ``|μ_code|``, to those at zero as it is.

    Codewords have the sum over the weights that use them (Zhu et al. 2017, equations 7 and 8).
    """
    value = loc.gather(1, codes.long())
    scale = torch.where(codes == 0, 1.0, value.detach().abs())
    return value + scale * (latent - latent.detach())


def lsq_value(latent: Tensor, gates: Tensor, loc: Tensor, codes: Tensor) -> Tensor:
    """Return ``s round(clip(w / s))``, ``[G, n]``, with the gradients of Esser et al. 2020, equations 3 to 5.

    Rounding passes gradients as they are: the step has ``round(w/s) - w/s`` inside of the range and its end
    outside, times ``1 / √(n Q_P)``, latents have 1 inside and 0 outside.
    """
    numbers = grid_numbers(loc.shape[1] - 1)
    low, high = float(numbers[0]), max(float(numbers[-1]), 1.0)
    step = loc[:, -1:] / float(numbers[-1])
    share = (latent.shape[1] * high) ** -0.5
    step = step.detach() + share * (step - step.detach())
    places = (latent / step).clamp(low, float(numbers[-1]))
    return step * (places + (places.round() - places).detach())
