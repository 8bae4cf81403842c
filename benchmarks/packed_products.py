"""Single convolutions, and matrices with several codebooks, packed and dense, on one thread of the CPU.

Convolutions are those of ResNet-20 and one of ResNet-18's, batch 1 and 32, all methods in turn on the same image,
warm. Matrices are 4096 x 4096 with one codebook, one for each output and one for each 128 inputs, or with one
codebook and a scale for each 128 or 64 inputs, each product with another copy of the weight, cold. 4-bit codes;
medians.

    python benchmarks/packed_products.py [--rounds 60] [--out FILE]

Needs an idle machine. Writes ``packed_products.json`` beside this file, or ``--out``.
"""

import argparse
import copy
import math
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from figures import write_figures
from torch import Tensor, nn

from sqs_pyro.bench.report import cold_bytes, random_coded, spread, torch_threads
from sqs_pyro.kernels import packed_network
from sqs_pyro.runs.bookkeeping import machine

CONVOLUTIONS = (  # channels in and out, width of the image, stride
    (16, 16, 28, 1),
    (16, 32, 28, 2),
    (32, 32, 14, 1),
    (32, 64, 14, 2),
    (64, 64, 7, 1),
    (256, 256, 14, 1),
)
OUTPUTS, INPUTS = 4096, 4096
SCALED = (128, 64)  # inputs that share a scale, beside one codebook
GROUPS = {"one codebook": 1, "one for each output": OUTPUTS, "one for each 128 inputs": OUTPUTS * INPUTS // 128}


def nth(copies: list[nn.Module], x: Tensor, turn: int) -> Tensor:
    return copies[turn % len(copies)](x)


def in_turn(calls: dict[str, Callable[[int], Tensor]], rounds: int) -> dict[str, dict[str, float]]:
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for turn in range(-3, rounds):
        for name, call in calls.items():
            start = time.perf_counter()
            call(turn)
            if turn >= 0:
                seconds[name].append(time.perf_counter() - start)
    return {name: spread(times) for name, times in seconds.items()}


def of_dtypes(label: str, module: nn.Module, x: Tensor) -> dict[str, Callable[[int], Tensor]]:
    calls = {}
    for dtype in (torch.float32, torch.bfloat16):
        cast, operand = copy.deepcopy(module).to(dtype), x.to(dtype)
        calls[f"{label}, {str(dtype).removeprefix('torch.')}"] = partial(nth, [cast], operand)
    return calls


def convolutions(rounds: int) -> list[dict[str, Any]]:
    rows = []
    for channels, outputs, width, stride in CONVOLUTIONS:
        plain = nn.Conv2d(channels, outputs, 3, stride=stride, padding=1, bias=False)
        packed = packed_network(plain, {"weight": random_coded(plain.weight.shape, 4, nonzero_rate=0.5)})
        for batch in (1, 32):
            x = torch.randn(batch, channels, width, width)
            found = in_turn({**of_dtypes("dense", plain, x), **of_dtypes("packed", packed, x)}, rounds)
            shape = {"channels": channels, "outputs": outputs, "width": width, "stride": stride, "batch": batch}
            rows += [{**shape, "method": name, **times} for name, times in found.items()]
            print(shape, {name: round(times["microseconds"], 1) for name, times in found.items()}, flush=True)
    return rows


def copies_of(bytes_of_weight: float) -> int:
    """So many that none is in a cache when its turn comes again."""
    return math.ceil(cold_bytes() / (bytes_of_weight * OUTPUTS * INPUTS))


def matrices(rounds: int) -> list[dict[str, Any]]:
    plain = nn.Linear(INPUTS, OUTPUTS, bias=False)
    coded = random_coded((OUTPUTS, INPUTS), 4, nonzero_rate=0.9)
    copies: dict[str, list[nn.Module]] = {"dense": [copy.deepcopy(plain) for _ in range(copies_of(4))]}
    made = {name: replace(coded, codebook=coded.codebook.repeat(groups, 1)) for name, groups in GROUPS.items()}
    for size in SCALED:
        scales = (0.5 + torch.rand(OUTPUTS, INPUTS // size)).half().float()
        made[f"one scale for each {size} inputs"] = replace(coded, scales=scales)
    for name, several in made.items():
        packed = packed_network(plain, {"weight": several}, layout="dense")
        copies[name] = [copy.deepcopy(packed) for _ in range(copies_of(0.5))]
    rows = []
    for dtype in (torch.float32, torch.bfloat16):
        cast = {name: [module.to(dtype) for module in modules] for name, modules in copies.items()}
        for count in (1, 4, 16):
            x = torch.randn(count, INPUTS).to(dtype)
            calls = {name: partial(nth, modules, x) for name, modules in cast.items()}
            found = in_turn(calls, rounds)
            about = {"rows": count, "dtype": str(dtype).removeprefix("torch.")}
            rows += [{**about, "method": name, **times} for name, times in found.items()]
            print(about, {name: round(times["microseconds"], 1) for name, times in found.items()}, flush=True)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=60)
    parser.add_argument("--out", type=Path, default=Path(__file__).with_suffix(".json"))
    args = parser.parse_args()
    rounds = args.rounds
    torch.empty(6_000_000)  # freed at once: from now on the allocator keeps what is smaller
    with torch_threads(1), torch.inference_mode():
        document = {"machine": machine(), "rounds": rounds}
        document |= {"convolutions": convolutions(rounds), "matrices": matrices(rounds)}
    write_figures(args.out, document)


if __name__ == "__main__":
    main()
