"""Layouts: ways to write a :class:`CodedTensor` as bytes, each lossless.

A layout is one subclass of :class:`Layout` under a name in the registry; ``tests/kits/layout.py`` holds the
contract that all of them keep.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from sqs_pyro.documents import shown
from sqs_pyro.errors import NetworkError, PackedFileError
from sqs_pyro.packing.bits import MAX_BITS
from sqs_pyro.packing.canonical import canonical
from sqs_pyro.packing.coded import MAX_COMPONENTS, CodedTensor, check_codes, check_tables

_CODEBOOK_DTYPES = {"float16": torch.float16, "float32": torch.float32}
SCALE_BYTES = 2  # of a scale in a file: float16


@dataclass(frozen=True, eq=False)
class Structure:
    """What is known of a compressed tensor before its codes are written.

    Attributes:
        layout: name of the layout.
        shape: shape of the weight tensor.
        bits: bits of one stored code; 0 where the layout stores no fixed-width codes.
        nonzeros: number of non-zero weights.
        num_groups: G, the number of codebook rows.
        num_components: K, the number of values in a row.
        codebook_dtype: ``"float16"`` or ``"float32"``.
    """

    layout: str
    shape: tuple[int, ...]
    bits: int
    nonzeros: int
    num_groups: int
    num_components: int
    codebook_dtype: str

    @property
    def numel(self) -> int:
        """Number of weights, zeros included."""
        return math.prod(self.shape)


@dataclass(frozen=True, eq=False)
class PackedTensor(Structure):
    """The bytes of one compressed tensor in one layout.

    Attributes:
        parts: uint8 buffers ``[bytes]`` by name: ``"codebook"``, ``"scales"`` where out-channels or parts of them
            have their own, and what the layout needs.

    Raises:
        PackedFileError: where the fields contradict each other or the size of a part.
    """

    parts: dict[str, Tensor] = field(repr=False)

    def __post_init__(self) -> None:
        _check_fields(self)  # first: sizes are computed from the fields
        sizes = part_sizes(self, self.num_scales)
        # Lists: in a file the order of parts is that of their bytes.
        if list(self.parts) != list(sizes):
            raise PackedFileError(f"layout {self.layout!r} has the parts {list(sizes)}, not {list(self.parts)}")
        for name, size in sizes.items():
            if size is not None and self.parts[name].numel() != size:
                raise PackedFileError(f"part {name!r} has {self.parts[name].numel()} bytes instead of {size}")

    @property
    def num_bytes(self) -> int:
        """Bytes of all parts."""
        return sum(part.numel() for part in self.parts.values())

    @property
    def num_scales(self) -> int:
        """Number of scales; 0 where there are none."""
        return self.parts["scales"].numel() // SCALE_BYTES if "scales" in self.parts else 0

    def in_memory(self) -> "PackedTensor":
        """Return the tensor with its bytes: itself, unless they are still on a disk."""
        return self

    def codebook(self) -> Tensor:
        """Return the codebook, float32 ``[G, K]``."""
        dtype = np.dtype(self.codebook_dtype).newbyteorder("<")
        # Copied, not viewed: in a file a part begins at any byte, and the machine may be a big-endian one.
        values = self.parts["codebook"].cpu().numpy().tobytes()
        rows = np.frombuffer(values, dtype=dtype).astype(np.float32)  # [G · K]
        return torch.from_numpy(rows).view(self.num_groups, self.num_components)

    def scales(self) -> Tensor | None:
        """Return the scales, float32 ``[shape[0]]`` or, of parts of out-channels, ``[shape[0], B]``; or None."""
        if "scales" not in self.parts:
            return None
        values = self.parts["scales"].cpu().numpy().tobytes()
        scales = torch.from_numpy(np.frombuffer(values, dtype="<f2").astype(np.float32))
        return scales if len(scales) == self.shape[0] else scales.view(self.shape[0], -1)

    def unpack(self) -> CodedTensor:
        """Return the weights; ``unpack().dense()`` equals the packed tensor's ``dense()`` bit for bit.

        Raises:
            PackedFileError: if the bytes do not decode to the stated shape, count and codes.
        """
        codes, mask = get_layout(self.layout).unpack_codes(self)
        nonzeros = int(torch.count_nonzero(mask))
        if nonzeros != self.nonzeros:
            raise PackedFileError(f"{nonzeros} weights are not zero, but {self.nonzeros} should be")
        try:
            # With its checks, not `unchecked`: whoever wrote the bytes may have written codes beyond the codebook.
            return CodedTensor(codes.view(self.shape), mask.view(self.shape), self.codebook(), self.scales())
        except NetworkError as error:
            raise PackedFileError(str(error)) from None

    def unpack_pieces(self, size: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield codes, uint8 ``[n]``, and mask, bool ``[n]``, of ``size`` weights at a time, the last of fewer.

        So the layouts that can read piece by piece never have all of a tensor's codes in memory as bytes.

        Raises:
            PackedFileError: as :meth:`unpack`, where the wrong piece comes or behind the last.
        """
        nonzeros = 0
        try:
            check_tables(self.codebook(), self.scales())
            for codes, mask in get_layout(self.layout).unpack_pieces(self, size):
                check_codes(codes, self.num_components)
                nonzeros += int(torch.count_nonzero(mask))
                yield codes, mask
        except NetworkError as error:
            raise PackedFileError(str(error)) from None
        if nonzeros != self.nonzeros:
            raise PackedFileError(f"{nonzeros} weights are not zero, but {self.nonzeros} should be")


@dataclass(frozen=True, eq=False)
class UnreadTensor(PackedTensor):
    """A compressed tensor whose bytes are on a disk: its parts are on the meta device.

    Attributes:
        read: returns the tensor with its bytes, checked.
    """

    read: Callable[[], PackedTensor] = field(repr=False)

    def in_memory(self) -> PackedTensor:
        """Return the tensor with its bytes, read at each call; raises PackedFileError if they changed."""
        return self.read()


class Layout(ABC):
    """One way to write codes and mask as bytes; codebook and scales are written the same way by all."""

    name: ClassVar[str]
    #: Whether ``"auto"`` tries it: not where it only pays for tensors of a certain meaning.
    automatic: ClassVar[bool] = True
    #: Weights of a tensor up to which ``"auto"`` tries it.
    automatic_weights: ClassVar[float] = math.inf

    def is_automatic(self, numel: int) -> bool:
        """Return whether ``"auto"`` tries it for a tensor of so many weights."""
        return numel <= self.automatic_weights and self.automatic

    @abstractmethod
    def bits(self, num_components: int, has_zeros: bool) -> int:
        """Return the bits of one stored code; more than 8 means that the layout cannot hold the tensor."""

    @abstractmethod
    def part_sizes(self, packed: Structure) -> dict[str, int | None]:
        """Return the bytes of each part but codebook and scales, in file order; None where they vary."""

    @abstractmethod
    def pack_parts(self, coded: CodedTensor, bits: int) -> dict[str, Tensor]:
        """Return the parts, uint8 ``[bytes]``, of a canonical coded tensor on the CPU."""

    def pack_again(self, coded: CodedTensor, bits: int, table: Tensor | None) -> dict[str, Tensor]:
        """Return the same parts of a tensor that has been packed before, and whose part ``"table"`` is known."""
        return self.pack_parts(coded, bits)

    @abstractmethod
    def unpack_codes(self, packed: PackedTensor) -> tuple[Tensor, Tensor]:
        """Return codes, uint8 ``[numel]``, and mask, bool ``[numel]``."""

    def unpack_pieces(self, packed: PackedTensor, size: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield the same in pieces of ``size`` weights; layouts that need not read all at once override it."""
        codes, mask = self.unpack_codes(packed)
        yield from zip(codes.split(size), mask.split(size), strict=True)


# In the order of registration, which decides between layouts of equal size: same input, same bytes.
_layouts: dict[str, Layout] = {}


def register_layout(layout: type[Layout]) -> type[Layout]:
    """Class decorator: make a layout known under its ``name``; a candidate for ``"auto"`` if ``automatic``."""
    _layouts[layout.name] = layout()
    return layout


def get_layout(name: str) -> Layout:
    """Return the layout called ``name``; raises PackedFileError, naming those there are, if it is unknown."""
    if name not in _layouts:
        raise PackedFileError(f"layout {shown(name, 80)} is unknown; known are {', '.join(layout_names())}")
    return _layouts[name]  # one instance for all: layouts have no state


def layout_names() -> list[str]:
    """Return the names of all layouts."""
    return list(_layouts)


def part_sizes(packed: Structure, num_scales: int) -> dict[str, int | None]:
    """Return the bytes of every part in file order; None where only the bytes themselves can tell.

    Raises:
        PackedFileError: so many scales do not fit the weight.
    """
    # Codebook and scales before the layout's own parts, as `pack_canonical` writes them.
    item = _CODEBOOK_DTYPES[packed.codebook_dtype].itemsize
    sizes = get_layout(packed.layout).part_sizes(packed)
    if num_scales and (num_scales % packed.shape[0] or packed.numel % num_scales):
        raise PackedFileError(f"{num_scales} scales do not fit a weight of shape {list(packed.shape)}")
    scales = {"scales": SCALE_BYTES * num_scales} if num_scales else {}
    return {"codebook": packed.num_groups * packed.num_components * item, **scales, **sizes}


def pack_tensor(coded: CodedTensor, layout: str = "auto") -> PackedTensor:
    """Pack a coded tensor.

    Args:
        coded: what to pack. Codebook values that no weight uses are not stored.
        layout: a name out of :func:`layout_names`, or ``"auto"`` for the one that takes the fewest bytes.

    Raises:
        NetworkError: if the layout is unknown or cannot hold the tensor.
    """
    if layout != "auto" and layout not in _layouts:
        raise NetworkError(f"Layout {layout!r} is unknown: allowed are auto, {', '.join(layout_names())}.")
    # Once for all layouts: each then sees the fewest codes, sorted the same way.
    smallest = canonical(coded)
    return pack_canonical(smallest, layout) if layout != "auto" else _smallest(smallest)


def code_bits(symbols: int) -> int:
    """Return ceil(log2(symbols)), the bits that tell ``symbols`` symbols apart."""
    return (symbols - 1).bit_length()


def pack_canonical(coded: CodedTensor, layout: str, table: Tensor | None = None) -> PackedTensor:
    """Pack what :func:`~sqs_pyro.packing.canonical.canonical` has returned, or what that was unpacked to again.

    Args:
        coded: what to pack.
        layout: name of the layout.
        table: the part of this name, if the tensor has been packed in this layout before; nothing is counted then.

    Raises:
        NetworkError: if the layout cannot hold the tensor.
    """
    structure = _structure(coded, get_layout(layout))
    if structure.bits > MAX_BITS:
        raise NetworkError(
            f"Layout {layout!r} cannot tell {coded.num_components} codebook values and zero apart with "
            f"{MAX_BITS} bits: choose another layout or fewer components."
        )
    # Both casts are exact: float16 is chosen only where it holds every value, and scales are float16 numbers.
    parts = {"codebook": _little_endian(coded.codebook.to(_CODEBOOK_DTYPES[structure.codebook_dtype]))}
    if coded.scales is not None:
        parts["scales"] = _little_endian(coded.scales.half())
    parts |= get_layout(layout).pack_again(coded, structure.bits, table)
    return PackedTensor(**vars(structure), parts=parts)


def _smallest(coded: CodedTensor) -> PackedTensor:
    """Pack in the automatic layout that takes the fewest bytes, the first of equals.

    A layout whose size follows from counts alone is not tried, only compared.
    """
    sizes: dict[str, int] = {}
    tried: dict[str, PackedTensor] = {}
    for name, layout in _layouts.items():
        structure = _structure(coded, layout)
        if not layout.is_automatic(structure.numel) or structure.bits > MAX_BITS:
            continue
        parts = part_sizes(structure, 0 if coded.scales is None else coded.scales.numel()).values()
        # Only an entropy coder's size is known no earlier than its bytes.
        if None in parts:
            tried[name] = pack_canonical(coded, name)
        sizes[name] = tried[name].num_bytes if name in tried else sum(size or 0 for size in parts)
    best = min(sizes, key=sizes.__getitem__)  # the first of equals
    return tried[best] if best in tried else pack_canonical(coded, best)


def _structure(coded: CodedTensor, layout: Layout) -> Structure:
    return Structure(
        layout=layout.name,
        shape=coded.shape,
        bits=layout.bits(coded.num_components, coded.nonzeros < coded.mask.numel()),
        nonzeros=coded.nonzeros,
        num_groups=coded.num_groups,
        num_components=coded.num_components,
        codebook_dtype=coded.codebook_dtype,
    )


def _little_endian(values: Tensor) -> Tensor:
    """Return the bytes of floating-point numbers, uint8 ``[bytes]``."""
    # As bytes, because the file's order of them is not the machine's everywhere.
    numbers = values.contiguous().numpy()
    return torch.from_numpy(numbers.astype(numbers.dtype.newbyteorder("<")).reshape(-1).view(np.uint8))


def _check_fields(packed: Structure) -> None:
    numel = packed.numel
    if not packed.shape or min(packed.shape) < 1:
        raise PackedFileError(f"shape {list(packed.shape)} is not one of a weight tensor")
    if not 0 <= packed.nonzeros <= numel:
        raise PackedFileError(f"{packed.nonzeros} non-zeros are impossible in {numel} weights")
    if packed.num_groups < 1 or numel % packed.num_groups:
        raise PackedFileError(f"{packed.num_groups} codebooks cannot share {numel} weights equally")
    if not 1 <= packed.num_components <= MAX_COMPONENTS:
        raise PackedFileError(f"{packed.num_components} components are outside of 1..{MAX_COMPONENTS}")
    if packed.codebook_dtype not in _CODEBOOK_DTYPES:
        raise PackedFileError(f"codebook dtype {packed.codebook_dtype!r} is neither float16 nor float32")
    # Stated in the file, though it follows from the rest: a reader of one layout need not know the rule.
    bits = get_layout(packed.layout).bits(packed.num_components, packed.nonzeros < numel)
    if packed.bits != bits or bits > MAX_BITS:
        raise PackedFileError(f"{packed.bits} bits a code are given where the layout takes {bits}")
