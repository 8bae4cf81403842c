"""The run-time layout of CPU kernels for matrices of several codebooks or scales: chunks of 32 inputs of one row.

A row is cut into chunks of 32 inputs, the last filled up with code 0. Codes of the chunks of all rows, one after
the other, are in 64-byte words of 32 halves: a word holds ``P = 16 // bits`` chunks, code c of half h, from the
lowest bit up, belongs to input h of its chunk c. Codes of 6 and 7 bits take 8.

``kernels/cpu/rows.cpp`` multiplies with it. A codebook serves whole rows, or a multiple of 32 inputs of one; a
scale likewise.
"""

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

_HALVES = 32


def fits_rows(shape: tuple[int, ...], groups: int, parts: int = 1) -> bool:
    """Return whether the kernels can multiply with a weight of ``groups`` codebooks and ``parts`` scales a row."""
    if len(shape) != 2:
        return False
    outputs, inputs = shape
    if parts > 1 and inputs % (parts * _HALVES):
        return False
    # Whole rows share a codebook, or parts of a row of whole words' chunks do: a register holds one table at a
    # time.
    return outputs % groups == 0 or (groups % outputs == 0 and inputs % (groups // outputs * _HALVES) == 0)


def rows_size(shape: tuple[int, ...], bits: int) -> int:
    """Return the bytes of the codes of a weight ``[outputs, inputs]``."""
    outputs, inputs = shape
    return -(-outputs * -(-inputs // _HALVES) // (16 // bits)) * 2 * _HALVES


def pack_rows(symbols: Tensor, bits: int) -> Tensor:
    """Write symbols, uint8 ``[outputs, inputs]``, each below ``2**bits``, as uint8 ``[bytes]``.

    Args:
        symbols: on the CPU; of a part of a weight's rows, ``16 // bits`` of them or a multiple.
        bits: 1, 2, 3, 4, 5 or 8.
    """
    places = 16 // bits
    chunks = F.pad(symbols, (0, -symbols.shape[1] % _HALVES)).view(-1, _HALVES)
    padded = F.pad(chunks, (0, 0, 0, -len(chunks) % places)).numpy().reshape(-1, places, _HALVES)
    halves = np.zeros((len(padded), _HALVES), dtype="<u2")  # [words, 32]
    for place in range(places):
        halves |= padded[:, place].astype(np.uint16) << np.uint16(bits * place)  # [words, 32]
    return torch.from_numpy(halves.view(np.uint8).reshape(-1))


def unpack_rows(packed: Tensor, bits: int, shape: tuple[int, ...]) -> Tensor:
    """Return the symbols, uint8 ``[*shape]``, that :func:`pack_rows` has written."""
    outputs, inputs = shape
    halves = packed.cpu().contiguous().numpy().view("<u2").reshape(-1, _HALVES)
    codes = [(halves >> np.uint16(bits * place)) & np.uint16(2**bits - 1) for place in range(16 // bits)]
    # [words, P, 32] -> [chunks, 32] -> [outputs, padded inputs]
    chunks = np.stack(codes, axis=1).astype(np.uint8).reshape(-1, _HALVES)[: outputs * -(-inputs // _HALVES)]
    return torch.from_numpy(chunks.reshape(outputs, -1)[:, :inputs].copy())
