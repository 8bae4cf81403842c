"""How fast packed weights multiply on this machine, beside what else there is: ``sqs bench kernels``.

One product ``x @ W.T`` after another, the methods in turn, each time with another copy of the weight: copies take
more than the caches hold, so that weights come from memory as they do in a network. Medians of one process.
"""

import copy
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sqs_pyro.errors import RecipeError
from sqs_pyro.kernels.modules import PackedLinear
from sqs_pyro.kernels.weight import PackedWeight
from sqs_pyro.packing import CodedTensor, pack_tensor
from sqs_pyro.runs.bench import (
    COLD_BYTES,
    NF4,
    PEER_ERRORS,
    first_line,
    nf4_linear,
    random_coded,
    spread,
    torch_threads,
)
from sqs_pyro.runs.machine import machine

Product = Callable[[Tensor], Tensor]

SHAPES = ((4096, 4096), (4864, 896), (576, 1536))
ROWS = (1, 4, 16, 64)
_MOST_COPIES = 300
_GROUP = 64


def bench_kernels(
    shapes: tuple[tuple[int, int], ...] = SHAPES,
    rows: tuple[int, ...] = ROWS,
    bits: tuple[int, ...] = (4, 3, 2),
    threads: int = 1,
    rounds: int = 40,
    progress: Callable[[str], None] = lambda line: None,
) -> dict[str, Any]:
    """Measure; returns a plain document.

    Args:
        shapes: of weights, ``(outputs, inputs)``.
        rows: M, the rows of x.
        bits: of the packed weights' codes.
        threads: that torch may use.
        rounds: products of each method at each shape and M.
        progress: told of each shape as it begins.

    Raises:
        RecipeError: a number below one, or bits outside of 1..8.
    """
    if min([threads, rounds, *rows, *[n for shape in shapes for n in shape]]) < 1 or not set(bits) <= set(
        range(1, 9)
    ):
        raise RecipeError(
            "A benchmark needs shapes, rows, threads and rounds of at least 1, and bits from 1 to 8."
        )
    found: list[dict[str, Any]] = []
    missing: dict[str, str] = {}
    with torch_threads(threads):
        for outputs, inputs in shapes:
            progress(f"{outputs} x {inputs}")
            methods, absent = _methods(outputs, inputs, bits)
            missing |= {f"{name}, {outputs} x {inputs}": why for name, why in absent.items()}
            for count in rows:
                seconds = _interleaved(methods, count, inputs, rounds)
                found += [
                    {"outputs": outputs, "inputs": inputs, "rows": count, "method": name, **spread(times)}
                    for name, times in seconds.items()
                ]
        return {"machine": machine(), "rounds": rounds, "missing": missing, "rows": found}


@torch.inference_mode()
def _interleaved(
    methods: dict[str, tuple[torch.dtype, list[Product]]], rows: int, inputs: int, rounds: int
) -> dict[str, list[float]]:
    x = {dtype: torch.randn(rows, inputs).to(dtype) for dtype, _ in methods.values()}
    seconds: dict[str, list[float]] = {name: [] for name in methods}
    for turn in range(-2, rounds):  # two to warm up
        for name, (dtype, copies) in methods.items():
            product, operand = copies[turn % len(copies)], x[dtype]
            start = time.perf_counter()
            product(operand)
            taken = time.perf_counter() - start
            if turn >= 0:
                seconds[name].append(taken)
    return seconds


def _methods(
    outputs: int, inputs: int, bits: tuple[int, ...]
) -> tuple[dict[str, tuple[torch.dtype, list[Product]]], dict[str, str]]:
    """Products by method, as many copies of each as are cold; and why a method is not there."""
    made: dict[str, tuple[torch.dtype, list[Product]]] = {}
    missing: dict[str, str] = {}
    single, half = torch.float32, torch.bfloat16
    weight = torch.randn(outputs, inputs)
    numel = weight.numel()
    made["float32"] = single, [_dense(weight.clone()) for _ in range(_copies(4 * numel))]
    made["bfloat16"] = half, [_dense(weight.to(half).clone()) for _ in range(_copies(2 * numel))]
    for name, make in {"int4, groups of 64 (aten)": _int4, NF4: _nf4}.items():
        try:
            made[name] = half, [make(weight) for _ in range(_copies(numel // 2))]
        except PEER_ERRORS as error:
            missing[name] = first_line(error)
    for width in bits:
        coded = random_coded((outputs, inputs), width, nonzero_rate=1 - 2**-width)
        for label, dtype in {"float32": single, "bfloat16": half}.items():
            copies = _copies(numel * width // 8)
            made[f"packed, {width} bits, {label}"] = dtype, list(_packed(coded, dtype, copies))
    return made, missing


def _copies(size: int) -> int:
    return min(max(2, -(-COLD_BYTES // size)), _MOST_COPIES)


def _dense(weight: Tensor) -> Product:
    return lambda x: F.linear(x, weight)


def _int4(weight: Tensor) -> Product:
    """The kernel behind torchao's int4 weights on CPUs; the numbers do not matter, their time does."""
    outputs, inputs = weight.shape
    symbols = torch.randint(0, 16, (outputs, inputs), dtype=torch.int32)
    packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(symbols, 1)
    scales = torch.ones(inputs // _GROUP, outputs, 2, dtype=torch.bfloat16)
    return lambda x: torch.ops.aten._weight_int4pack_mm_for_cpu(x, packed, _GROUP, scales)


def _nf4(weight: Tensor) -> Product:
    outputs, inputs = weight.shape
    linear = nn.Linear(inputs, outputs, bias=False, device="meta")
    linear.weight = nn.Parameter(weight, requires_grad=False)
    return nf4_linear(linear)


def _packed(coded: CodedTensor, dtype: torch.dtype, copies: int) -> Iterator[Product]:
    outputs, inputs = coded.shape
    weight = PackedWeight(pack_tensor(coded, "dense"), dtype)
    weight.used_for("linear")
    linear = nn.Linear(inputs, outputs, bias=False, device="meta")
    for _ in range(copies):
        cold = copy.copy(weight)
        cold._buffers = {**weight._buffers, "codes": weight.codes.clone()}
        yield PackedLinear(linear, cold)
