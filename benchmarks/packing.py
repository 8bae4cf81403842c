"""How long packing and unpacking take, and how close each layout comes to the entropy.

Medians of repeated calls in one process; weights are one tensor of random codes with a given share of zeros.
Writes ``packing.json`` beside this file.

    python benchmarks/packing.py [--weights 10000000] [--components 16] [--nonzero-rate 0.2] [--threads 1]
"""

import argparse
import platform
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from figures import write_figures

from sqs_pyro.packing import (
    CodedTensor,
    PackedContents,
    layout_names,
    pack_bits,
    pack_tensor,
    read_packed,
    unpack_bits,
    write_packed,
)


def coded_weights(weights: int, components: int, nonzero_rate: float) -> CodedTensor:
    random = torch.Generator().manual_seed(0)
    mask = torch.rand(weights, generator=random) < nonzero_rate
    codes = torch.randint(0, components, (weights,), dtype=torch.uint8, generator=random) * mask
    return CodedTensor(codes, mask, (torch.arange(components)[None] + 1) / 64)


def seconds(function: Callable[[], Any], repeats: int) -> float:
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        function()
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def bit_packing(weights: int, repeats: int) -> list[dict[str, float]]:
    rows = []
    for bits in range(1, 9):
        values = torch.randint(0, 2**bits, (weights,), dtype=torch.int16).to(torch.uint8)
        packed = pack_bits(values, bits)
        rows.append(
            {
                "bits": bits,
                "pack_seconds": seconds(lambda v=values, b=bits: pack_bits(v, b), repeats),
                "unpack_seconds": seconds(lambda p=packed, b=bits: unpack_bits(p, b, weights), repeats),
            }
        )
    return rows


def layout(coded: CodedTensor, name: str, repeats: int) -> dict[str, Any]:
    packed = pack_tensor(coded, name)
    contents = PackedContents({"weight": packed}, {}, {})
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / "weights.safetensors"
        write = seconds(lambda: write_packed(path, contents), repeats)
        read = seconds(lambda: read_packed(path), repeats)
    return {
        "layout": name,
        "bytes": packed.num_bytes,
        "bits_per_weight": 8 * packed.num_bytes / packed.numel,
        "pack_seconds": seconds(lambda: pack_tensor(coded, name), repeats),
        "unpack_seconds": seconds(packed.unpack, repeats),
        "write_seconds": write,
        "read_seconds": read,
    }


def entropy_bits(coded: CodedTensor) -> float:
    _, counts = coded.dense().unique(return_counts=True)
    rates = counts / counts.sum()
    return float(-(rates * rates.log2()).sum())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--weights", type=int, default=10_000_000)
    parser.add_argument("--components", type=int, default=16)
    parser.add_argument("--nonzero-rate", type=float, default=0.2)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    coded = coded_weights(options.weights, options.components, options.nonzero_rate)
    result = {
        **vars(options),
        "torch": torch.__version__,
        "machine": platform.machine(),
        "entropy_bits_per_weight": entropy_bits(coded),
        "layouts": [layout(coded, name, options.repeats) for name in layout_names()],
        "bit_packing": bit_packing(options.weights, options.repeats),
    }
    write_figures(Path(__file__).with_suffix(".json"), result)
    print(f"{options.weights:,} weights, entropy {result['entropy_bits_per_weight']:.3f} bits a weight")
    for row in result["layouts"]:
        speed = " ".join(
            f"{what} {options.weights / 1e6 / row[f'{what}_seconds']:.0f}" for what in ("pack", "unpack")
        )
        print(f"{row['layout']:>8}: {row['bits_per_weight']:.3f} bits a weight; million weights/s: {speed}")
    slowest = {what: max(row[f"{what}_seconds"] for row in result["bit_packing"]) for what in ("pack", "unpack")}
    print(f"bit-packing alone, slowest of 1..8 bits: {slowest['pack']:.3f} s, {slowest['unpack']:.3f} s")


if __name__ == "__main__":
    main()
