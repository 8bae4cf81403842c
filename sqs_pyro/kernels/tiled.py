"""The run-time layout of CPU kernels: tiles of 16 output rows, a 32-bit lane a row.

A tile's codes are 64-byte words of 16 lanes. A word holds the codes of ``2 P`` consecutive inputs,
``P = 16 // bits``: in a lane's low half those of inputs 0, 2, 4, ..., from the lowest bit up, in its high half
those of inputs 1, 3, 5, ... Rows behind the last and inputs behind the last have code 0. Codes of 6 and 7 bits
take 8.

The weight of a convolution is tiled as the matrix ``[outputs, taps · channels]``: the channels of a tap side by
side, with one of code 0 behind an odd number of them, so that pairs of inputs are pairs of channels.

``kernels/cpu/tiled.cpp`` and ``kernels/cpu/convolution.h`` multiply with it.
"""

import math

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

ROWS = 16
# Widths of which 16 bits hold as many whole codes as of the next one (6, 7) are not there.
_BITS = (1, 2, 3, 4, 5, 8)


def tiled_bits(bits: int) -> int:
    """Return the bits that codes of ``bits`` bits take: the next of 1, 2, 3, 4, 5 and 8."""
    return next(allowed for allowed in _BITS if allowed >= bits)


def tiled_size(shape: tuple[int, ...], bits: int) -> int:
    """Return the bytes of the codes of a weight."""
    outputs, inputs = _matrix_shape(shape)
    return -(-outputs // ROWS) * -(-inputs // (2 * (16 // bits))) * 4 * ROWS


def pack_tiles(symbols: Tensor, bits: int) -> Tensor:
    """Write symbols, each below ``2**bits``, as uint8 ``[bytes]``.

    Args:
        symbols: uint8 ``[outputs, inputs]`` or, of a convolution, ``[outputs, channels, *kernel]``, on the CPU.
        bits: 1, 2, 3, 4, 5 or 8.
    """
    symbols = _as_matrix(symbols)
    pairs = 16 // bits
    outputs, inputs = symbols.shape
    tiles, words = -(-outputs // ROWS), -(-inputs // (2 * pairs))  # of 16 rows, and of 2 P inputs
    packed = np.empty((tiles, words, ROWS), dtype="<u4")
    for tile in range(tiles):  # one at a time: as wide words they would take 4 times the memory of the codes
        part = np.zeros((ROWS, words * 2 * pairs), dtype=np.uint8)  # [16, padded inputs]
        rows = symbols[tile * ROWS : (tile + 1) * ROWS].numpy()
        part[: len(rows), :inputs] = rows
        places = part.reshape(ROWS, words, pairs, 2)  # [row, word, pair, half]
        lanes = np.zeros((ROWS, words), dtype=np.uint32)
        for pair in range(pairs):
            for half in range(2):
                lanes |= places[:, :, pair, half].astype(np.uint32) << np.uint32(16 * half + bits * pair)
        packed[tile] = lanes.T  # [words, 16]: a word's lanes side by side, as a vector register takes them
    return torch.from_numpy(packed.view(np.uint8).reshape(-1))


def unpack_tiles(packed: Tensor, bits: int, shape: tuple[int, ...]) -> Tensor:
    """Return the symbols, uint8 ``[*shape]``, that :func:`pack_tiles` has written."""
    pairs = 16 // bits
    outputs, inputs = _matrix_shape(shape)
    # [tile, word, row]
    lanes = packed.cpu().contiguous().numpy().view("<u4").reshape(-(-outputs // ROWS), -1, ROWS)
    symbols = np.empty((len(lanes) * ROWS, lanes.shape[1], pairs, 2), dtype=np.uint8)  # [row, word, pair, half]
    for pair in range(pairs):
        for half in range(2):
            codes = (lanes >> np.uint32(16 * half + bits * pair)) & np.uint32(2**bits - 1)
            symbols[:, :, pair, half] = codes.transpose(0, 2, 1).reshape(len(symbols), -1)
    matrix = symbols.reshape(len(symbols), -1)[:outputs, :inputs]
    return _as_weight(torch.from_numpy(np.ascontiguousarray(matrix)), shape)


def _matrix_shape(shape: tuple[int, ...]) -> tuple[int, int]:
    outputs, inputs, *kernel = shape
    return outputs, (inputs + inputs % 2 if kernel else inputs) * math.prod(kernel)  # channels in pairs


def _as_matrix(symbols: Tensor) -> Tensor:
    if symbols.dim() == 2:
        return symbols
    channels_last = F.pad(symbols.movedim(1, -1), (0, symbols.shape[1] % 2))  # [outputs, *kernel, channels]
    return channels_last.reshape(len(symbols), -1)


def _as_weight(matrix: Tensor, shape: tuple[int, ...]) -> Tensor:
    if len(shape) == 2:
        return matrix
    outputs, channels, *kernel = shape
    return matrix.view(outputs, *kernel, -1)[..., :channels].movedim(-1, 1).contiguous()
