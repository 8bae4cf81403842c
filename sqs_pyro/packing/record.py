"""``TensorRecord``: what is said of one compressed tensor, in a manifest, in a config or in a report of sizes."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from sqs_pyro.errors import PackedFileError
from sqs_pyro.packing.layouts import SCALE_BYTES, PackedTensor, get_layout
from sqs_pyro.packing.leftovers import checksum


@dataclass(frozen=True)
class TensorRecord:
    """One compressed tensor without its bytes; the fields are the manifest's columns, in their order.

    Attributes:
        name: of the parameter.
        shape, layout, bits, nonzeros, groups, components, codebook: see :class:`PackedTensor`; ``groups`` and
            ``components`` are the codebook's G and K, ``codebook`` is its dtype.
        lengths: bytes of each part by name, in their order.
        crc32: of the parts, one after the other.
    """

    name: str
    shape: tuple[int, ...]
    layout: str
    bits: int
    nonzeros: int
    groups: int
    components: int
    codebook: str
    lengths: dict[str, int]
    crc32: int

    @classmethod
    def of(cls, name: str, packed: PackedTensor) -> "TensorRecord":
        """Describe a tensor; reads all of its bytes once, for the checksum."""
        return cls(
            name=name,
            shape=packed.shape,
            layout=packed.layout,
            bits=packed.bits,
            nonzeros=packed.nonzeros,
            groups=packed.num_groups,
            components=packed.num_components,
            codebook=packed.codebook_dtype,
            lengths={part: value.numel() for part, value in packed.parts.items()},  # parts are uint8
            crc32=checksum(list(packed.parts.values())),
        )

    @property
    def numel(self) -> int:
        """Number of weights, zeros included."""
        return math.prod(self.shape)

    @property
    def num_scales(self) -> int:
        """Number of scales; 0 where there are none."""
        return self.lengths.get("scales", 0) // SCALE_BYTES

    @property
    def bytes(self) -> int:
        """Bytes of all parts."""
        return sum(self.lengths.values())

    def with_parts(self, parts: dict[str, Tensor]) -> PackedTensor:
        """Return the tensor whose parts, uint8 ``[bytes]`` by name, these are.

        Raises:
            PackedFileError: description and parts contradict each other, or the layout is unknown.
        """
        get_layout(self.layout)  # for its error: all others speak of the layout's parts
        return PackedTensor(
            layout=self.layout,
            shape=self.shape,
            bits=self.bits,
            nonzeros=self.nonzeros,
            num_groups=self.groups,
            num_components=self.components,
            codebook_dtype=self.codebook,
            parts=parts,
        )

    def with_bytes(self, stored: Tensor) -> PackedTensor:
        """Return the tensor that the bytes of all parts, uint8 ``[bytes]`` on the CPU, are of.

        Raises:
            PackedFileError: the bytes are not those that were written.
        """
        # Shape before checksum: the parts below are cut by lengths, and views of a shorter buffer would be cut
        # short.
        if stored.dtype != torch.uint8 or stored.shape != (self.bytes,):
            raise PackedFileError(
                f"{self.bytes} bytes should be there, but {stored.dtype} {list(stored.shape)} is"
            )
        if checksum([stored]) != self.crc32:
            raise PackedFileError("its bytes are damaged or absent: their checksum does not fit")
        return self.with_parts(dict(zip(self.lengths, stored.split(list(self.lengths.values())), strict=True)))
