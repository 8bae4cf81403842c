"""The law of :mod:`~sqs_pyro.packing.mixing`, compiled on first use, and in plain Python where it cannot be."""

import ctypes
import platform
import subprocess
import warnings
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from sqs_pyro.compiling import KernelWarning, compiled, compiler, run_together
from sqs_pyro.errors import PackedFileError
from sqs_pyro.packing.mixing import LOG_ODDS, Bits, Bytes, CodedShape, Range, Values, closed, code_weights
from sqs_pyro.packing.odds import LOGARITHMS, PROBABILITIES

_SOURCE = Path(__file__).with_name("mixing.cpp")
_FLAGS = ("-O3", "-std=c++20", "-shared", "-fPIC", "-fvisibility=hidden", "-w")


def encode_weights(shape: CodedShape, codes: Bytes, mask: Bits) -> Bytes:
    """Return the stream of codes ``[n]``, 0 where ``mask`` ``[n]`` is False."""
    values, library = Values.of(shape.codebook), _library()
    if library is None:
        coder = Range()
        code_weights(coder, shape, values, codes, mask.copy())
        settled, low, high = bytes(coder.settled), coder.low, coder.high
    else:
        size, room = 64 + shape.numel, 0
        while size > room:  # rarely twice: the library counts what there is no room for
            room, ends = size, np.zeros(2, np.uint32)
            stream = np.empty(room, np.uint8)
            arrays = [_TABLES, _sizes(shape, values), values.count, values.place, codes, mask, stream]
            size = _checked(library.sqs_encode(*map(_address, arrays), room, _address(ends)))
        settled, low, high = stream[:size].tobytes(), int(ends[0]), int(ends[1])
    return np.frombuffer(closed(settled, low, high), np.uint8).copy()


def decode_weights(shape: CodedShape, stream: Bytes) -> tuple[Bytes, Bits]:
    """Return codes ``[n]`` and mask ``[n]``.

    Raises:
        PackedFileError: the stream is none that :func:`encode_weights` returns.
    """
    codes, mask = np.zeros(shape.numel, np.uint8), np.full(shape.numel, shape.nonzeros > 0)
    values, library, given = Values.of(shape.codebook), _library(), stream.tobytes()
    if library is None:
        coder = Range(given)
        possible = code_weights(coder, shape, values, codes, mask)
        size, low, high = len(coder.settled), coder.low, coder.high
    else:
        ends = np.zeros(2, np.uint32)
        arrays = [_TABLES, _sizes(shape, values), values.count, values.code, codes, mask, stream]
        size = _checked(library.sqs_decode(*map(_address, arrays), len(stream), _address(ends)))
        possible, low, high = size >= 0, int(ends[0]), int(ends[1])
    # Else any number of files would decode to these weights.
    if not possible or closed(given[:size].ljust(size, b"\0"), low, high) != given:
        raise PackedFileError("the stream of mixed contexts is damaged: no weights are coded like this")
    return codes, mask


_TABLES = np.concatenate([LOGARITHMS.numpy(), LOG_ODDS, PROBABILITIES.numpy()]).astype(np.int32)


def _sizes(shape: CodedShape, values: Values) -> Any:
    groups, components = shape.codebook.shape
    known = [*shape.kernels, shape.width, shape.nonzeros, components, values.code.shape[2], shape.numel // groups]
    return np.array(known, np.int64)


def _checked(size: int) -> int:
    if size == -2:
        raise MemoryError("There is not enough memory for the contexts of a tensor in layout 'adaptive'.")
    return size


def _address(array: Any) -> int:
    return int(array.ctypes.data)


def is_compiled() -> bool:
    """Return whether the compiled coder is there; compiles it at the first call."""
    return not isinstance(_loaded(), Exception)


def _library() -> Any:
    """Return the compiled coder, or None after one warning."""
    if is_compiled():
        return _loaded()
    _warn()
    return None


@cache
def _loaded() -> Any:
    """Return the compiled coder, or the error that there was instead."""
    try:
        command = [*compiler(), *_FLAGS]
        library = ctypes.CDLL(str(compiled("mixing", [_SOURCE], [*command, platform.machine()], _build)))
        pointer, number = ctypes.c_void_p, ctypes.c_int64
        for function in (library.sqs_encode, library.sqs_decode):
            function.argtypes, function.restype = [pointer] * 7 + [number, pointer], number
    except (OSError, RuntimeError, AttributeError, subprocess.SubprocessError) as error:
        return error
    return library


@cache
def _warn() -> None:
    warnings.warn(
        f"The coder of layout 'adaptive' could not be compiled ({_loaded()}): plain Python takes its place, some "
        "seconds for a hundred thousand weights. Install a C++20 compiler (say g++ 11; CXX names another).",
        KernelWarning,
        stacklevel=4,
    )


def _build(target: Path) -> None:
    run_together([[*compiler(), *_FLAGS, str(_SOURCE), "-o", str(target)]])
