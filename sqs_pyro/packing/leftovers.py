"""Leftovers: the tensors of a network that are not compressed (norms, biases, statistics, a first layer).

A small network has a hundred of them with a few bytes each, so their description is kept short: tensors of
one module stand together, modules with the same kinds of tensors share one description, and a tensor whose
elements are all equal is a constant of the manifest, not data.
"""

import math
import struct
import zlib
from collections.abc import Collection, Iterator, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from sqs_pyro.errors import NetworkError, PackedFileError

DTYPES: dict[str, torch.dtype] = {
    str(dtype).removeprefix("torch."): dtype
    for dtype in (
        *(torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.complex64),
        *(torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64),
    )
}
_NAMES = {dtype: name for name, dtype in DTYPES.items()}
LEFTOVER_DTYPES = ("float16", "bfloat16", "float32", "fixed8")  # what parameters may be rounded to

_STEPS = 255  # from the smallest to the largest of a tensor's numbers in fixed point
_HEAD = 3  # bytes in front of such numbers: their exponent, and the least of them
_FEWEST = 8  # numbers, of which they pay for that
_CHUNK = 1 << 16  # numbers of a tensor that are squared at a time
_SAMPLE = 4096  # numbers that are looked at before all of a large tensor


def round_to(value: Tensor, dtype: str) -> Tensor:
    """Return ``value`` rounded to what ``dtype`` can hold, in its own dtype, where its values survive that.

    They survive if none overflows, no error is larger than the rounding of a number as large as the tensor's root
    mean square, and none is more than 1/32 of its own element: below 6e-5 float16 has fewer and fewer digits, and
    below 6e-8 none. Of a tensor with two or more axes an element may lose digits, too, that a number as large as
    the root mean square of its row, and of its column, has not: among millions some are always next to zero.
    Otherwise the tensor comes back as it is, as integers and two-byte floats do.

    ``"fixed8"`` is fixed point of 8 bits: multiples of a power of two, 256 neighbouring ones. Where half a step is
    more than 1/16 of the median size, the tensor is rounded to float16 instead.
    """
    if value.dtype not in (torch.float32, torch.float64) or not value.numel():
        return value
    if dtype == "fixed8":
        fixed = _to_fixed_point(value)
        return round_to(value, "float16") if fixed is None else fixed
    rounded = value.to(DTYPES[dtype]).to(value.dtype)  # there and back: what the file will give
    finite = _is_finite(value)
    if not (finite and _is_finite(rounded)) and not torch.equal(rounded.isfinite(), value.isfinite()):
        return value
    # A number with all digits of `dtype` has half a unit of the last as its error: only smaller ones may be lost.
    doubtful = value.abs() < torch.finfo(DTYPES[dtype]).smallest_normal
    if not doubtful.any():
        return rounded
    # In float64, so that errors are not rounded themselves.
    few = value.detach()[doubtful].double()
    size, error = few.abs(), (rounded[doubtful].double() - few).abs()
    mean, neighbours = _mean_squares(
        value.detach() if finite else value.detach().nan_to_num(0.0, 0.0, 0.0), doubtful
    )
    half_step = torch.finfo(DTYPES[dtype]).eps / 2
    # An element far below it may lose digits that its neighbours do not have.
    allowed = torch.maximum(size / 32, half_step * neighbours.sqrt())
    survives = (error <= half_step * size.clamp(min=math.sqrt(mean))) & (error <= allowed)
    return rounded if bool(survives.all()) else value


def _mean_squares(values: Tensor, chosen: Tensor) -> tuple[float, Tensor]:
    """Return the mean square of all values, and of each chosen one's row or column the smaller; 0 of a vector's.

    Of both: what multiplies a row of tiny numbers, or a column of them, may be as large as they are small.
    """
    matrix = values.reshape(len(values), -1) if values.dim() else values.view(1, 1)
    of_rows, of_columns = [], torch.zeros(matrix.shape[1], dtype=torch.float64, device=values.device)
    # Some rows at a time: of a large tensor squares in float64 would be four times itself.
    for some in matrix.split(max(1, _CHUNK // matrix.shape[1])):
        squares = some.double().square_()
        of_rows.append(squares.mean(1))
        of_columns += squares.sum(0)
    mean = float(of_columns.sum()) / matrix.numel()
    if values.dim() < 2:
        return mean, of_columns.new_zeros(())
    row, column = chosen.view(matrix.shape).nonzero(as_tuple=True)
    return mean, torch.minimum(torch.cat(of_rows)[row], (of_columns / len(matrix))[column])


def _is_finite(value: Tensor) -> bool:
    return all(map(math.isfinite, map(float, value.aminmax())))  # a tenth of the time of `isfinite`


def _to_fixed_point(value: Tensor) -> Tensor | None:
    """Return a tensor's values rounded to 8 bits in fixed point; None where that loses too much."""
    exact = value.detach().double()
    span = float(exact.max() - exact.min())
    if value.numel() < _FEWEST or not 0 < span < math.inf:
        return None
    exponent = math.ceil(math.log2(span / _STEPS))
    numbers = torch.round(exact * 2.0**-exponent)
    if numbers.max() - numbers.min() > _STEPS:  # both ends were rounded away from each other
        exponent += 1
        numbers = torch.round(exact * 2.0**-exponent)
    if 2.0 ** (exponent - 1) > float(exact.abs().median()) / 16 or numbers.min().abs() >= 1 << 15:
        return None
    return (numbers * 2.0**exponent + 0.0).to(value.dtype)  # no -0.0


def fixed_point(value: Tensor) -> tuple[int, int, Tensor] | None:
    """Return exponent, least number and what the others are above it, uint8 ``[n]``.

    The values are ``(least + code) 2^exponent`` exactly. None where they are not, or nothing is saved.
    """
    floating = value.dtype in (torch.float16, torch.bfloat16, torch.float32)
    if not floating or value.numel() < _FEWEST or _is_one_element(value):
        return None
    flat = value.detach().reshape(-1)
    if len(flat) > _SAMPLE and fixed_point(flat[:_SAMPLE]) is None:
        return None
    exact = flat.double()
    zero = exact == 0
    if not exact.isfinite().all() or zero.all() or (zero & exact.signbit()).any():
        return None
    mantissa, exponents = torch.frexp(exact[~zero])
    numbers = mantissa.mul(2.0**53).long()  # exact
    lowest = torch.frexp((numbers & -numbers).double())[1] - 1  # the place of the last bit that is set
    exponent = int((exponents - 53 + lowest).min())
    numbers = exact * 2.0**-exponent
    least, most = float(numbers.min()), float(numbers.max())
    if most - least > _STEPS or abs(least) >= 1 << 15 or not -128 <= exponent < 128:
        return None
    return exponent, int(least), (numbers - least).byte()


def smallest_exact(value: Tensor) -> Tensor:
    """Return ``value`` on the CPU in the smallest floating dtype that holds it exactly; integers as they are."""
    value = value.detach().cpu()
    if value.dtype not in (torch.float32, torch.float64):
        return value
    for dtype in (torch.float16, torch.bfloat16, torch.float32):
        stored = value.to(dtype)
        # There and back. NaN is NaN, but infinity is not the largest number, of which attention masks are full.
        if bool(torch.isclose(stored.to(value.dtype), value, rtol=0, atol=0, equal_nan=True).all()):
            return stored
    return value


def check_dtype(name: str, value: Tensor) -> None:
    """Raise :class:`NetworkError` if no file can hold a tensor of this dtype."""
    if value.dtype not in _NAMES:
        raise NetworkError(f"Tensor {name!r} is {value.dtype}, which cannot be stored: {', '.join(DTYPES)} can.")


def leftover_state(net: nn.Module, compressed: Collection[int] = ()) -> dict[str, Tensor]:
    """Return parameters and persistent buffers by name; shared ones once, none copied.

    Args:
        net: a network, plain or packed.
        compressed: by ``id``, the tensors to leave out.

    Raises:
        NetworkError: its state has something that is no tensor.
    """
    # keep_vars: the tensors themselves. Detached, names of a shared one would be tensors of different ids.
    seen, state = set(compressed), {}
    for name, value in net.state_dict(keep_vars=True).items():
        if not isinstance(value, Tensor):
            raise NetworkError(f"State {name!r} is a {type(value).__name__}: only tensors can be stored.")
        if id(value) not in seen:
            seen.add(id(value))
            state[name] = value
    return state


@torch.no_grad()
def round_leftovers(net: nn.Module, coded: Collection[str], dtype: str, kept: Collection[str] = ()) -> None:
    """Round, in place, the parameters that are not compressed, each where its values survive it.

    Parameters are what training finds, to no more digits than float16 has. Buffers are what a network was told:
    means and scales of its inputs, positions, masks, times, counts; they stay exact.

    Args:
        net: a network, packed or dense.
        coded: names of parameters whose values are codewords; none in a packed network.
        dtype: see :func:`round_to`.
        kept: names of modules whose parameters stay exact.
    """
    exact = {id(value) for name, value in net.named_parameters(remove_duplicate=False) if name in coded}
    # Of those modules alone, not of their children, which are named on their own if they are to stay.
    exact |= {id(value) for name in kept for value in net.get_submodule(name).parameters(recurse=False)}
    for value in net.parameters():
        if id(value) not in exact:
            value.copy_(round_to(value, dtype))


def check_leftover_dtype(dtype: str | None) -> None:
    """Raise :class:`NetworkError` if leftovers cannot be rounded to a dtype of this name; None rounds none."""
    if dtype is not None and dtype not in LEFTOVER_DTYPES:
        raise NetworkError(f"leftover_dtype is {dtype!r}, but should be one of {', '.join(LEFTOVER_DTYPES)}.")


def describe(leftovers: Mapping[str, Tensor]) -> tuple[list[dict[str, Any]], list[Tensor]]:
    """Return the manifest's description of the leftovers and their bytes, in the order of the description."""
    kinds: dict[str, dict[str, Any]] = {}
    data: dict[str, list[Tensor]] = {}
    for module, tensors in _by_module(leftovers).items():
        fields = [_field(name, value) for name, value in tensors.items()]
        key = repr(fields)  # modules of the same kinds of tensors, constants included, share a description
        kind = kinds.setdefault(key, {"fields": fields, "modules": [], "shapes": [], "crc32": []})
        parts = [_data(f, v) for f, v in zip(fields, tensors.values(), strict=True) if "constant" not in f]
        kind["modules"].append(module)
        kind["shapes"].append([list(value.shape) for value in tensors.values()])
        kind["crc32"].append(checksum(parts))
        data.setdefault(key, []).extend(parts)
    # The data is by kind, not in the network's order: that is how `restore` walks through it.
    return list(kinds.values()), [part for key in kinds for part in data[key]]


def restore(kinds: list[dict[str, Any]], data: Tensor) -> Iterator[tuple[str, Tensor]]:
    """Yield name and value of every leftover out of ``data``, uint8, which must be used up exactly.

    Raises:
        PackedFileError: if the description does not fit the data, or a checksum does not.
    """
    position = 0
    for kind in kinds:
        for module, shapes, crc in zip(kind["modules"], kind["shapes"], kind["crc32"], strict=True):
            start = position
            for field, shape in zip(kind["fields"], shapes, strict=True):
                name = f"{module}.{field['name']}" if module else field["name"]
                size = field_bytes(field, shape)
                yield name, _value(name, field, shape, data[position : position + size])
                position += size
            # After its tensors were handed out: whoever iterates must come to the end before using one.
            if checksum([data[start:position]]) != crc:
                raise PackedFileError(f"tensors of module {module!r} are damaged: their checksum does not fit")
    if position != data.numel():
        raise PackedFileError(f"{data.numel()} bytes of uncompressed tensors are there instead of {position}")


def field_bytes(field: Mapping[str, Any], shape: list[int]) -> int:
    """Return the bytes of one described leftover in the data; constants have none."""
    if "constant" in field:
        return 0
    return math.prod(shape) + _HEAD if "bits" in field else math.prod(shape) * DTYPES[field["dtype"]].itemsize


def to_bytes(value: Tensor) -> Tensor:
    """Return the elements as uint8 ``[bytes]``, little-endian, row by row."""
    flat = value.reshape(-1).contiguous()
    if flat.stride() != (1,):  # one element of an expanded constant: contiguous, and yet of stride 0
        flat = torch.empty_like(flat, memory_format=torch.contiguous_format).copy_(flat)
    return flat.view(torch.uint8)


def checksum(parts: list[Tensor]) -> int:
    """Return the CRC-32 of the parts, one after the other."""
    crc = 0
    for part in parts:
        crc = zlib.crc32(buffer(part), crc)  # goes on where the part before ended
    return crc


def buffer(part: Tensor) -> memoryview:
    """Return the bytes of a uint8 tensor without a copy."""
    return part.numpy().data


def _by_module(leftovers: Mapping[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    modules: dict[str, dict[str, Tensor]] = {}
    for name, value in leftovers.items():
        check_dtype(name, value)
        module, _, attribute = name.rpartition(".")
        modules.setdefault(module, {})[attribute] = value.detach().cpu()
    return modules


def _field(name: str, value: Tensor) -> dict[str, Any]:
    field: dict[str, Any] = {"name": name, "dtype": _NAMES[value.dtype]}
    if _is_constant(value):
        field["constant"] = bytes(to_bytes(value.reshape(-1)[:1]).tolist()).hex()
    elif fixed_point(value) is not None:
        field["bits"] = 8
    return field


def in_fixed_point(value: Tensor) -> bool:
    """Return whether a leftover is written in fixed point."""
    return fixed_point(value) is not None and not _is_constant(value)


def _is_constant(value: Tensor) -> bool:
    # Fresh norms, zero biases and counters are one number: no data. Bits, so that NaN and -0.0 count as well.
    if not value.numel():
        return False
    if _is_one_element(value):
        return True
    first = to_bytes(value.reshape(-1)[:1])
    return bool((to_bytes(value).view(-1, len(first)) == first).all())


def _is_one_element(value: Tensor) -> bool:
    """Return whether a tensor is a view of one element, as a file's constants are: of any size, in no memory."""
    return value.numel() > 0 and not any(value.stride())


def _data(field: Mapping[str, Any], value: Tensor) -> Tensor:
    fixed = fixed_point(value) if "bits" in field else None
    if fixed is None:
        return to_bytes(value)
    exponent, least, codes = fixed
    head = np.frombuffer(struct.pack("<bh", exponent, least), dtype=np.uint8)
    return torch.cat([torch.from_numpy(head.copy()), codes])


def _value(name: str, field: Mapping[str, Any], shape: list[int], data: Tensor) -> Tensor:
    dtype = DTYPES[field["dtype"]]
    if "constant" not in field:
        raw = data.numpy()  # a view
        if raw.size != field_bytes(field, shape):
            raise PackedFileError(f"tensor {name!r} is cut off: {raw.size} bytes are left of it")
        if "bits" in field:
            return _from_fixed_point(name, raw, dtype).view(shape)
        # torch would take any byte for a bool, and computes as with one only if it is 0 or 1.
        if dtype is torch.bool and raw.size and raw.max() > 1:
            raise PackedFileError(f"tensor {name!r} holds bytes that are not boolean")
        return _from_bytes(raw, dtype).view(shape)
    raw = np.frombuffer(bytes.fromhex(field["constant"]), dtype=np.uint8)
    if raw.size != dtype.itemsize or (dtype is torch.bool and raw.max() > 1):
        raise PackedFileError(f"tensor {name!r} has the constant {field['constant']!r}, which is no {dtype}")
    # A view of one element: a file of a few bytes cannot make a reader take gigabytes.
    return _from_bytes(raw, dtype).expand(shape) if shape else _from_bytes(raw, dtype).view(())


def _from_fixed_point(name: str, raw: np.ndarray, dtype: torch.dtype) -> Tensor:
    exponent, least = struct.unpack("<bh", raw[:_HEAD].tobytes())
    exact = (torch.from_numpy(raw[_HEAD:].astype(np.float64)) + least) * 2.0**exponent
    value = exact.to(dtype)
    # Else several files would have the same numbers, or some that the dtype does not have.
    fixed = fixed_point(value)
    written = fixed is not None and not _is_constant(value) and fixed[:2] == (exponent, least)
    if not written or not torch.equal(value.double(), exact):
        raise PackedFileError(f"tensor {name!r} holds numbers that are not in fixed point")
    return value


def _from_bytes(raw: np.ndarray, dtype: torch.dtype) -> Tensor:
    if not raw.size:
        return torch.empty(0, dtype=dtype)
    return torch.from_numpy(raw.copy()).view(dtype)  # the copy puts it at an aligned address
