"""The idx format of MNIST and its relatives."""

import gzip
import math
import struct
import zlib
from pathlib import Path
from typing import IO, cast

import torch
from torch import Tensor

from sqs_pyro.errors import DataError

_UNSIGNED_BYTE = 0x08
_MOST_SHRUNK = 100  # images compress to a third, constant ones to a thousandth: those may be small
_ALWAYS_ALLOWED = 1 << 24  # bytes; 16 MiB, whatever they were shrunk to


def read_idx(path: Path, ndim: int) -> Tensor:
    """Read a file of unsigned bytes, gzip-compressed or not.

    The format: two zero bytes, the type (0x08), the number of dimensions, each dimension as a big-endian
    32-bit integer, and then the bytes in row-major order, no more and no fewer.

    Returns:
        uint8 tensor with `ndim` dimensions.

    Raises:
        DataError: naming the file, where it cannot be read, is of another kind, or is truncated.
    """
    try:
        size, is_gzip = path.stat().st_size, path.suffix == ".gz"
        # A header may promise 2^96 bytes, and a small .gz may deliver gigabytes: neither is believed.
        most = _ALWAYS_ALLOWED + _MOST_SHRUNK * size if is_gzip else size
        with gzip.open(path) if is_gzip else path.open("rb") as stream:
            return _images(cast(IO[bytes], stream), ndim, path, most)
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise DataError(f"'{path}' is truncated or altered ({error}); fetch it again.") from None
    except OSError as error:
        raise DataError(f"'{path}' cannot be read: {error.strerror or error}.") from None


def _images(stream: IO[bytes], ndim: int, path: Path, most: int) -> Tensor:
    """Read the header, and then no more bytes than it promises; ``most`` of them are believed."""
    expected = bytes([0, 0, _UNSIGNED_BYTE, ndim])
    begin = stream.read(4)
    if begin != expected:
        raise DataError(
            f"'{path}' is not an idx file of bytes with {ndim} dimensions: it begins with "
            f"0x{begin.hex()} instead of 0x{expected.hex()}; fetch it again."
        )
    sizes = stream.read(4 * ndim)
    if len(sizes) < 4 * ndim:
        raise DataError(f"'{path}' is truncated: it ends within its header; fetch it again.")
    shape = struct.unpack(f">{ndim}I", sizes)
    promised = math.prod(shape)
    # One byte more than promised: that something follows is an error, too.
    content = bytearray(stream.read(min(promised, most) + 1))  # a bytearray, for tensors must be writable
    if len(content) != promised:
        follow = len(content) if path.suffix == ".gz" else path.stat().st_size - 4 - 4 * ndim
        raise DataError(
            f"'{path}' is truncated or altered: its header promises {promised} bytes ({shape}), but "
            f"{follow} follow; fetch it again."
        )
    if not promised:
        raise DataError(f"'{path}' holds no examples: its dimensions are {shape}; fetch it again.")
    return torch.frombuffer(content, dtype=torch.uint8).reshape(shape)
