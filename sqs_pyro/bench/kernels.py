"""How fast packed weights multiply on this machine, beside what else there is: ``sqs bench kernels``.

One product ``x @ W.T`` after another, the methods in turn, each time with another copy of the weight: copies take
more than the caches hold, so that weights come from memory as they do in a network. Medians of one process. On a
GPU a turn is a CUDA graph of all copies, and its figure their mean.
"""

import copy
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sqs_pyro.bench import gpu_peers
from sqs_pyro.bench.product_timer import Product, product_timer
from sqs_pyro.bench.report import (
    NF4,
    PEER_ERRORS,
    cold_bytes,
    nf4_linear,
    random_coded,
    spread,
    torch_threads,
)
from sqs_pyro.errors import RecipeError, first_line
from sqs_pyro.kernels.modules import PackedLinear
from sqs_pyro.kernels.weight import PackedWeight
from sqs_pyro.packing import CodedTensor, pack_tensor
from sqs_pyro.runs.bookkeeping import gpu, machine

Method = tuple[torch.dtype, list[Product]]

SHAPES = {
    "cpu": ((4096, 4096), (4864, 896), (576, 1536)),
    "cuda": ((4096, 4096), (11008, 4096), (28672, 8192)),
}
ROWS = (1, 4, 16, 64)
_MOST_COPIES = 300  # of a small weight: enough that caches have other things, and quickly made
_GROUP = 64


def bench_kernels(
    shapes: tuple[tuple[int, int], ...] | None = None,
    rows: tuple[int, ...] = ROWS,
    bits: tuple[int, ...] = (4, 3, 2),
    threads: int = 1,
    rounds: int = 40,
    progress: Callable[[str], None] = lambda line: None,
    device: str = "cpu",
) -> dict[str, Any]:
    """Measure; return a plain document.

    Args:
        shapes: of weights, ``(outputs, inputs)``; :data:`SHAPES` of the device without.
        rows: M, the rows of x.
        bits: of the packed weights' codes.
        threads: that torch may use.
        rounds: products of each method at each shape and M.
        progress: told of each shape as it begins.
        device: ``"cpu"`` or ``"cuda"``.

    Raises:
        RecipeError: a number below one, bits outside of 1..8, or a device that is not there.
    """
    if device not in SHAPES or (device == "cuda" and not torch.cuda.is_available()):
        raise RecipeError(f"There is no device {device!r} to measure: choose cpu, or cuda where torch sees a GPU.")
    shapes = SHAPES[device] if shapes is None else shapes
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
            methods, absent = _methods(outputs, inputs, bits, device)
            missing |= {f"{name}, {outputs} x {inputs}": why for name, why in absent.items()}
            for count in rows:
                seconds = _interleaved(methods, count, inputs, rounds, device)
                found += [
                    {"outputs": outputs, "inputs": inputs, "rows": count, "method": name, **spread(times)}
                    for name, times in seconds.items()
                ]
            del methods  # before the next are made: copies of two large shapes may not fit
        made = machine() | (gpu() if device == "cuda" else {})
        return {"machine": made, "rounds": rounds, "missing": missing, "rows": found}


@torch.inference_mode()
def _interleaved(
    methods: dict[str, Method], rows: int, inputs: int, rounds: int, device: str
) -> dict[str, list[float]]:
    x = {dtype: torch.randn(rows, inputs).to(device, dtype) for dtype, _ in methods.values()}
    timers = {name: product_timer(copies, x[dtype]) for name, (dtype, copies) in methods.items()}
    seconds: dict[str, list[float]] = {name: [] for name in methods}
    # In turn, so that a change of the clock's rate, or a neighbour's load, meets all methods alike.
    for turn in range(-2, rounds):  # two to warm up
        for name, timer in timers.items():
            taken = timer(turn)
            if turn >= 0:
                seconds[name].append(taken)
    return seconds


@torch.inference_mode()
def _methods(
    outputs: int, inputs: int, bits: tuple[int, ...], device: str = "cpu"
) -> tuple[dict[str, Method], dict[str, str]]:
    """Return products by method, as many copies of each as are cold; and why a method is not there."""
    made: dict[str, Method] = {}
    missing: dict[str, str] = {}
    single, half = torch.float32, torch.bfloat16
    weight = torch.randn(outputs, inputs, device=device)
    numel = weight.numel()
    if device == "cpu":
        made["float32"] = single, [_dense(weight.clone()) for _ in range(_copies(4 * numel))]
    made["bfloat16"] = half, [_dense(weight.to(half).clone()) for _ in range(_copies(2 * numel))]
    for name, (dtype, make) in _PEERS[device].items():
        try:
            copies = [make(weight) for _ in range(_copies(numel // 2))]
            # Libraries find out at the first call that they do not take a shape.
            copies[0](torch.zeros(1, inputs, dtype=dtype, device=device))
            made[name] = dtype, copies
        except PEER_ERRORS as error:
            missing[name] = first_line(error)
    for width in bits:
        # Zero as often as each other code: 2**width values of equal shares.
        coded = random_coded((outputs, inputs), width, nonzero_rate=1 - 2**-width)
        for label, dtype in (
            {"float32": single, "bfloat16": half}.items() if device == "cpu" else [("bfloat16", half)]
        ):
            copies = list(_packed(coded, dtype, _copies(numel * width // 8), device))
            made[f"packed, {width} bits, {label}"] = dtype, copies
            if device == "cuda":
                made[f"packed, {width} bits, {label}, Triton only"] = dtype, [_by_triton(copy) for copy in copies]
    return made, missing


def _copies(size: int) -> int:
    # At least two: a single one would still be in the caches from its last turn.
    return min(max(2, -(-cold_bytes() // size)), _MOST_COPIES)


def _dense(weight: Tensor) -> Product:
    return lambda x: F.linear(x, weight)


def _int4(weight: Tensor) -> Product:
    """Return the kernel behind torchao's int4 weights on CPUs; the numbers do not matter, their time does."""
    outputs, inputs = weight.shape
    symbols = torch.randint(0, 16, (outputs, inputs), dtype=torch.int32)
    packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(symbols, 1)
    scales = torch.ones(inputs // _GROUP, outputs, 2, dtype=torch.bfloat16)
    return lambda x: torch.ops.aten._weight_int4pack_mm_for_cpu(x, packed, _GROUP, scales)


def _by_triton(layer: Product) -> Product:
    """Return the product without the CUDA C++ kernels."""
    assert isinstance(layer, PackedLinear)
    from sqs_pyro.kernels.gpu.launch import linear

    return lambda x: linear(layer.packed_weight.args, x, None, cuda=False)


def _nf4(weight: Tensor) -> Product:
    outputs, inputs = weight.shape
    linear = nn.Linear(inputs, outputs, bias=False, device="meta")
    linear.weight = nn.Parameter(weight, requires_grad=False)
    return nf4_linear(linear)


_PEERS: dict[str, dict[str, tuple[torch.dtype, Callable[[Tensor], Product]]]] = {
    "cpu": {"int4, groups of 64 (aten)": (torch.bfloat16, _int4), NF4: (torch.bfloat16, _nf4)},
    "cuda": {
        "int4, groups of 64 (aten)": (torch.bfloat16, gpu_peers.int4_aten),
        NF4: (torch.bfloat16, _nf4),
        "int4, groups of 64 (gemlite)": (torch.bfloat16, gpu_peers.int4_gemlite),
        "int4, groups of 128 (marlin)": (torch.float16, gpu_peers.int4_marlin),
    },
}


def _packed(coded: CodedTensor, dtype: torch.dtype, copies: int, device: str) -> Iterator[Product]:
    outputs, inputs = coded.shape
    weight = PackedWeight(pack_tensor(coded, "dense"), dtype)
    weight.used_for("linear")  # before it moves: the form of its codes follows from it
    weight = weight.to(device)
    linear = nn.Linear(inputs, outputs, bias=False, device="meta")
    for _ in range(copies):
        cold = copy.copy(weight)
        # Codes are what streams from memory; codebooks are small, and cached in a network as well.
        cold._buffers = {**weight._buffers, "codes": weight.codes.clone()}
        yield PackedLinear(linear, cold)
