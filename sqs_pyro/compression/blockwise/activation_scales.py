r"""Scales of a layer's inputs by the sizes of activations: the change of units of AWQ (Lin et al. 2024).

A weight in units of scales s of its inputs, ``W diag(s)``, is rounded, and inputs come divided by s: the same
outputs but for the rounding, whose errors in inputs of large s are smaller. All layers that read an input share

    s_j = a_j^α / √(max_k a_k^α min_k a_k^α),    a_j the mean of |x_j|,

with the α out of 0, 1/20, ..., 19/20 at which the layers' outputs lose least (the paper's equations 4 and 5)

    1/2 Σ_layers tr (Q(W diag s) diag(s)⁻¹ - W) H (Q(W diag s) diag(s)⁻¹ - W)ᵀ,    H = Σ x xᵀ,

over inputs x of the original network. Dividing x by s costs nothing where what gives it, a norm or a linear layer,
takes the division into its own weight.
"""

import itertools
from collections.abc import Iterable
from dataclasses import replace

import torch
from torch import Tensor, nn

from sqs_pyro.compression.blockwise.laplace import LayerLikelihood, added
from sqs_pyro.compression.blockwise.rounding import rounded
from sqs_pyro.compression.blockwise.shares import Shares

TRIED = 20  # α
_LEAST = 1e-4  # of a scale before they are divided


def activation_moments(inputs: Iterable[Tensor], shares: Shares) -> tuple[Tensor, Tensor]:
    """Return the mean of |x|, ``[M]``, and ``Σ x xᵀ``, ``[M, M]``.

    Args:
        inputs: x, ``[..., M]``, of this rank's minibatches.
        shares: which these are; all ranks call this together.
    """
    left = iter(inputs)

    def moments(x: Tensor) -> list[Tensor]:
        with torch.autocast(x.device.type, enabled=False):
            x = x.reshape(-1, x.shape[-1]).float()
            return [x.abs().sum(0), x.T @ x, x.new_tensor(len(x))]

    sizes, moment, count = shares.sums(
        lambda part: added(map(moments, itertools.islice(left, part.stop - part.start)))
    )
    return sizes / count, moment


def input_scales(
    sizes: Tensor, layers: Iterable[tuple[LayerLikelihood, int]], group_size: int | None = None
) -> Tensor:
    """Return the best scales of the inputs of some layers, ``[M]``; all ranks call this together.

    Args:
        sizes: mean of |x|, ``[M]``.
        layers: the likelihood of a rank's own rows of each layer, with the same H in all, and its K.
        group_size: inputs that share a scale of rounding; all of an output's if left out.
    """
    every = list(layers)

    def lost(scales: Tensor) -> float:
        return sum(
            own.excess(rounded(replace(own, mean=own.mean * scales), num_components, group_size) / scales)
            for own, num_components in every
        )

    return min((scales_at(sizes, i / TRIED) for i in range(TRIED)), key=lost)


def scales_at(sizes: Tensor, alpha: float) -> Tensor:
    """Return the scales of an α, ``[M]``."""
    scales = sizes.pow(alpha).clamp(min=_LEAST)
    return scales / (scales.max() * scales.min()).sqrt()


@torch.no_grad()
def fold(scales: Tensor, before: nn.Module, layers: Iterable[nn.Module]) -> None:
    """Divide what ``before`` gives by scales ``[M]``, and multiply the inputs of layers by them, in place.

    Args:
        scales: of M inputs.
        before: a norm or a linear layer of M outputs, all of whose parameters have a row for each of them.
        layers: linear, all that read what it gives.
    """
    for value in before.parameters(recurse=False):
        value.div_(scales.view(-1, *[1] * (value.dim() - 1)))
    for layer in layers:
        layer.get_parameter("weight").mul_(scales)
