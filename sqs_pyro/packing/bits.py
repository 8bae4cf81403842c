"""Bit-packing: n values of b bits each, 1 <= b <= 8, in ceil(n·b/8) bytes.

Value i occupies bits ``i·b .. i·b + b - 1`` of the stream; bit j of the stream is bit ``j % 8`` (counted from
the least significant) of byte ``j // 8``. Bits behind the last value are 0.
"""

import numpy as np
import torch
from torch import Tensor

from sqs_pyro.errors import PackedFileError

MAX_BITS = 8


def packed_size(count: int, bits: int) -> int:
    """Return the number of bytes that ``count`` values of ``bits`` bits take."""
    return (count * bits + 7) // 8


def pack_bits(values: Tensor, bits: int) -> Tensor:
    """Pack uint8 ``values`` [n], each below ``2**bits``, into uint8 ``[ceil(n * bits / 8)]``.

    Raises:
        ValueError: if ``bits`` is not in 1..8, or a value needs more bits.
    """
    _check_bits(bits)
    flat = values.reshape(-1)
    if flat.dtype != torch.uint8:
        raise ValueError(f"pack_bits takes uint8 values, but {flat.dtype} was given.")
    if flat.numel() and int(flat.max()) >> bits:
        raise ValueError(f"Value {int(flat.max())} does not fit into {bits} bits.")
    # Eight values are b whole bytes: gather them in one little-endian 64-bit word and keep its low b bytes.
    octets = np.zeros((-(-flat.numel() // 8), 8), dtype=np.uint8)  # [n / 8, 8], the last row filled up
    octets.reshape(-1)[: flat.numel()] = flat.cpu().numpy()
    words = np.zeros(len(octets), dtype="<u8")  # [n / 8]
    for place in range(8):
        words |= octets[:, place].astype("<u8") << np.uint64(place * bits)
    stream = words.view(np.uint8).reshape(-1, 8)[:, :bits].reshape(-1)  # [n / 8, 8] -> [n / 8 · b]
    return torch.from_numpy(stream[: packed_size(flat.numel(), bits)].copy())


def unpack_bits(packed: Tensor, bits: int, count: int) -> Tensor:
    """Return the ``count`` values, uint8 ``[count]``, that :func:`pack_bits` has packed.

    Raises:
        PackedFileError: if ``packed`` does not have ``ceil(count * bits / 8)`` bytes, or padding is not 0.
    """
    _check_bits(bits)
    size = packed_size(count, bits)
    if packed.numel() != size:
        raise PackedFileError(f"{count} values of {bits} bits take {size} bytes, but {packed.numel()} are there")
    # Else the same values would have several encodings, and equal networks different files.
    _check_padding(packed, size * 8 - count * bits)
    octets = -(-count // 8)
    # The same words again: b bytes of each octet of values, the upper ones 0.
    stream = np.zeros(octets * bits, dtype=np.uint8)
    stream[:size] = packed.cpu().numpy()
    padded = np.zeros((octets, 8), dtype=np.uint8)  # the b bytes of eight values, as the low ones of 64 bits
    padded[:, :bits] = stream.reshape(octets, bits)
    words = padded.view("<u8").reshape(-1)  # [n / 8]
    values = np.empty((octets, 8), dtype=np.uint8)
    for place in range(8):
        values[:, place] = (words >> np.uint64(place * bits)) & np.uint64(2**bits - 1)
    return torch.from_numpy(values.reshape(-1)[:count])


def unpack_range(packed: Tensor, bits: int, total: int, start: int, count: int) -> Tensor:
    """Return ``count`` values behind the first ``start``, uint8 ``[count]``, of ``total`` that are packed.

    Raises:
        PackedFileError: the range comes to the end, and padding behind it is not 0.
    """
    # Eight values are whole bytes: what lies around the range in its first and last eight is read and dropped.
    first, last = start // 8 * 8, min(total, -(-(start + count) // 8) * 8)
    part = packed[packed_size(first, bits) : packed_size(last, bits)]
    return unpack_bits(part, bits, last - first)[start - first :][:count]


def _check_bits(bits: int) -> None:
    if not 1 <= bits <= MAX_BITS:
        raise ValueError(f"Bits per value must be 1 to {MAX_BITS}, but {bits} was given.")


def _check_padding(packed: Tensor, unused: int) -> None:
    if unused and int(packed[-1]) >> (8 - unused):  # the last byte's highest bits
        raise PackedFileError("bits behind the last value are set")
