r"""Scales of a layer's outputs, so that one even grid suits all of them.

High-resolution theory gives the weights of output i a grid of step ``√(12 β v_j / g_i)``
(:func:`~sqs_pyro.compression.blockwise.codebooks.grid`): outputs that matter more want a finer one.
A codebook that all share has one step Δ. In units of scales s it loses ``Δ²/24 Σ_i g_i s_i²`` at the entropy of
``round(w / sΔ)``:

* the loss is least, at a given geometric mean of s, with ``s_i ∝ g_i^-½``;
* the entropy of symbols that share one table of frequencies is least with rows of equal spread, ``s_i ∝ σ_i``.

Between no scales, ``g^-¼`` and ``g^-½`` the layer's own weights decide: which takes the fewest bits at equal loss,
the 16 bits of each scale included. Rows of an embedding differ in size, too: of those ``σ`` and what is between
the two optima, ``g^-¼ σ^½``, are tried as well.
"""

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from sqs_pyro.compression.blockwise.bit_budget import rounded_entropy
from sqs_pyro.errors import RecipeError

_POWERS = ((0.5, 0.0), (1.0, 0.0))  # of g^-½, and of σ
_WITH_SIZES = (*_POWERS, (0.0, 1.0), (0.5, 0.5))
_STEP = 0.5  # of the grid they are compared on, in root mean squares of the weight: about three bits
_LARGEST = 1024.0  # of a scale, and of its inverse: outputs that never matter would have any
_SAMPLE = 1 << 16  # weights that are looked at
_SCALE_BITS = 16


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


def scale_bits(scales: Tensor | None, inputs: int) -> float:
    """Return what a scale for each output costs, bits for each of its M weights; no scales cost nothing."""
    return 0.0 if scales is None else _SCALE_BITS / inputs


def check_room_for_scales(inputs: Mapping[str, int], bits: Mapping[str, float | None]) -> None:
    """Check that layers whose outputs need scales have bits left for their weights.

    Args:
        inputs: of each layer.
        bits: a weight of each layer, scales included; None where they are not fixed beforehand.

    Raises:
        RecipeError: the first layer that has not.
    """
    for name, each in inputs.items():
        given, taken = bits[name], _SCALE_BITS / each
        if given is not None and given <= taken:
            raise RecipeError(
                f"With blockwise.grid 'uniform' the scales of layer '{name}' take {taken:.3g} bits a weight, as "
                f"it has {each} inputs, but {given:.3g} are asked for: ask for more, skip it in blockwise.layers, "
                "or take grid 'free'."
            )


def in_units_of(scales: Tensor | None, weight: Tensor) -> Tensor:
    """Return a weight ``[N, M]`` whose rows are divided by ``scales`` ``[N]``, if there are any."""
    return weight if scales is None else weight / scales.to(weight)[:, None]


def _scales(importance: Tensor, sizes: Tensor, power: float, size_power: float) -> Tensor:
    # Of an output that never matters, and of a row of zeros: large and small, not infinite and 0.
    log_g, log_size = (value.double().clamp(min=1e-300).log() for value in (importance, sizes))
    log = size_power * log_size - power * log_g / 2
    # Geometric mean 1, so that the grid's step keeps its meaning.
    scales = (log - log.mean()).exp().clamp(1 / _LARGEST, _LARGEST)
    return scales.half().float()  # as the file has them: weights are divided by what they are multiplied with
