"""The form that a compressed weight has in memory: which one is best, and how to write codes in it and read them.

``dense`` and ``bitmap`` are as in a file; ``tiled`` and ``rows`` are dense codes in another order, for the kernels
of CPUs (see :mod:`sqs_pyro.kernels.decode`).
"""

import math
from collections.abc import Collection
from typing import NamedTuple

import torch
from torch import Tensor

from sqs_pyro.kernels.decode import (
    TRANSCODERS,
    PackedArgs,
    read_scales,
    read_symbols,
    read_table,
    write_scales,
    write_table,
)
from sqs_pyro.kernels.gpu.register import gpu_kernels
from sqs_pyro.kernels.native import native_kernels
from sqs_pyro.kernels.rows import fits_rows, rows_size
from sqs_pyro.kernels.tiled import ROWS, tiled_bits, tiled_size
from sqs_pyro.packing.bits import MAX_BITS, pack_bits, packed_size, unpack_bits
from sqs_pyro.packing.coded import CodedTensor
from sqs_pyro.packing.layouts import PackedTensor, get_layout

#: Weights read at once while one is written: what lies between must not leave large holes in memory.
_PIECE = 1 << 16


class RuntimeForm(NamedTuple):
    """What a weight is in memory.

    Attributes:
        name: ``"dense"``, ``"bitmap"``, ``"tiled"`` or ``"rows"``, see :class:`PackedArgs`.
        has_kernels: whether products are made with the codes; else the weight is decoded once and kept.
        reason: why, in a few words.
    """

    name: str
    has_kernels: bool
    reason: str


def best_form(args: PackedArgs, bits: int, uses: Collection[str], device: str) -> RuntimeForm:
    """Return the form that is best for what a weight is used for.

    Args:
        args: the weight in any form; its codes are not looked at.
        bits: of a code in the dense form, or of a non-zero's in the bitmap form.
        uses: what modules do with it, see :meth:`StoredWeight.used_for`.
        device: type of the device it is on.
    """
    groups = args.table.shape[0]
    parts = args.scales.shape[1] // 2 if args.scales is not None and args.scales.dim() == 2 else 1
    plain = "dense" if args.mask is None else "bitmap"
    # One user that reads the weight decides: its decoded copy is there anyway, and packed products would come on
    # top.
    if not uses or "decoded" in uses:
        return RuntimeForm(plain, False, "its module reads the decoded weight")
    if bits == 0:
        return RuntimeForm(plain, False, "all weights are one value")
    # GPUs multiply with the codes as they are in a file; for convolutions there is no kernel.
    if device == "cuda" and "convolution" not in uses:
        if gpu_kernels() is None:
            return RuntimeForm(plain, False, "no Triton")
        return RuntimeForm(plain, True, "Triton and CUDA kernels multiply with the codes")
    if device != "cpu":
        return RuntimeForm(plain, False, f"no kernel for this product on {device}")
    if args.mask is not None:
        return RuntimeForm(plain, False, f"{args.table.shape[1] // 4} values and zero do not fit into 8 bits")
    # Tiles are for one codebook or, of a convolution, several; matrices with several, or with several scales an
    # output, have a kernel of their own.
    form = "tiled" if groups == parts == 1 or "convolution" in uses else "rows"
    fits = args.shape[0] % groups == 0 and parts == 1 if form == "tiled" else fits_rows(args.shape, groups, parts)
    if not fits:
        each = math.prod(args.shape) // groups
        scales = f" and {parts} scales an output" if parts > 1 else ""
        return RuntimeForm(plain, False, f"no kernel for {groups} codebooks of {each} weights{scales}")
    # Last, because it may compile: only a weight that a kernel would take.
    if not native_kernels(form):
        return RuntimeForm(plain, False, "no compiled kernels")
    return RuntimeForm(form, True, "compiled kernels multiply with the codes")


def runtime_args(packed: PackedTensor, uses: Collection[str]) -> tuple[PackedArgs, int]:
    """Write a weight in the form that is best for it on a CPU; the second result is its ``bits``.

    No layout comes in between, and no copy of all codes as bytes: a few rows after the other are read and packed,
    in the order in which they will be read.

    Raises:
        PackedFileError: the stored bytes do not decode.
    """
    has_zeros = packed.nonzeros < packed.numel
    dense_bits = get_layout("dense").bits(packed.num_components, has_zeros)
    if dense_bits > MAX_BITS:  # 256 values and zero
        return _bitmap_args(packed.unpack())
    rows = packed.codebook()  # [G, K]
    if has_zeros:
        rows = torch.cat([rows.new_zeros(len(rows), 1), rows], dim=1)  # [G, 1 + K]: zero is symbol 0
    empty = torch.empty(0, dtype=torch.uint8)  # codes that no form has been chosen for
    args = PackedArgs(
        empty, write_table(rows), None, packed.shape, dense_bits, write_scales(packed.scales()), "dense"
    )
    # Weights are read on the CPU; a network that is moved chooses again (`PackedWeight._apply`).
    form = best_form(args, dense_bits, uses, "cpu").name
    bits = tiled_bits(dense_bits) if form in TRANSCODERS else dense_bits  # in memory some widths are not there
    codes, end = torch.empty(_code_bytes(form, packed.shape, bits), dtype=torch.uint8), 0
    unit = _unit(form, packed.shape, bits)
    for some, mask in packed.unpack_pieces(max(1, _PIECE // unit) * unit):
        # No overflow: 257 symbols have gone the other way.
        symbols = (some + has_zeros).mul_(mask)
        shaped = symbols.view(-1, *packed.shape[1:]) if form in TRANSCODERS else symbols
        written = _write_symbols(form, shaped, bits)
        codes[end : end + len(written)] = written
        end += len(written)
    return args._replace(codes=codes, bits=bits, form=form), dense_bits


def _unit(form: str, shape: tuple[int, ...], bits: int) -> int:
    """Return so many weights as a form's codes are whole words of: some weights, rows of a tile, or rows."""
    if form not in TRANSCODERS:
        return 8
    return (ROWS if form == "tiled" else 16 // bits) * math.prod(shape[1:])


def _bitmap_args(coded: CodedTensor) -> tuple[PackedArgs, int]:
    layout = get_layout("bitmap")
    bits = layout.bits(coded.num_components, has_zeros=True)
    parts = layout.pack_parts(coded, bits)
    table = write_table(coded.codebook)  # uint8 [G, 4 · K]: zero is what the mask says
    scales = write_scales(coded.scales)
    return PackedArgs(parts["codes"], table, parts["mask"], coded.shape, bits, scales, "bitmap"), bits


def with_form(args: PackedArgs, form: str, bits: int) -> PackedArgs:
    """Return a weight with its codes in the order of another form; the bitmap form has no other.

    Args:
        args: the weight.
        form: to write.
        bits: of a code in the dense form.
    """
    if form == args.form:
        return args
    symbols, _ = read_symbols(args)
    return _with_symbols(args, form, symbols.view(args.shape), bits)


def codes_in_form(codes: Tensor, form: str, bits: int, shape: tuple[int, ...]) -> Tensor:
    """Return dense codes, uint8 ``[bytes]``, in the order of a form."""
    if form not in TRANSCODERS:
        return codes
    symbols = unpack_bits(codes, bits, math.prod(shape)).view(shape)
    return TRANSCODERS[form][0](symbols, tiled_bits(bits))


def read_coded(args: PackedArgs, checked: bool = True) -> CodedTensor:
    """Return the weight as codes, mask and codebook, on the CPU.

    Args:
        args: the weight.
        checked: whether codes may be wrong, as those of a foreign state dict.

    Raises:
        NetworkError: they are.
    """
    symbols, mask = read_symbols(args)  # [numel]
    table = read_table(args)  # [G, S]
    if mask is None:
        # Bits, not values: -0.0 is a codebook value. That the first column is 0.0 is what says that there are
        # zeros.
        has_zeros = not table[:, 0].view(torch.int32).any()  # no stored codebook value is 0.0
        mask = symbols != 0 if has_zeros else torch.ones_like(symbols, dtype=torch.bool)
        symbols = symbols.sub_(mask.view(torch.uint8)) if has_zeros else symbols  # symbol k + 1 is code k
        table = table[:, has_zeros:]
    # Checks read every code once more; those that this program has written need none.
    make = CodedTensor if checked else CodedTensor.unchecked
    return make(symbols.view(args.shape), mask.view(args.shape), table.contiguous(), read_scales(args))


def _with_symbols(args: PackedArgs, form: str, symbols: Tensor, bits: int) -> PackedArgs:
    """Write symbols, uint8 ``[*shape]``, as a form's codes."""
    kept = tiled_bits(bits) if form in TRANSCODERS else bits  # in memory some widths are not there
    return args._replace(codes=_write_symbols(form, symbols, kept), bits=kept, form=form)


def _write_symbols(form: str, symbols: Tensor, bits: int) -> Tensor:
    """Return the codes, uint8 ``[bytes]``, of symbols: all, or whole units of ``_UNITS`` of them."""
    return TRANSCODERS[form][0](symbols, bits) if form in TRANSCODERS else pack_bits(symbols, bits)


def _code_bytes(form: str, shape: tuple[int, ...], bits: int) -> int:
    """Return the bytes that the codes of a weight take in a form."""
    if form == "tiled":
        return tiled_size(shape, bits)
    return rows_size(shape, bits) if form == "rows" else packed_size(math.prod(shape), bits)
