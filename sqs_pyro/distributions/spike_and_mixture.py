"""The learned prior: a spike and a mixture of Gaussians, the same components that the guide has."""

from typing import Any

import torch
from torch import Tensor

from sqs_pyro.distributions.assignment import per_weight
from sqs_pyro.distributions.spike_gmm import SpikeGMM


class SpikeAndMixture(SpikeGMM):
    r"""``p(θ) = (1 - ρ) δ₀(θ) + ρ Σₖ πₖ N(θ; μₖ, σₖ²)``: the law of a compressed layer's weights taken together.

    A :class:`SpikeGMM` whose gates and responsibilities are those of a group instead of a weight's own. For a
    guide with the same components the discrete part of the KL is the code length of gates and codes, so
    ``-log(1 - ρ)`` is the price of a zero and ``-log ρ - log πₖ`` that of a weight with code k.

    Shapes: ``event_shape = ()``, ``batch_shape = shape``. Weights belong to groups in row-major order:
    ``weight.view(G, N / G)``. Draws are exact and have no gradient: ``has_rsample`` is False.

    Args:
        inclusion: ρ in [0, 1], broadcastable to ``shape``.
        loc, scale, log_mixing: the components, each ``[G, K]``; ``log_mixing`` normalised over K.
        shape: of the weights; N must be a multiple of G.
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
        shape: Any = torch.Size([1]),
        *,
        validate_args: bool | None = None,
    ) -> None:
        shape = torch.Size(shape)
        if loc.dim() != 2 or not loc.shape == scale.shape == log_mixing.shape or shape.numel() % len(loc):
            raise ValueError(
                f"SpikeAndMixture: loc, scale and log_mixing must all be [G, K] with G dividing the number of "
                f"weights, but got {tuple(loc.shape)}, {tuple(scale.shape)}, {tuple(log_mixing.shape)} for "
                f"weights {tuple(shape)}."
            )
        self.base_inclusion = inclusion
        self.codebook_loc, self.codebook_scale, self.log_mixing = loc, scale, log_mixing
        self.base_shape = shape  # what the groups divide; expand adds dimensions to the left of it
        self._responsibilities = self._logits = None
        self._setup(inclusion, loc, scale, loc.shape[-1], shape, 1.0, "straight_through", validate_args)

    @property
    def inclusion(self) -> Tensor:
        """ρ, ``[*batch_shape]`` (a view of what was given)."""
        return self.gates

    @property
    def num_groups(self) -> int:
        """G."""
        return len(self.codebook_loc)

    @property
    def loc(self) -> Tensor:
        """μ, broadcastable to ``[*batch_shape, K]``."""
        return per_weight(self.codebook_loc, self.base_shape)

    @property
    def scale(self) -> Tensor:
        """σ, broadcastable to ``[*batch_shape, K]``."""
        return per_weight(self.codebook_scale, self.base_shape)

    @property
    def logits(self) -> Tensor:
        """``log πₖ``, broadcastable to ``[*batch_shape, K]``."""
        return per_weight(self.log_mixing, self.base_shape)

    def expand(self, batch_shape: Any, _instance: Any = None) -> "SpikeAndMixture":
        """The same law with ``batch_shape`` enlarged; with one group, dimensions of size 1 may grow too."""
        new = self._get_checked_instance(SpikeAndMixture, _instance)
        batch_shape = torch.Size(batch_shape)
        self.loc.expand(*batch_shape, self.num_components)  # torch's own error for a shape that cannot be reached
        new.base_inclusion = self.base_inclusion
        new.codebook_loc, new.codebook_scale, new.log_mixing = (
            self.codebook_loc,
            self.codebook_scale,
            self.log_mixing,
        )
        new.base_shape = batch_shape if self.num_groups == 1 else self.base_shape
        new._responsibilities = new._logits = None
        new._setup(
            self._gates,
            self.codebook_loc,
            self.codebook_scale,
            self.num_components,
            batch_shape,
            1.0,
            "straight_through",
            False,
        )
        new._validate_args = self._validate_args
        return new
