"""The idx format of MNIST and its relatives."""

import gzip
import math
import struct
import zlib
from pathlib import Path

import torch
from torch import Tensor

from sqs_pyro.errors import DataError

_UNSIGNED_BYTE = 0x08


def read_idx(path: Path, ndim: int) -> Tensor:
    """Read a file of unsigned bytes, gzip-compressed or not.

    The format: two zero bytes, the type (0x08), the number of dimensions, each dimension as a big-endian
    32-bit integer, and then the bytes in row-major order, no more and no fewer.

    Returns:
        uint8 tensor with `ndim` dimensions.

    Raises:
        DataError: naming the file, where it cannot be read, is of another kind, or is truncated.
    """
    content = _read(path)
    expected = bytes([0, 0, _UNSIGNED_BYTE, ndim])
    if content[:4] != expected:
        raise DataError(
            f"'{path}' is not an idx file of bytes with {ndim} dimensions: it begins with "
            f"0x{content[:4].hex()} instead of 0x{expected.hex()}; fetch it again."
        )
    header = 4 + 4 * ndim
    if len(content) < header:
        raise DataError(f"'{path}' is truncated: it ends within its header; fetch it again.")
    shape = struct.unpack(f">{ndim}I", content[4:header])
    if len(content) - header != math.prod(shape):
        raise DataError(
            f"'{path}' is truncated or altered: its header promises {math.prod(shape)} bytes ({shape}), but "
            f"{len(content) - header} follow; fetch it again."
        )
    if not math.prod(shape):
        raise DataError(f"'{path}' holds no examples: its dimensions are {shape}; fetch it again.")
    return torch.frombuffer(content, dtype=torch.uint8, offset=header).reshape(shape)


def _read(path: Path) -> bytearray:
    """The file's bytes, decompressed where its name says so; a bytearray, for tensors must be writable."""
    try:
        content = path.read_bytes()
        return bytearray(gzip.decompress(content) if path.suffix == ".gz" else content)
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise DataError(f"'{path}' is truncated or altered ({error}); fetch it again.") from None
    except OSError as error:
        raise DataError(f"'{path}' cannot be read: {error.strerror}.") from None
