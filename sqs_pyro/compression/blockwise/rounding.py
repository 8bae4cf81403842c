"""A weight as whole numbers times scales that are fixed beforehand: to nearest, by GPTQ, or in AWQ's last step.

Scales are by the largest weight of an output, or of a group of its inputs: ``s = 2 max |w| / K``, so that the
whole numbers from ``-⌈K/2⌉`` to ``⌊K/2⌋`` reach as far as it does. It is the symmetric grid of GPTQ's code (whose
default is no clipping), and of compressed-tensors. Given the scales, of

    1/2 Σ_i (w_i - s_i n_i)ᵀ H (w_i - s_i n_i)

*round to nearest* takes each n by itself, which is the minimum where H is diagonal. *GPTQ* (Frantar et al. 2023,
Algorithm 1) takes one input after the other, and lets the weights that are left make up for the error of each: the
E-step of :func:`~sqs_pyro.compression.blockwise.sequential_coding.code_sequentially` with equal rates. Its inputs
are ordered by falling curvature, and groups have the scales of the weights as they were (``act-order`` and
``static-groups`` of GPTQ's code). *AWQ* (Lin et al. 2024) rounds to nearest in units of inputs
(:mod:`~sqs_pyro.compression.blockwise.activation_scales`) and clips weights: each scale is the largest one times
1, 0.95, ..., 0.55, whichever loses least of what this group of inputs alone gives.
"""

import torch
from torch import Tensor

from sqs_pyro.compression.blockwise.channel_scales import scale_bits
from sqs_pyro.compression.blockwise.laplace import LayerLikelihood
from sqs_pyro.compression.blockwise.sequential_coding import Coding, code_sequentially
from sqs_pyro.distributions.uniform_grid import grid_numbers
from sqs_pyro.packing import CodedTensor
from sqs_pyro.packing.coded import rounded_scales, scaled

CLIPPED = [1 - i / 20 for i in range(10)]  # shares of the largest weight, of AWQ's code


def rounded_weight(
    own: LayerLikelihood, method: str, num_components: int, group_size: int | None = None
) -> tuple[CodedTensor, dict[str, float]]:
    """Round a weight ``[N, M]``.

    Args:
        own: its likelihood, of a rank's own rows, positive definite; all ranks call this together.
        method: ``"rtn"``, ``"gptq"`` or ``"awq"``.
        num_components: K.
        group_size: inputs that share a scale, in each output; all of them if left out.

    Returns:
        What is packed, and ``bits`` in a file, ``beta`` and ``error`` of it.
    """
    inputs, places = own.mean.shape[1], grid_numbers(num_components)
    of_own = (clipped_scales if method == "awq" else largest_scales)(own, num_components, group_size)
    scales = own.shares.joined(of_own)
    in_units = own.in_units_of(scales)
    if method == "gptq":
        equal = torch.zeros(1 + num_components)
        symbols, _ = code_sequentially(in_units, places.to(own.mean), equal, 0.0)
    else:
        symbols = _symbols(nearest(in_units.target, num_components), int(places[0]))
    parts = scales if scales.dim() == 2 else None
    coding = Coding(own.shares.joined(symbols), places.float(), 0.0, parts)
    hard = coding.coded(scales.cpu())
    error = own.relative_error(hard.dense()[own.shares.own].to(own.mean))
    return hard, {"bits": coding.bits_per_weight + scale_bits(scales, inputs), "beta": 0.0, "error": error}


def largest_scales(own: LayerLikelihood, num_components: int, group_size: int | None = None) -> Tensor:
    """Return ``2 max |w| / K`` of each own row, float16 in float32 ``[n]``, or of groups of inputs, ``[n, B]``.

    Args:
        own: likelihood of the weight.
        num_components: K.
        group_size: M / B; M if left out.
    """
    return _by_row(_scales(_grouped(own.mean, group_size), num_components))


def clipped_scales(own: LayerLikelihood, num_components: int, group_size: int | None = None) -> Tensor:
    """Return the best of a few scales up to the largest, as :func:`largest_scales`; best for its group alone."""
    size = group_size or own.mean.shape[1]
    # [B, M/B, M/B]: curvature among the inputs of a group.
    blocks = torch.stack([own.curvature[b : b + size, b : b + size] for b in range(0, len(own.curvature), size)])
    found = []
    for part in own.shares.parts:  # last bits of a product depend on how many rows it has
        weight = _grouped(own.mean[part], group_size)
        tried, lost = [], []
        for share in CLIPPED:
            scales = _scales(share * weight, num_components)
            units = scales.unsqueeze(2).to(weight)
            difference = (nearest(weight / units, num_components) * units - weight).transpose(0, 1).contiguous()
            lost.append(((difference @ blocks) * difference).sum(2).T)  # [n, B]
            tried.append(scales)
        best = torch.stack(lost).argmin(0, keepdim=True)
        found.append(torch.stack(tried).gather(0, best)[0])
    return _by_row(torch.cat(found)) if found else largest_scales(own, num_components, group_size)


def rounded(own: LayerLikelihood, num_components: int, group_size: int | None = None) -> Tensor:
    """Return the own rows rounded to nearest, ``[n, M]``, arguments as of :func:`largest_scales`."""
    scales = largest_scales(own, num_components, group_size).to(own.mean)
    units = scaled(torch.ones_like(own.mean), scales)
    return nearest(own.mean / units, num_components) * units


def nearest(target: Tensor, num_components: int) -> Tensor:
    """Return the nearest whole numbers of the grid, ``[n, M]``, to weights in units of their scales."""
    return target.round().clamp(-((num_components + 1) // 2), num_components // 2)


def _grouped(weight: Tensor, group_size: int | None) -> Tensor:
    return weight.unflatten(1, (-1, group_size or weight.shape[1]))  # [n, M] -> [n, B, M / B]


def _scales(weight: Tensor, num_components: int) -> Tensor:
    """Return scales of a weight ``[n, B, M / B]``, float16 in float32 ``[n, B]``."""
    largest = weight.abs().amax(2).float()
    # Of weights of zeros alone any scale is as good.
    return rounded_scales(torch.where(largest > 0, 2 * largest / num_components, torch.ones_like(largest)))


def _by_row(scales: Tensor) -> Tensor:
    """Return scales ``[n, B]`` as a weight has them: ``[n]`` of one group."""
    return scales[:, 0] if scales.shape[1] == 1 else scales


def _symbols(numbers: Tensor, lowest: int) -> Tensor:
    """Return symbols of whole numbers, uint8: zero first, then the others, ascending."""
    return torch.where(numbers > 0, numbers - lowest, numbers - lowest + 1).mul_(numbers != 0).to(torch.uint8)
