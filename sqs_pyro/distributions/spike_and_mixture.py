"""Priors that are a spike and a mixture of Gaussians: the learned one, and DGMS's with a Gaussian spike."""

from collections.abc import Sequence
from typing import Any, Self

import torch
from torch import Tensor

from sqs_pyro.distributions.codebook import Codebook, GroupedMixture, per_weight


class SpikeAndMixture(GroupedMixture):
    r"""``p(θ) = (1 - ρ) δ₀(θ) + ρ Σₖ πₖ N(θ; μₖ, σₖ²)``: the weights of a compressed layer, taken together.

    A :class:`SpikeGMM` whose gates and responsibilities are those of a group instead of a weight's own. For a
    guide with the same components the discrete part of the KL is the code length of gates and codes, so
    ``-log(1 - ρ)`` is the price of a zero and ``-log ρ - log πₖ`` that of a weight with code k.

    Shapes: ``event_shape = ()``, ``batch_shape = shape``. Weights belong to groups in row-major order:
    ``weight.view(G, N / G)``. Draws are exact and have no gradient: ``has_rsample`` is False.

    Args:
        inclusion: ρ in [0, 1], broadcastable to ``shape``.
        loc, scale, log_mixing: the components, each ``[G, K]``; ``log_mixing`` normalised over K.
        shape: of the weights; N must be a multiple of G.
        spike_scale: see :class:`SpikeGMM`; ``None`` is a point mass.
        validate_args: check parameters and values; ``None`` takes torch's default.

    Raises:
        ValueError: when a parameter is outside its domain or the groups do not divide the weights.
    """

    has_rsample = False

    def __init__(
        self,
        inclusion: Tensor,
        loc: Tensor,
        scale: Tensor,
        log_mixing: Tensor,
        shape: Sequence[int] = torch.Size([1]),
        *,
        spike_scale: Tensor | float | None = None,
        validate_args: bool | None = None,
    ) -> None:
        shape = torch.Size(shape)
        if loc.dim() != 2 or not loc.shape == scale.shape == log_mixing.shape or shape.numel() % len(loc):
            raise ValueError(
                f"SpikeAndMixture: loc, scale and log_mixing must all be [G, K] with G dividing the number of "
                f"weights, but got {tuple(loc.shape)}, {tuple(scale.shape)}, {tuple(log_mixing.shape)} for "
                f"weights {tuple(shape)}."
            )
        self.base_inclusion = inclusion  # as given: the KL of gates reads it
        super().__init__(
            inclusion,
            Codebook(loc, scale, log_mixing),
            shape,
            spike_scale=spike_scale,
            validate_args=validate_args,
        )

    @property
    def inclusion(self) -> Tensor:
        """ρ, ``[*batch_shape]`` (a view of what was given)."""
        return self.gates

    @property
    def logits(self) -> Tensor:
        """``log πₖ``, broadcastable to ``[*batch_shape, K]``."""
        return per_weight(self.codebook.log_mixing, self.base_shape)

    def expand(self, batch_shape: Sequence[int], _instance: Any = None) -> Self:
        """Expand as every :class:`SpikeGMM`; with one group, dimensions of size 1 may grow too."""
        new = super().expand(batch_shape)
        self.loc.expand(*new.batch_shape, self.num_components)  # torch's own error: groups cannot be stretched
        if new is not self and self.num_groups == 1:
            new.base_shape = new.batch_shape
        return new


class GaussianSpikeAndSlab(SpikeAndMixture):
    r"""``p(θ) = (1 - λ₀) N(θ; 0, s²) + λ₀ N(θ; 0, σ₀²)``: weights are near zero, but none is exactly.

    The zero component of DGMS (Dong et al. 2022, *Finding the Task-Optimal Low-Bit Sub-Distribution in Deep Neural
    Networks*) as a prior. A density; the guide's spike is then a Gaussian as well (``spike_scale``).

    Shapes: ``batch_shape = inclusion.shape``, ``event_shape = ()``.

    Args:
        inclusion: λ₀ in [0, 1].
        spike_scale: s > 0, a number.
        slab_scale: σ₀ > 0, a number.
        validate_args: check parameters and values; ``None`` takes torch's default.

    Raises:
        ValueError: when a parameter is outside its domain.
    """

    def __init__(
        self,
        inclusion: Tensor,
        spike_scale: Tensor | float,
        slab_scale: Tensor | float,
        *,
        validate_args: bool | None = None,
    ) -> None:
        scale = torch.as_tensor(slab_scale, dtype=inclusion.dtype, device=inclusion.device).reshape(1, 1)
        # [G, K] = [1, 1]; 0 is the mean, and log π of the only component.
        zero = torch.zeros_like(scale)
        super().__init__(
            inclusion, zero, scale, zero, inclusion.shape, spike_scale=spike_scale, validate_args=validate_args
        )
