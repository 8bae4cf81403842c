"""Triton kernels on packed weights ``[N, K]``, the forms ``dense`` and ``bitmap``.

A row is read in *units* of ``PER`` whole codes, the first in the lowest bits; a tile is ``[BN, BU]`` units. What
``UNIT`` says: 1, a unit is one element of the pointer's type; 3, 5 or 7, it is that many bytes; 0, rows do not
begin at whole units: a unit is one code, read from the one or two bytes that it lies in. In the bitmap form a unit
is one code too, or -1 for a zero: its place among the codes is the row's rank at the tile's begin (``ranks``) plus
the non-zeros before it in the tile.

Tables hold float32. ``GROUPING`` says which row of the table: 0, there is one; 1, ``SPAN`` rows of the weight
share one; 2, ``SPAN`` units of a row do; 3, ``SPAN`` weights of the flat tensor do. Scales are of rows, where
``SCALED``, or of ``PARTS`` equal parts of each, by which weights are multiplied. Sums are in float32; those
over parts of K are written to memory and added in order by :func:`finish`, without atomics, so that results
repeat.
"""

import triton
import triton.language as tl


@triton.jit
def code_at(codes, place, here, code_bytes, BITS: tl.constexpr):
    """Return the codes number ``place`` (int64) of the stream."""
    bit = place * BITS
    byte = bit >> 3
    found = tl.load(codes + byte, mask=here, other=0).to(tl.int32)
    if 8 % BITS != 0:
        # Widths that do not divide 8 may reach into the next byte, which the last code does not have.
        found |= tl.load(codes + byte + 1, mask=here & (byte + 1 < code_bytes), other=0).to(tl.int32) << 8
    return (found >> (bit & 7).to(tl.int32)) & ((1 << BITS) - 1)


@triton.jit
def load_units(
    codes, mask, ranks, rows, units, here, inputs, code_bytes,
    BITS: tl.constexpr, UNIT: tl.constexpr, PER: tl.constexpr, BITMAP: tl.constexpr, BU: tl.constexpr,
):  # fmt: skip
    """Return units ``[BN, BU]`` of rows ``[BN, 1]`` (int64), at ``units`` ``[1, BU]``, a multiple of BU."""
    if BITMAP:
        place = rows * inputs + units
        bit = tl.load(mask + (place >> 3), mask=here, other=0).to(tl.int32) >> (place & 7).to(tl.int32)
        keep = tl.where(here, bit & 1, 0)  # [BN, BU]
        chunk = tl.min(units, 1, keep_dims=True) // BU
        rank = tl.load(ranks + rows * tl.cdiv(inputs, BU) + chunk)  # [BN, 1]
        place = rank + (tl.cumsum(keep, 1) - keep)  # exclusive: codes before this one
        there = (keep == 1) & (((place * BITS) >> 3) < code_bytes)  # whatever the mask says
        found = tl.where(there, code_at(codes, place, there, code_bytes, BITS), -1)
    elif UNIT == 0:
        found = code_at(codes, rows * inputs + units, here, code_bytes, BITS)
    else:
        place = (rows * (inputs // PER) + units) * UNIT
        found = tl.load(codes + place, mask=here, other=0)
        if UNIT > 1:
            # Bytes are loaded one by one: units of 3, 5 or 7 bytes begin anywhere.
            found = found.to(tl.int64 if UNIT > 4 else tl.int32)
            for byte in tl.static_range(1, UNIT):
                found |= tl.load(codes + place + byte, mask=here, other=0).to(found.dtype) << (8 * byte)
    return found


@triton.jit
def groups_of(rows, units, inputs, GROUPING: tl.constexpr, SPAN: tl.constexpr, PER: tl.constexpr):
    """Return the table's rows, ``[BN, 1]`` or ``[BN, BU]``; units behind the last count as the last."""
    per_row = inputs // PER
    if GROUPING == 1:
        group = rows // SPAN
    elif GROUPING == 2:
        group = rows * (per_row // SPAN) + tl.minimum(units, per_row - 1) // SPAN
    elif GROUPING == 3:
        group = (rows * inputs + tl.minimum(units, per_row - 1)) // SPAN
    else:
        group = tl.zeros_like(rows)
    return group


@triton.jit
def scales_of(scales, rows, units, inputs, PARTS: tl.constexpr, PER: tl.constexpr):
    """Return the scales of units, ``[BN, BU]``, float32: of the parts of rows ``[BN, 1]`` that they are in."""
    per_row = inputs // PER
    part = tl.minimum(units, per_row - 1) // (per_row // PARTS)
    return tl.load(scales + rows * PARTS + part).to(tl.float32)


@triton.jit
def entries_of(table, size, BITS: tl.constexpr):
    """Return the only row of the table, as long as codes reach; behind its end are zeros."""
    entry = tl.arange(0, 1 << BITS)
    return tl.load(table + entry, mask=entry < size, other=0.0)


@triton.jit
def values(
    entries, table, groups, units, place, size, BITS: tl.constexpr, BITMAP: tl.constexpr, GROUPING: tl.constexpr
):
    """Return the weights of the codes number ``place`` of their units, float32; 0 for codes beyond the table."""
    code = units if BITMAP else ((units >> (place * BITS)) & ((1 << BITS) - 1)).to(tl.int32)
    if GROUPING != 0:
        found = tl.load(table + groups * size + code, mask=(code >= 0) & (code < size), other=0.0)
    else:  # from shared memory: as a load of global memory, each weight would cost three instructions more
        number: tl.constexpr = code.shape[0] * code.shape[1]
        found = tl.gather(entries, tl.reshape(tl.maximum(code, 0) if BITMAP else code, [number]), 0)
        found = tl.reshape(found, code.shape)
        if BITMAP:
            found = tl.where(code >= 0, found, 0.0)
    return found


@triton.jit
def store_sums(
    out, sums, scales, bias, columns, inside, PARTIAL: tl.constexpr, SCALED: tl.constexpr, BIASED: tl.constexpr
):
    """Scale, add the bias, round and store; sums over a part of K are stored as they are."""
    if not PARTIAL:
        if SCALED:
            sums = sums * tl.load(scales + columns)
        if BIASED:
            sums = sums + tl.load(bias + columns).to(tl.float32)
    tl.store(out, sums.to(out.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["inputs"])  # unaligned rows: a lane reads one unit of many rows, not many of one
def vector(
    x, codes, table, mask, ranks, scales, bias, out,
    outputs, inputs, size, code_bytes, x_row, x_unit, x_place, units_per_split,
    BITS: tl.constexpr, UNIT: tl.constexpr, PER: tl.constexpr, BITMAP: tl.constexpr, GROUPING: tl.constexpr,
    SPAN: tl.constexpr, PARTS: tl.constexpr, SCALED: tl.constexpr, BIASED: tl.constexpr, PARTIAL: tl.constexpr,
    BN: tl.constexpr, BU: tl.constexpr,
):  # fmt: skip
    """Write ``out[s, m, n]``, the sum over the s-th part of K: BN outputs and one row of x a program."""
    split, m = tl.program_id(1), tl.program_id(2)
    columns = tl.program_id(0) * BN + tl.arange(0, BN)
    # Clamped, not masked: programs behind the last output read its row once more. int64: rows times K may pass
    # 2^31.
    rows = tl.minimum(columns, outputs - 1).to(tl.int64)[:, None]
    first = split * units_per_split
    end = tl.minimum(first + units_per_split, inputs // PER)
    # Added up over BU at the very end: no sum across lanes within the loop.
    sums = tl.zeros((BN, BU), tl.float32)
    entries = entries_of(table, size, BITS)
    for start in range(first, end, BU):
        units = start + tl.arange(0, BU)[None, :]  # [1, BU]
        here = units < end
        tile = load_units(
            codes, mask, ranks, rows, units, here & (rows >= 0), inputs, code_bytes, BITS, UNIT, PER, BITMAP, BU
        )
        groups = groups_of(rows, units, inputs, GROUPING, SPAN, PER)
        if PARTS:
            factors = scales_of(scales, rows, units, inputs, PARTS, PER)
        # Code after code of all units: each takes its own operand of x, as far apart as codes are in a unit.
        for place in tl.static_range(PER):
            operand = tl.load(x + m * x_row + units * x_unit + place * x_place, mask=here, other=0.0)
            weight = values(entries, table, groups, tile, place, size, BITS, BITMAP, GROUPING)
            if PARTS:
                weight = weight * factors
            sums += weight * operand.to(tl.float32)
    columns_there = columns < outputs
    columns = tl.minimum(columns, outputs - 1)
    to = out + (split * tl.num_programs(2) + m).to(tl.int64) * outputs + columns
    store_sums(to, tl.sum(sums, 1), scales, bias, columns, columns_there, PARTIAL, SCALED, BIASED)


@triton.jit
def matrix(
    x, codes, table, mask, ranks, scales, bias, out,
    x_rows, outputs, inputs, size, code_bytes, x_row, x_unit, x_place, units_per_split,
    BITS: tl.constexpr, UNIT: tl.constexpr, PER: tl.constexpr, BITMAP: tl.constexpr, GROUPING: tl.constexpr,
    SPAN: tl.constexpr, PARTS: tl.constexpr, SCALED: tl.constexpr, BIASED: tl.constexpr, PARTIAL: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BU: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """Write ``out[s, m, n]`` by tensor cores: all rows of x and BN outputs a program, weights rounded as x is."""
    split = tl.program_id(1)
    columns = tl.program_id(0) * BN + tl.arange(0, BN)
    rows = tl.minimum(columns, outputs - 1).to(tl.int64)[:, None]
    m = tl.arange(0, BM)[:, None]
    first = split * units_per_split
    end = tl.minimum(first + units_per_split, inputs // PER)
    sums = tl.zeros((BM, BN), tl.float32)
    entries = entries_of(table, size, BITS)
    for start in range(first, end, BU):
        units = start + tl.arange(0, BU)[None, :]
        here = units < end
        tile = load_units(
            codes, mask, ranks, rows, units, here & (rows >= 0), inputs, code_bytes, BITS, UNIT, PER, BITMAP, BU
        )
        groups = groups_of(rows, units, inputs, GROUPING, SPAN, PER)
        if PARTS:
            factors = scales_of(scales, rows, units, inputs, PARTS, PER)
        for place in tl.static_range(PER):
            operand = tl.load(
                x + m * x_row + units * x_unit + place * x_place, mask=here & (m < x_rows), other=0.0
            )
            weight = values(entries, table, groups, tile, place, size, BITS, BITMAP, GROUPING)
            if PARTS:
                weight = weight * factors
            weight = weight.to(operand.dtype)
            if UPCAST:  # the interpreter's products of bfloat16 are garbage
                sums = tl.dot(operand.to(tl.float32), tl.trans(weight.to(tl.float32)), sums)
            else:
                sums = tl.dot(operand, tl.trans(weight), sums)
    columns_there = (columns < outputs)[None, :] & (m < x_rows)
    columns = tl.minimum(columns, outputs - 1)[None, :]
    to = out + (split * x_rows + m).to(tl.int64) * outputs + columns
    store_sums(to, sums, scales, bias, columns, columns_there, PARTIAL, SCALED, BIASED)


@triton.jit
def finish(
    partial, scales, bias, out, outputs, splits, SCALED: tl.constexpr, BIASED: tl.constexpr, BN: tl.constexpr
):
    """Write ``out[m, n]``: the parts' sums ``partial[s, m, n]`` added from the first to the last."""
    m, rows = tl.program_id(1), tl.num_programs(1)
    columns = tl.program_id(0) * BN + tl.arange(0, BN)
    inside = columns < outputs
    sums = tl.zeros((BN,), tl.float32)
    for split in range(splits):
        sums += tl.load(partial + (split * rows + m).to(tl.int64) * outputs + columns, mask=inside, other=0.0)
    columns = tl.minimum(columns, outputs - 1)
    store_sums(
        out + m.to(tl.int64) * outputs + columns, sums, scales, bias, columns, inside, False, SCALED, BIASED
    )


@triton.jit
def decode_rows(
    indices, codes, table, mask, ranks, scales, out, outputs, inputs, size, code_bytes,
    BITS: tl.constexpr, UNIT: tl.constexpr, PER: tl.constexpr, BITMAP: tl.constexpr, GROUPING: tl.constexpr,
    SPAN: tl.constexpr, PARTS: tl.constexpr, SCALED: tl.constexpr, GATHER: tl.constexpr, BU: tl.constexpr,
):  # fmt: skip
    """Write ``out[i, k]``: rows of the weight, all or those asked for; NaN where an index is outside of it."""
    i = tl.program_id(0).to(tl.int64)
    row = tl.load(indices + i).to(tl.int64) if GATHER else i
    inside = (row >= 0) & (row < outputs)
    row = tl.where(inside, row, 0)
    rows = row + tl.zeros((1, 1), tl.int64)
    units = tl.program_id(1) * BU + tl.arange(0, BU)[None, :]
    here = units < inputs // PER
    tile = load_units(codes, mask, ranks, rows, units, here, inputs, code_bytes, BITS, UNIT, PER, BITMAP, BU)
    groups = groups_of(rows, units, inputs, GROUPING, SPAN, PER)
    places = tl.arange(0, PER)[None, :]  # units are [1, BU]: a tile's weights are [BU, PER]
    tile, groups, here = tl.trans(tile), tl.trans(groups), tl.trans(here)
    entries = entries_of(table, size, BITS)
    weight = values(entries, table, groups, tile, places, size, BITS, BITMAP, GROUPING)
    if SCALED:
        weight = weight * tl.load(scales + row)
    if PARTS:
        weight = weight * tl.trans(scales_of(scales, rows, units, inputs, PARTS, PER))
    if GATHER:
        # A GPU cannot raise; NaN shows, where a clamped row would be a wrong answer.
        weight = tl.where(inside, weight, float("nan"))
    to = out + i * inputs + tl.trans(units) * PER + places
    tl.store(to, weight.to(out.dtype.element_ty), mask=here)


@triton.jit
def count_nonzeros(mask, counts, inputs, BU: tl.constexpr):
    """Write ``counts[row, chunk]``: the non-zeros of each BU weights of a row."""
    row, chunk = tl.program_id(0).to(tl.int64), tl.program_id(1)
    k = chunk * BU + tl.arange(0, BU)
    place = row * inputs + k
    bit = tl.load(mask + (place >> 3), mask=k < inputs, other=0).to(tl.int32) >> (place & 7).to(tl.int32)
    tl.store(counts + row * tl.num_programs(1) + chunk, tl.sum(tl.where(k < inputs, bit & 1, 0)))
