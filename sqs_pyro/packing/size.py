"""Honest size: every byte of a packed file, by what it is for. The total is the file's size on disk."""

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from sqs_pyro.isolation import isolated
from sqs_pyro.packing.file import file_image, read_packed
from sqs_pyro.packing.layouts import PackedTensor
from sqs_pyro.packing.module import module_contents
from sqs_pyro.reporting.printed import Printed, Report

# What a part of a layout is, in the report; an unknown layout's other parts count as codes.
KINDS = {"codes": "codes", "mask": "masks", "codebook": "codebooks", "scales": "codebooks", "table": "tables"}

_MOST_NAMED = 5  # tensors that are not compressed


@dataclass(frozen=True)
class TensorSize:
    """One compressed tensor: ``bytes`` of all parts, ``bits`` of one stored code (0: no fixed width)."""

    name: str
    shape: tuple[int, ...]
    layout: str
    bits: int
    components: int
    groups: int
    nonzeros: int
    bytes: int

    @property
    def numel(self) -> int:
        """Number of weights, zeros included."""
        return math.prod(self.shape)


@dataclass(frozen=True)
class OtherTensor:
    """One tensor that is not compressed: a parameter or floating buffer of ``numel`` elements."""

    name: str
    shape: tuple[int, ...]
    numel: int


@dataclass(frozen=True, repr=False)
class SizeReport(Printed):
    """Bytes of a packed file; it prints itself.

    Attributes:
        codes, masks, codebooks, tables: parts of the compressed tensors (scales of out-channels count as
            codebooks, tables belong to the entropy coder).
        uncompressed: data of all other tensors.
        manifest: names, shapes, counts, constants, recipe and metrics, compressed.
        header: the safetensors header without its padding.
        padding: bytes that only align.
        fp32_bytes: the whole network at 4 bytes for each element of its parameters and persistent floating
            buffers, tied ones once; integer buffers are not counted.
        num_weights: number of compressed weights, zeros included.
        nonzeros: how many of them are not zero, over all draws.
        paper_ratio: ``32 / (log2 K * nonzero rate)`` over the compressed weights alone, as the paper counts:
            it leaves out mask, codebooks and every other tensor. None where K = 1, all are zero, or of draws.
        tensors: one row for each compressed tensor, of all draws.
        draws: S in a file of S draws of one network, whose fp32 bytes and weights are counted once; else 1.
        largest_uncompressed: the largest of the other floating tensors, at most five.
    """

    codes: int
    masks: int
    codebooks: int
    tables: int
    uncompressed: int
    manifest: int
    header: int
    padding: int
    fp32_bytes: int
    num_weights: int
    nonzeros: int
    paper_ratio: float | None
    tensors: tuple[TensorSize, ...]
    draws: int = 1
    largest_uncompressed: tuple[OtherTensor, ...] = ()

    @property
    def parts(self) -> dict[str, int]:
        """Bytes by part; their sum is :attr:`total`."""
        names = ("codes", "masks", "codebooks", "tables", "uncompressed", "manifest", "header", "padding")
        return {name: getattr(self, name) for name in names}

    @property
    def total(self) -> int:
        """Bytes of the file: equals ``os.path.getsize``."""
        return sum(self.parts.values())

    @property
    def ratio(self) -> float:
        """fp32 bytes of the whole network over the bytes of the whole file."""
        return self.fp32_bytes / self.total

    @property
    def bits_per_weight(self) -> float:
        """Bits of codes, masks, codebooks and tables for each compressed weight (all draws); 0 without one."""
        compressed = self.codes + self.masks + self.codebooks + self.tables
        return 8 * compressed / self.num_weights if self.num_weights else 0.0

    @property
    def nonzero_rate(self) -> float:
        """Share of the compressed weights that are not zero; 1 where there are none."""
        return self.nonzeros / (self.num_weights * self.draws) if self.num_weights else 1.0

    @property
    def compressed_share(self) -> float:
        """Share of the network's elements that are compressed weights."""
        return 4 * self.num_weights / self.fp32_bytes if self.fp32_bytes else 0.0

    def table(self) -> Report:
        """A row a tensor, and the totals."""
        from sqs_pyro.reporting.tables import size_tables

        return size_tables(self.to_dict())

    def to_dict(self) -> dict[str, Any]:
        """Return plain data for JSON, derived figures included."""
        rows = [{**asdict(row), "shape": list(row.shape)} for row in self.tensors]
        return {
            "file_bytes": self.total,
            "fp32_bytes": self.fp32_bytes,
            "ratio": self.ratio,
            "bits_per_weight": self.bits_per_weight,
            "nonzero_rate": self.nonzero_rate,
            "num_weights": self.num_weights,
            "nonzeros": self.nonzeros,
            "draws": self.draws,
            "paper_ratio": self.paper_ratio,
            "paper_ratio_leaves_out": ["masks", "codebooks", "tables", "uncompressed", "manifest", "header"],
            "parts": self.parts,
            "compressed_share": self.compressed_share,
            "largest_uncompressed": [
                {**asdict(other), "shape": list(other.shape)} for other in self.largest_uncompressed
            ],
            "tensors": rows,
        }


@isolated()
def size_report(packed: nn.Module | str | Path) -> SizeReport:
    """Report the bytes of a packed file, or of the file that a packed module would be saved as.

    Args:
        packed: a module from ``packed_network`` or ``load``, or a packed file's path.

    Raises:
        NetworkError: if the module has no packed weights.
        PackedFileError: if the file is not an intact packed file.
    """
    if isinstance(packed, str | Path):
        contents = read_packed(packed)
        lengths = (contents.header, contents.manifest_bytes, contents.data_bytes)
        return _report(contents.tensors, contents.leftovers, contents.draws or 1, *lengths)
    tensors, leftovers, metadata, draws = module_contents(packed)
    image = file_image(tensors, leftovers, metadata, draws)
    data_bytes = sum(part.numel() for part in image.data)
    return _report(tensors, leftovers, draws or 1, image.header, len(image.manifest), data_bytes)


def _report(
    tensors: Mapping[str, PackedTensor],
    leftovers: Mapping[str, Tensor],
    draws: int,
    header: bytes,
    manifest_bytes: int,
    data_bytes: int,
) -> SizeReport:
    rows = tuple(_row(name, packed) for name, packed in tensors.items())
    weights = sum(row.numel for row in rows) // draws
    floats = sum(value.numel() for value in leftovers.values() if value.is_floating_point())
    padding = len(header) - len(header.rstrip(b" "))
    return SizeReport(
        **_compressed_bytes(tensors),
        uncompressed=data_bytes - sum(row.bytes for row in rows),
        manifest=manifest_bytes,
        header=len(header) - padding,
        padding=padding,
        fp32_bytes=4 * (weights + floats),
        num_weights=weights,
        nonzeros=sum(row.nonzeros for row in rows),
        paper_ratio=_paper_ratio(rows) if draws == 1 else None,
        tensors=rows,
        draws=draws,
        largest_uncompressed=_largest(leftovers),
    )


def _largest(leftovers: Mapping[str, Tensor]) -> tuple[OtherTensor, ...]:
    floats = [
        OtherTensor(name, tuple(value.shape), value.numel())
        for name, value in leftovers.items()
        if value.is_floating_point()
    ]
    return tuple(sorted(floats, key=lambda other: (-other.numel, other.name))[:_MOST_NAMED])


def _compressed_bytes(tensors: Mapping[str, PackedTensor]) -> dict[str, int]:
    kinds = dict.fromkeys(KINDS.values(), 0)
    for packed in tensors.values():
        for name, part in packed.parts.items():
            kinds[KINDS.get(name, "codes")] += part.numel()
    return kinds


def _row(name: str, packed: PackedTensor) -> TensorSize:
    return TensorSize(
        name=name,
        shape=packed.shape,
        layout=packed.layout,
        bits=packed.bits,
        components=packed.num_components,
        groups=packed.num_groups,
        nonzeros=packed.nonzeros,
        bytes=packed.num_bytes,
    )


def _paper_ratio(rows: tuple[TensorSize, ...]) -> float | None:
    bits = sum(row.nonzeros * math.log2(row.components) for row in rows)
    return 32 * sum(row.numel for row in rows) / bits if bits else None
