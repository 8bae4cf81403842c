r"""Scales of a layer's outputs, so that one even grid suits all of them.

High-resolution theory gives the weights of output i a grid of step ``√(12 β v_j / g_i)``
(:func:`~sqs_pyro.compression.blockwise.sequential_coding.grid`): outputs that matter more want a finer one.
A codebook that all share has one step Δ. In units of scales s it loses ``Δ²/24 Σ_i g_i s_i²`` at the entropy of
``round(w / sΔ)``:

* the loss is least, at a given geometric mean of s, with ``s_i ∝ g_i^-½``;
* the entropy of symbols that share one table of frequencies is least with rows of equal spread, ``s_i ∝ σ_i``.

Between no scales, ``g^-¼`` and ``g^-½`` the layer's own weights decide: which takes the fewest bits at equal loss,
the 16 bits of each scale included.
"""

import math

from torch import Tensor

from sqs_pyro.compression.blockwise.bit_budget import rounded_entropy

_POWERS = (0.5, 1.0)  # of g^-½
_STEP = 0.5  # of the grid they are compared on, in root mean squares of the weight: about three bits
_LARGEST = 1024.0  # of a scale, and of its inverse: outputs that never matter would have any
_SAMPLE = 1 << 16  # weights that are looked at
_SCALE_BITS = 16


def channel_scales(weight: Tensor, importance: Tensor) -> Tensor | None:
    """Return scales of a linear layer's outputs, float16 in float32 ``[N]``, or None where they are not worth it.

    Args:
        weight: w, ``[N, M]``.
        importance: g, ``[N]``, not negative.
    """
    # Some inputs of all outputs [N, m], not a flat stride: every row must be there to be scaled.
    sample = weight.detach().float()[:, :: max(1, weight.numel() // _SAMPLE)].cpu()
    g = importance.detach().float().cpu()
    step = _STEP * float(sample.square().mean().sqrt())
    if not step or not float(g.max()):
        return None  # all weights zero, or no output that matters
    least, best = rounded_entropy(sample / step), None
    for power in _POWERS:
        scales = _scales(g, power)
        own_step = step * math.sqrt(float(g.mean() / (g * scales.square()).mean()))  # at equal loss
        bits = rounded_entropy(in_units_of(own_step * scales, sample)) + scale_bits(scales, weight.shape[1])
        if bits < least:
            least, best = bits, scales
    return best


def scale_bits(scales: Tensor | None, inputs: int) -> float:
    """Return what a scale for each output costs, bits for each of its M weights; no scales cost nothing."""
    return 0.0 if scales is None else _SCALE_BITS / inputs


def in_units_of(scales: Tensor | None, weight: Tensor) -> Tensor:
    """Return a weight ``[N, M]`` whose rows are divided by ``scales`` ``[N]``, if there are any."""
    return weight if scales is None else weight / scales.to(weight)[:, None]


def _scales(importance: Tensor, power: float) -> Tensor:
    log = importance.double().clamp(min=1e-300).log()  # of an output that never matters: large, not infinite
    # Geometric mean 1, so that the grid's step keeps its meaning.
    scales = (power * (log.mean() - log) / 2).exp().clamp(1 / _LARGEST, _LARGEST)
    return scales.half().float()  # as the file has them: weights are divided by what they are multiplied with
