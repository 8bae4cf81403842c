"""The entropy coder: weights a second on one core, and how far its bytes are from the ideal code length.

Weights are Gaussian, the smallest are zero, the others take the nearest of K evenly spaced values. Coding is
``CodedTensor -> PackedTensor`` and decoding is back, all of it: renaming of codes, counting, checks. Times are
processor seconds of one thread, the best of several calls. The ideal is ``-sum log2 p(z)`` with the tensor's own
frequencies, which is the discrete part of the KL to the learned prior. Writes ``entropy_coder.json`` beside this
file.

    python benchmarks/entropy_coder.py [--weights 20000000] [--repeats 3]
"""

import argparse
import platform
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from figures import write_figures

from sqs_pyro.packing import CodedTensor, pack_tensor

COMPONENTS = (4, 16, 256)
ZERO_RATES = (0.2, 0.5, 0.9)
SIZES = (100, 1_000, 10_000, 100_000, 1_000_000, 20_000_000)


def coded_weights(weights: int, components: int, zero_rate: float) -> CodedTensor:
    values = torch.randn(weights, generator=torch.Generator().manual_seed(0))
    mask = values.abs() > values.abs().kthvalue(max(1, int(weights * zero_rate))).values
    codebook = torch.linspace(-4, 4, components)
    codes = torch.bucketize(values, (codebook[1:] + codebook[:-1]) / 2, out_int32=True).to(torch.uint8)
    return CodedTensor(codes * mask, mask, codebook[None].half().float())


def ideal_bits(coded: CodedTensor) -> float:
    counts = coded.dense().unique(return_counts=True)[1].double()
    return float(-(counts * (counts / counts.sum()).log2()).sum())


def processor_seconds(function: Callable[[], Any], repeats: int = 5) -> float:
    """The least processor time of several calls."""
    times = []
    for _ in range(repeats):
        start = time.process_time()
        function()
        times.append(time.process_time() - start)
    return min(times)


def speed(weights: int, components: int, zero_rate: float, repeats: int) -> dict[str, Any]:
    coded = coded_weights(weights, components, zero_rate)
    packed = pack_tensor(coded, "entropy")
    again = packed.unpack()
    return {
        "components": components,
        "zero_rate": zero_rate,
        "bits_per_weight": 8 * packed.num_bytes / weights,
        "exact": torch.equal(again.dense().view(torch.int32), coded.dense().view(torch.int32)),
        "coded_per_second": weights / processor_seconds(lambda: pack_tensor(coded, "entropy"), repeats),
        "decoded_per_second": weights / processor_seconds(packed.unpack, repeats),
    }


def overhead(weights: int, components: int, zero_rate: float) -> dict[str, Any]:
    coded = coded_weights(weights, components, zero_rate)
    parts = pack_tensor(coded, "entropy").parts
    ideal, stream, table = ideal_bits(coded), 8 * parts["codes"].numel(), 8 * parts["table"].numel()
    return {
        "weights": weights,
        "components": components,
        "zero_rate": zero_rate,
        "ideal_bits": ideal,
        "stream_bits": stream,
        "table_bits": table,
        "stream_over_ideal": stream / ideal,
        "stream_and_table_over_ideal": (stream + table) / ideal,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--weights", type=int, default=20_000_000)
    parser.add_argument("--repeats", type=int, default=3)
    options = parser.parse_args()
    torch.set_num_threads(1)
    settings = [(k, zeros) for k in COMPONENTS for zeros in ZERO_RATES]
    result = {
        **vars(options),
        "torch": torch.__version__,
        "constriction": version("constriction"),
        "machine": platform.machine(),
        "speed": [speed(options.weights, *setting, options.repeats) for setting in settings],
        "overhead": [overhead(n, k, 0.8) for n in SIZES for k in COMPONENTS],
    }
    write_figures(Path(__file__).with_suffix(".json"), result)
    print(f"{options.weights:,} weights; million weights per processor second")
    for row in result["speed"]:
        rates = f"coding {row['coded_per_second'] / 1e6:.0f}, decoding {row['decoded_per_second'] / 1e6:.0f}"
        print(f"K = {row['components']:>3}, {row['zero_rate']:.0%} zeros: {rates}, exact: {row['exact']}")
    print("bytes over the ideal code length, 80 % zeros")
    for row in result["overhead"]:
        excess = f"{row['stream_over_ideal'] - 1:+.2%}, with table {row['stream_and_table_over_ideal'] - 1:+.2%}"
        print(f"{row['weights']:>10,} weights, K = {row['components']:>3}: stream {excess}")


if __name__ == "__main__":
    main()
