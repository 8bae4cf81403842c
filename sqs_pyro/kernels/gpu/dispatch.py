"""Which kernel multiplies, and in which blocks: one small table, nothing is tuned at run time.

The figures follow from counting, not from measurements: enough programs for every multiprocessor, 16 to 32
loads in flight in each thread, no spilled registers (``benchmarks/gpu_kernels_resources.json``).
"""

from dataclasses import dataclass
from typing import Literal

#: The CUDA kernels read 32 codes at once, and multiply up to 16 rows of x.
CUDA_ROWS, CUDA_BITS, CUDA_CODES = 16, 4, 32
MOST_ROWS = 64
#: Programs that keep a large GPU busy: 4 for each of some 130 multiprocessors.
_PROGRAMS = 512
#: Weights that a bitmap's tile takes in a row; there is a rank for each of them.
CHUNK = 128


@dataclass(frozen=True)
class Plan:
    """How one product is computed.

    Attributes:
        kernel: ``"cuda"``: compiled by nvcc; the others are Triton's. ``"vector"``: sums of products, one row
            of x at a time; ``"matrix"``: tensor cores; ``"decode"``: the weight is decoded for this product,
            which is torch's.
        rows: of x in a program.
        outputs: in a program.
        units: of a row that a tile takes, see :mod:`~sqs_pyro.kernels.gpu.triton_kernels`.
        splits: parts of K, summed by different programs.
        warps: of a program.
        stages: of its software pipeline.
    """

    kernel: Literal["cuda", "vector", "matrix", "decode"]
    rows: int = 1
    outputs: int = 0
    units: int = 0
    splits: int = 1
    warps: int = 4
    stages: int = 2


def plan(
    rows: int,
    outputs: int,
    units: int,
    half: bool,
    bitmap: bool = False,
    grouped: bool = False,
    cuda: bool = False,
) -> Plan:
    """Choose.

    Args:
        rows: M, of x.
        outputs: N.
        units: of a row of the weight; a unit is one code or several, by bits and K.
        half: whether x is float16 or bfloat16: float32 has no exact product on tensor cores.
        bitmap: whether the weight is in that form, whose tiles are of :data:`CHUNK` weights.
        grouped: whether the table has several rows: look-ups take more registers, so tiles are smaller.
        cuda: whether the weight is one for the CUDA kernels, see :func:`for_cuda`.
    """
    # Few rows are bound by reading codes, which the CUDA kernels do best.
    if cuda and half and rows <= CUDA_ROWS:
        return Plan("cuda")
    # Tensor cores take 16 rows: of one or of float32 most of the work would be thrown away.
    if rows == 1 or (rows <= 4 and not half):
        deep = CHUNK if bitmap else _power(units, 32, 128)
        return _split(Plan("vector", 1, 8 if grouped else 16, deep), outputs, units, programs_each=rows)
    # Here decoding costs little beside the product, which torch's own libraries do best.
    if rows > MOST_ROWS or not half:
        return Plan("decode")
    high = _power(rows, 16, MOST_ROWS)
    if bitmap:
        return _split(Plan("matrix", high, 16, CHUNK), outputs, units)
    wide = 64 if outputs >= 64 and not grouped else 32
    deep = _power(units, 16, 32 if high < MOST_ROWS else 16)
    return _split(Plan("matrix", high, wide, deep, warps=wide // 8), outputs, units)


def for_cuda(inputs: int, bits: int, groups: int) -> bool:
    """Return whether the CUDA kernels multiply with such a weight in the dense form."""
    return bits <= CUDA_BITS and inputs % CUDA_CODES == 0 and groups == 1


def _split(chosen: Plan, outputs: int, units: int, programs_each: int = 1) -> Plan:
    """Cut K into as many parts as give every multiprocessor work; a part is whole tiles."""
    # At most 16 parts: their float32 sums are written and read once more.
    blocks = -(-outputs // chosen.outputs) * programs_each
    tiles = -(-units // chosen.units)
    wanted = max(1, min(tiles, _PROGRAMS // blocks, 16))
    splits = -(-tiles // -(-tiles // wanted))  # no part without a tile
    return Plan(chosen.kernel, chosen.rows, chosen.outputs, chosen.units, splits, chosen.warps, chosen.stages)


def _power(number: int, least: int, most: int) -> int:
    """Return the next power of two, within bounds."""
    return min(max(least, 1 << (number - 1).bit_length()), most)


def unit_of(bits: int, inputs: int, span: int | None) -> tuple[int, int, int]:
    """Say how a row of codes is read: whole units where rows begin at whole units, else code by code.

    Args:
        bits: of a code.
        inputs: K.
        span: the weights of a row that share a row of the table, where there are several in a row; None elsewhere.

    Returns:
        ``(UNIT, PER, size)`` of :mod:`~sqs_pyro.kernels.gpu.triton_kernels`, and the bytes of an element to read.
    """
    if 8 % bits == 0:
        wide = min(8 * bits, 32)  # of a load: 8 codes, or 4 of 8 bits
        choices = [(1, size * 8 // bits, size) for size in (4, 2, 1) if size * 8 <= wide]
    else:
        # The fewest bytes of whole codes: 3, 5 or 7 bytes hold 8 codes of as many bits, 3 bytes 4 codes of 6.
        unit = bits if bits % 2 else bits // 2
        choices = [(unit, unit * 8 // bits, 1)]
    for unit, per, size in choices:
        # A unit lies in one row, and under one row of the table.
        if inputs % per == 0 and (span is None or span % per == 0):
            return unit, per, size
    return 0, 1, 1
