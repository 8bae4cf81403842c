"""Products, rows and whole weights by the Triton kernels: arguments checked, blocks chosen, kernels started."""

import math
from collections.abc import Iterator
from contextlib import nullcontext
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
import triton
from torch import Tensor

from sqs_pyro.kernels.decode import PackedArgs, decoded_weights
from sqs_pyro.kernels.gpu import triton_kernels as kernels
from sqs_pyro.kernels.gpu.cuda import linear as cuda_linear
from sqs_pyro.kernels.gpu.dispatch import CHUNK, Plan, for_cuda, plan, unit_of
from sqs_pyro.packing.bits import packed_size

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_HALVES = DTYPES[1:]
_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32}


class Weight(NamedTuple):
    """A packed weight ``[outputs, inputs]`` as the kernels take it: tensors, and what they are compiled for."""

    outputs: int
    inputs: int
    codes: Tensor
    table: Tensor
    mask: Tensor
    ranks: Tensor
    scales: Tensor | None
    size: int
    code_bytes: int
    BITS: int
    UNIT: int
    PER: int
    BITMAP: bool
    GROUPING: int
    SPAN: int
    PARTS: int

    @property
    def units(self) -> int:
        """Units of a row."""
        return self.inputs // self.PER

    def plan(self, x: Tensor, cuda: bool = False) -> Plan:
        """Say how the product with x ``[M, K]`` is computed; ``cuda`` lets the CUDA kernels do it."""
        half, grouped = x.dtype in _HALVES, len(self.table) > 1
        return plan(len(x), self.outputs, self.units, half, self.BITMAP, grouped, cuda)

    def tensors(self) -> tuple[Tensor, ...]:
        """Return the first arguments of a kernel on it."""
        return self.codes, self.table, self.mask, self.ranks, self.scales_or_table

    @property
    def is_scaled(self) -> bool:
        """Whether sums are multiplied by scales of outputs."""
        return self.scales is not None and not self.PARTS

    @property
    def scales_or_table(self) -> Tensor:
        """What a kernel takes for scales: any tensor where there are none."""
        return self.table if self.scales is None else self.scales

    def constants(self) -> dict[str, Any]:
        """Return what a kernel on it is compiled for."""
        names = ("BITS", "UNIT", "PER", "BITMAP", "GROUPING", "SPAN", "PARTS")
        return {name: getattr(self, name) for name in names}


class Launch(NamedTuple):
    """A kernel, its grid, its arguments and what it is compiled for."""

    kernel: Any
    grid: tuple[int, ...]
    arguments: tuple[Any, ...]
    constants: dict[str, Any]


def takes(packed: PackedArgs, dtype: torch.dtype) -> bool:
    """Return whether the kernels compute with this weight in this dtype."""
    return packed.bits > 0 and packed.form in ("dense", "bitmap") and dtype in DTYPES


def linear(packed: PackedArgs, x: Tensor, bias: Tensor | None, cuda: bool = True) -> Tensor:
    """Return ``x @ W.T + bias``, ``[..., N]`` in the dtype of x ``[..., K]``.

    Args:
        packed: W, ``[N, K]``.
        x: float32, bfloat16 or float16, on the device of W.
        bias: ``[N]`` or None.
        cuda: whether the CUDA kernels may do it.

    Raises:
        RuntimeError: an argument does not fit the others.
    """
    outputs, inputs = packed.shape
    _check(x.dim() >= 1 and x.shape[-1] == inputs, f"the last dimension of x should be {inputs}")
    _check(bias is None or bias.shape == (outputs,), f"the bias should have {outputs} numbers")
    rows = x.reshape(math.prod(x.shape[:-1]), inputs)  # [M, K]
    bias = None if bias is None else bias.to(x.dtype).contiguous()
    weight = weight_of(packed)
    if not len(rows):  # a grid cannot be empty
        return x.new_empty(*x.shape[:-1], outputs)
    cuda = cuda and x.is_cuda and not weight.BITMAP and not weight.PARTS
    cuda = cuda and for_cuda(inputs, packed.bits, len(weight.table))
    chosen = weight.plan(rows, cuda)
    if chosen.kernel == "decode":
        return F.linear(x, dense(packed, x.dtype), bias)
    out = x.new_empty(len(rows), outputs)
    # False where nvcc is missing: Triton then does the same product, by a plan of its own.
    done = chosen.kernel == "cuda" and cuda_linear(
        rows, bias, packed.codes, weight.table, weight.scales, packed.bits, out
    )
    if not done:
        chosen = weight.plan(rows) if chosen.kernel == "cuda" else chosen
        _start(product(weight, rows, bias, out, chosen), out)
    return out.view(*x.shape[:-1], outputs)


def dense(packed: PackedArgs, dtype: torch.dtype) -> Tensor:
    """Return the weight, ``[N, K]``, a new tensor."""
    return _decoded(packed, None, packed.shape[0], dtype)


def embedding(packed: PackedArgs, indices: Tensor, dtype: torch.dtype) -> Tensor:
    """Return rows of the weight, ``[*indices.shape, K]``; NaN for an index outside of it."""
    _check(indices.dtype in (torch.int64, torch.int32), f"indices should be int64 or int32, not {indices.dtype}")
    rows = _decoded(packed, indices.reshape(-1), indices.numel(), dtype)
    return rows.view(*indices.shape, packed.shape[1])


def ranks(packed: PackedArgs) -> Tensor:
    """Return the non-zeros before each chunk of a bitmap's rows, int64 ``[N, ceil(K / CHUNK)]``.

    Computed once and kept beside the decoded weights, by the same rules; during the capture of a CUDA graph it is
    part of the graph, unless there already.
    """
    assert packed.mask is not None
    # What is made during a capture lives in the graph's memory, and must not be kept beyond it.
    if packed.mask.is_cuda and torch.cuda.is_current_stream_capturing():
        found = decoded_weights.find(packed, "ranks")
        return _ranks(packed) if found is None else found
    return decoded_weights.kept(packed, "ranks", _ranks)


def _ranks(packed: PackedArgs) -> Tensor:
    assert packed.mask is not None
    outputs, inputs = packed.shape[0], math.prod(packed.shape[1:])
    chunks = triton.cdiv(inputs, CHUNK)
    counts = torch.empty(outputs, chunks, dtype=torch.int64, device=packed.mask.device)
    launch = Launch(kernels.count_nonzeros, (outputs, chunks), (packed.mask, counts, inputs), {"BU": CHUNK})
    _start(iter([launch]), counts)
    # Exclusive sums over the flat tensor: a bitmap's codes run through all rows.
    return (counts.view(-1).cumsum(0) - counts.view(-1)).view(outputs, chunks)


def weight_of(packed: PackedArgs) -> Weight:
    """Return the weight as the kernels take it.

    Raises:
        RuntimeError: its tensors do not fit each other.
    """
    outputs, inputs = packed.shape[0], math.prod(packed.shape[1:])
    numel, bitmap = outputs * inputs, packed.mask is not None
    table, (scales, parts) = _floats(packed.table), _scales(packed, inputs)
    groups, size = table.shape
    # A wrong size would not raise on a GPU: kernels would read beyond the end.
    _check(groups > 0 and numel % groups == 0, f"a table of {groups} rows does not fit {numel} weights")
    if packed.mask is None:
        bytes_, found = packed_size(numel, packed.bits), packed.codes.numel()
        _check(found == bytes_, f"codes of {packed.bits} bits should have {bytes_} bytes, not {found}")
    else:
        bytes_, found = packed_size(numel, 1), packed.mask.numel()
        _check(found == bytes_, f"the mask should have {bytes_} bytes, not {found}")
    shared = numel // groups  # the weights that share a row of the table
    # Three ways to share a table: whole rows, equal parts of a row, or parts that run over the ends of rows.
    in_row = shared if groups > 1 and shared % inputs and inputs % shared == 0 else None
    span = math.gcd(in_row or inputs, inputs // parts) if parts else in_row  # of one table and one scale
    flat = groups > 1 and shared % inputs > 0 and in_row is None
    unit, per, width = (0, 1, 1) if bitmap or flat else unit_of(packed.bits, inputs, span)
    codes = packed.codes.contiguous()
    # A view of a file may begin at any byte; loads of 2 or 4 bytes may not.
    if width > 1 and codes.data_ptr() % width:
        codes = codes.clone()
    grouping, of_group = (0, 1) if groups == 1 else (3, shared) if flat else (1, shared // inputs)
    if in_row is not None:
        grouping, of_group = 2, in_row // per
    return Weight(
        outputs,
        inputs,
        codes.view(_INTEGERS[width]),
        table,
        # Kernels take a pointer in any case, and do not look at one that they are compiled without.
        codes if packed.mask is None else packed.mask,
        ranks(packed) if bitmap else codes,
        scales,
        size,
        packed.codes.numel(),
        packed.bits,
        unit,
        per,
        bitmap,
        grouping,
        of_group,
        parts,
    )


def product(weight: Weight, x: Tensor, bias: Tensor | None, out: Tensor, chosen: Plan) -> Iterator[Launch]:
    """Yield the kernels that write ``x @ W.T + bias`` to ``out``.

    Args:
        weight: ``[N, K]``.
        x: ``[M, K]``, any strides.
        bias: ``[N]`` in the dtype of x.
        out: ``[M, N]``.
        chosen: ``"vector"`` or ``"matrix"``, with its blocks.
    """
    outputs, rows = weight.outputs, len(x)
    # Parts of whole tiles, so that a bitmap's ranks stand at their beginnings.
    tiles = triton.cdiv(weight.units, chosen.units)
    units_per_split = triton.cdiv(tiles, chosen.splits) * chosen.units
    parts = out if chosen.splits == 1 else x.new_empty(chosen.splits, rows, outputs, dtype=torch.float32)
    row, place = x.stride()
    unit = place * weight.PER
    if chosen.kernel == "matrix" and weight.PER > 1:  # codes of one place side by side, as units are
        x = x.unflatten(1, (weight.units, weight.PER)).permute(2, 0, 1).contiguous()
        place, row, unit = x.stride()
    # Of split sums the last kernel does it: scales and bias belong to the whole sum.
    epilogue = {"SCALED": weight.is_scaled, "BIASED": bias is not None}
    numbers = (outputs, weight.inputs, weight.size, weight.code_bytes, row, unit, place, units_per_split)
    bias = out if bias is None else bias
    constants = {**weight.constants(), **epilogue, "BN": chosen.outputs, "BU": chosen.units}
    constants |= {"PARTIAL": chosen.splits > 1, "num_warps": chosen.warps, "num_stages": chosen.stages}
    blocks = triton.cdiv(outputs, chosen.outputs)
    arguments = (x, *weight.tensors(), bias, parts)
    if chosen.kernel == "vector":
        yield Launch(kernels.vector, (blocks, chosen.splits, rows), (*arguments, *numbers), constants)
    else:
        constants |= {"BM": chosen.rows, "UPCAST": _interpreted()}
        yield Launch(kernels.matrix, (blocks, chosen.splits), (*arguments, rows, *numbers), constants)
    if chosen.splits > 1:
        summed = (parts, weight.scales_or_table, bias, out, outputs, chosen.splits)
        yield Launch(kernels.finish, (triton.cdiv(outputs, 128), rows), summed, {**epilogue, "BN": 128})


def decoding(weight: Weight, indices: Tensor | None, out: Tensor) -> Iterator[Launch]:
    """Yield the kernel that writes rows of the weight to ``out`` ``[rows, K]``, those asked for or all."""
    wide = CHUNK if weight.BITMAP else 1024 // weight.PER
    numbers = (weight.outputs, weight.inputs, weight.size, weight.code_bytes)
    constants = {
        **weight.constants(),
        "SCALED": weight.is_scaled,
        "GATHER": indices is not None,
        "BU": wide,
    }
    if len(out):
        arguments = (out if indices is None else indices, *weight.tensors(), out, *numbers)
        grid = (len(out), triton.cdiv(weight.units, wide))
        yield Launch(kernels.decode_rows, grid, arguments, constants)


def _decoded(packed: PackedArgs, indices: Tensor | None, count: int, dtype: torch.dtype) -> Tensor:
    weight = weight_of(packed)
    out = torch.empty(count, weight.inputs, dtype=dtype, device=packed.codes.device)
    _start(decoding(weight, indices, out), out)
    return out.view(count, *packed.shape[1:])


def _start(launches: Iterator[Launch], on: Tensor) -> None:
    """Start kernels on the tensor's device: they take the current one."""
    # Off a GPU Triton's interpreter runs the kernels, in tests.
    with torch.cuda.device(on.device) if on.is_cuda else nullcontext():
        for kernel, grid, arguments, constants in launches:
            kernel[grid](*arguments, **constants)


def _scales(packed: PackedArgs, inputs: int) -> tuple[Tensor | None, int]:
    """Return scales, float32 ``[N]`` and 0, or of B parts of outputs, float16 ``[N, B]`` and B."""
    if packed.scales is None:
        return None, 0
    outputs = packed.shape[0]
    if packed.scales.dim() == 1:
        scales = _floats(packed.scales)
        _check(scales.numel() == outputs, f"scales should have {outputs} numbers")
        return scales, 0
    scales = _floats(packed.scales, torch.float16)
    fits = len(scales) == outputs and scales.shape[1] > 0 and inputs % scales.shape[1] == 0
    _check(fits, f"scales of shape {list(scales.shape)} do not fit {outputs} outputs of {inputs} inputs")
    return scales, scales.shape[1]


def _floats(values: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """Return the numbers of bytes."""
    aligned = values.is_contiguous() and values.data_ptr() % dtype.itemsize == 0
    return (values if aligned else values.clone(memory_format=torch.contiguous_format)).view(dtype)


def _interpreted() -> bool:
    return bool(triton.knobs.runtime.interpret)


def _check(right: bool, message: str) -> None:
    if not right:
        raise RuntimeError(f"sqs: {message}")
