r"""Scales of a layer's outputs, or of groups of their inputs, so that one codebook suits all of them.

High-resolution theory gives the weights of output i a grid of step ``√(12 β v_j / g_i)``
(:func:`~sqs_pyro.compression.blockwise.first_codewords.grid`): outputs that matter more want a finer one.
A codebook that all share has one step Δ. In units of scales s it loses ``Δ²/24 Σ_i g_i s_i²`` at the entropy of
``round(w / sΔ)``:

* the loss is least, at a given geometric mean of s, with ``s_i ∝ g_i^-½``;
* the entropy of symbols that share one table of frequencies is least with rows of equal spread, ``s_i ∝ σ_i``.

Between no scales, ``g^-¼`` and ``g^-½`` the layer's own weights decide: which takes the fewest bits at equal loss,
the 16 bits of each scale included. Rows of an embedding differ in size, too: of those ``σ`` and what is between
the two optima, ``g^-¼ σ^½``, are tried as well.

All this is of grids with values enough. Where they are few, the codebook is the best for the distribution of what
it codes, and loses the same share of ``σ²`` whatever g is: weights in units of their size, ``s ∝ σ``, are as
alike as they can be, of an output (:func:`scales_of_few`) or of a few inputs of it (:func:`size_scales`). An error
counts by the precision ``1 / v_j`` of its input; so does a weight in the mean of squares ``σ²``.
"""

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from sqs_pyro.compression.blockwise.bit_budget import rounded_entropy
from sqs_pyro.distributions.kmeans import kmeans_1d
from sqs_pyro.errors import RecipeError
from sqs_pyro.packing.layouts import SCALE_BYTES

_POWERS = ((0.5, 0.0), (1.0, 0.0))  # of g^-½, and of σ
_WITH_SIZES = (*_POWERS, (0.0, 1.0), (0.5, 0.5))
_STEP = 0.5  # of the grid they are compared on, in root mean squares of the weight: about three bits
_LARGEST = 1024.0  # of a scale, and of its inverse: outputs that never matter would have any
_SAMPLE = 1 << 16  # weights that are looked at
_CLUSTERED = 1 << 13  # weights whose best few values are found
_SCALE_BITS = 8 * SCALE_BYTES


def channel_scales(weight: Tensor, importance: Tensor, *, by_size: bool = False) -> Tensor | None:
    """Return scales of a linear layer's outputs, float16 in float32 ``[N]``, or None where they are not worth it.

    Args:
        weight: w, ``[N, M]``.
        importance: g, ``[N]``, not negative.
        by_size: whether scales by the root mean square of each row are tried, too.
    """
    # Some inputs of all outputs [N, m], not a flat stride: every row must be there to be scaled.
    sample = weight.detach().float()[:, :: max(1, weight.numel() // _SAMPLE)].cpu()
    g = importance.detach().float().cpu()
    step = _STEP * float(sample.square().mean().sqrt())
    if not step or not float(g.max()):
        return None  # all weights zero, or no output that matters
    least, best = rounded_entropy(sample / step), None
    # Of the whole row: the sample may have two of its weights.
    sizes = weight.detach().float().square().mean(1).sqrt().cpu() if by_size else torch.ones_like(g)
    for power, size_power in _WITH_SIZES if by_size else _POWERS:
        scales = _scales(g, sizes, power, size_power)
        own_step = step * math.sqrt(float(g.mean() / (g * scales.square()).mean()))  # at equal loss
        bits = rounded_entropy(in_units_of(own_step * scales, sample)) + scale_bits(scales, weight.shape[1])
        if bits < least:
            least, best = bits, scales
    return best


def scales_of_few(
    weight: Tensor, importance: Tensor, max_components: int, precisions: Tensor | None = None
) -> Tensor | None:
    """Return :func:`size_scales` where K values lose so much less with them that they are worth their bits.

    Args:
        weight: w, ``[N, M]``.
        importance: g, ``[N]``, not negative.
        max_components: K, values beside zero.
        precisions: ``1 / v``, ``[M]``; all alike if left out.
    """
    columns = slice(None, None, max(1, weight.numel() // _SAMPLE))
    sample = weight.detach().float()[:, columns].cpu()
    each = torch.ones(weight.shape[1]) if precisions is None else precisions.float().cpu()
    cost = importance.detach().float().cpu()[:, None] * each[columns]
    if not float((cost * sample.square()).sum()):
        return None  # all weights zero, or none that matters
    scales = size_scales(weight, precisions=precisions)

    def lost(scales: Tensor) -> float:
        in_units = sample / scales[:, None]
        values, mass = in_units.reshape(1, -1), (cost * scales[:, None].square()).reshape(1, -1)
        some = slice(None, None, max(1, values.shape[1] // _CLUSTERED))
        few = min(max_components, values[:, some].shape[1])
        clusters = kmeans_1d(values[:, some], few, mass[:, some]).loc[0]
        points = torch.cat([clusters.new_zeros(1), clusters]).sort().values
        nearest = points[torch.bucketize(values[0], 0.5 * (points[1:] + points[:-1]))]
        return float((mass[0] * (values[0] - nearest).square()).sum())

    without, left = lost(torch.ones_like(scales)), lost(scales)
    # A quarter of the error is a bit.
    worth = without > left * 4 ** scale_bits(scales, weight.shape[1])
    return scales if worth else None


def size_scales(weight: Tensor, parts: int = 1, precisions: Tensor | None = None) -> Tensor:
    """Return scales by the root mean square of each output's weights, float16 in float32 ``[N]``.

    Args:
        weight: w, ``[N, M]``.
        parts: B, of an output's inputs, which have scales of their own; more than one give ``[N, B]``.
        precisions: ``1 / v``, ``[M]``, by which weights count; all alike if left out.
    """
    each = torch.ones(weight.shape[1], dtype=torch.float64) if precisions is None else precisions.double().cpu()
    each = each.view(1, parts, -1)
    squares = weight.detach().double().cpu().unflatten(1, (parts, -1)).square()
    sizes = ((each * squares).sum(-1) / each.sum(-1)).sqrt()
    # Of weights of zeros alone any scale is as good.
    scales = _rounded(sizes.clamp(min=1e-300).log())
    return scales[:, 0] if parts == 1 else scales


def scale_bits(scales: Tensor | None, inputs: int) -> float:
    """Return what the scales of each output cost, bits for each of its M weights; none cost nothing."""
    return 0.0 if scales is None else _SCALE_BITS * scales[0].numel() / inputs


def check_room_for_scales(
    inputs: Mapping[str, int], bits: Mapping[str, float | None], group_size: int | None = None
) -> None:
    """Check that layers whose outputs, or groups of inputs, need scales have bits left for their weights.

    Args:
        inputs: of each layer.
        group_size: inputs that share a scale; all of an output's if left out.
        bits: a weight of each layer, scales included; None where they are not fixed beforehand.

    Raises:
        RecipeError: the first layer that has not.
    """
    for name, each in inputs.items():
        if group_size is not None and each % group_size:
            raise RecipeError(
                f"blockwise.group_size {group_size} does not divide the {each} inputs of layer '{name}': take a "
                f"multiple of 32 that divides those of all layers, or skip this one in blockwise.layers."
            )
        given, taken = bits[name], _SCALE_BITS / (group_size or each)
        if given is not None and given <= taken:
            key, repair = (
                ("grid 'uniform'", "take grid 'free'")
                if group_size is None
                else (f"group_size {group_size}", "take larger groups")
            )
            raise RecipeError(
                f"With blockwise.{key} the scales of layer '{name}' take {taken:.3g} bits a weight, as it has "
                f"{each} inputs, but {given:.3g} are asked for: ask for more, skip it in blockwise.layers, or "
                f"{repair}."
            )


def in_units_of(scales: Tensor | None, weight: Tensor) -> Tensor:
    """Return a weight ``[N, M]`` divided by ``scales``, if any: ``[N]``, or ``[N, B]`` of equal parts."""
    if scales is None:
        return weight
    return (weight.reshape(*scales.shape, -1) / scales.to(weight).unsqueeze(-1)).view(weight.shape)


def _scales(importance: Tensor, sizes: Tensor, power: float, size_power: float) -> Tensor:
    # Of an output that never matters, and of a row of zeros: large and small, not infinite and 0.
    log_g, log_size = (value.double().clamp(min=1e-300).log() for value in (importance, sizes))
    return _rounded(size_power * log_size - power * log_g / 2)


def _rounded(log: Tensor) -> Tensor:
    """Return scales of these logarithms as a file has them: what divides weights is what multiplies them."""
    # Geometric mean 1, so that the grid's step keeps its meaning.
    return (log - log.mean()).exp().clamp(1 / _LARGEST, _LARGEST).half().float()
