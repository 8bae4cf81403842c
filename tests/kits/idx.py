"""The idx format, written as its description says it."""

import struct

import numpy as np


def idx_bytes(array: np.ndarray) -> bytes:
    """The file of an array of unsigned bytes."""
    header = b"\x00\x00\x08" + bytes([array.ndim]) + b"".join(struct.pack(">I", n) for n in array.shape)
    return header + array.astype(np.uint8).tobytes()
