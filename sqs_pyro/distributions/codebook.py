"""What weights of a group share: a codebook, and the spike-and-mixture whose components it is."""

from typing import NamedTuple

import torch
from torch import Tensor

from sqs_pyro.distributions.spike_gmm import SpikeGMM


class Codebook(NamedTuple):
    """K Gaussian components of each of G groups of weights.

    Attributes:
        loc: μ, ``[G, K]``.
        scale: σ > 0, ``[G, K]``.
        log_mixing: log π, ``[G, K]``, normalised over K.
    """

    loc: Tensor
    scale: Tensor
    log_mixing: Tensor

    @property
    def num_groups(self) -> int:
        """G."""
        return self.loc.shape[0]

    @property
    def num_components(self) -> int:
        """K."""
        return self.loc.shape[-1]


def per_weight(of_groups: Tensor, shape: torch.Size) -> Tensor:
    """Return what groups have, ``[G, K]``, so that it broadcasts to weights ``[*shape, K]``; tiles need copies."""
    if len(of_groups) == 1:
        return of_groups[0]  # [K]
    if len(of_groups) == shape[0]:
        return of_groups.view(shape[0], *[1] * (len(shape) - 1), -1)  # [N, 1.., K]
    per_group = shape.numel() // len(of_groups)
    # A tile may begin anywhere in a row, where no view broadcasts: [G, K] -> [G, t, K] -> [*shape, K].
    return of_groups[:, None, :].expand(-1, per_group, -1).reshape(*shape, -1)


class GroupedMixture(SpikeGMM):
    """A :class:`SpikeGMM` over N weights in G groups, whose components are those of its group's codebook.

    Subclasses say what the responsibilities follow from, by :attr:`logits`.

    Shapes: ``batch_shape = base_shape``, which the groups divide in row-major order, ``weight.view(G, N / G)``;
    ``event_shape = ()``; :meth:`expand` adds dimensions of ``batch_shape`` to the left of it.

    Args:
        gates: λ, broadcastable to ``shape``.
        codebook: components of each group.
        shape: of the weights.
        temperature, estimator, spike_scale, validate_args: see :class:`SpikeGMM`.
    """

    def __init__(
        self,
        gates: Tensor,
        codebook: Codebook,
        shape: torch.Size,
        *,
        temperature: float = 1.0,
        estimator: str = "straight_through",
        spike_scale: Tensor | float | None = None,
        validate_args: bool | None = None,
    ) -> None:
        # Before `_setup`, which checks `loc` and `scale`: both are read from these.
        self.codebook, self.base_shape = codebook, shape
        self._setup(gates, codebook.num_components, shape, temperature, estimator, spike_scale, validate_args)

    @property
    def loc(self) -> Tensor:
        """μ, broadcastable to ``[*batch_shape, K]``."""
        return per_weight(self.codebook.loc, self.base_shape)

    @property
    def scale(self) -> Tensor:
        """σ, broadcastable to ``[*batch_shape, K]``."""
        return per_weight(self.codebook.scale, self.base_shape)

    @property
    def num_groups(self) -> int:
        """G."""
        return self.codebook.num_groups

    def grouped(self, value: Tensor) -> Tensor:
        """Return a tensor ``[*base_shape]`` as ``[G, N / G]``."""
        return value.reshape(self.num_groups, -1)
