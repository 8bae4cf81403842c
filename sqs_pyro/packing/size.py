"""Honest size: every byte of a packed file, by what it is for. The total is the file's size on disk."""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from sqs_pyro.isolation import isolated
from sqs_pyro.packing.contents import PackedContents, parts_of_packed, stored_leftovers
from sqs_pyro.packing.file import Envelope, envelope, read_file
from sqs_pyro.packing.record import TensorRecord
from sqs_pyro.reporting.printed import Printed, Report

# What a part of a layout is, in the report; an unknown layout's other parts count as codes.
_KINDS = {"codes": "codes", "mask": "masks", "codebook": "codebooks", "scales": "codebooks", "table": "tables"}

_MOST_NAMED = 5  # tensors that are not compressed
_COLUMNS = ("name", "shape", "layout", "bits", "components", "groups", "nonzeros", "bytes")  # of a row in JSON


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
        codes, masks, codebooks, tables: parts of the compressed tensors (scales count as codebooks, tables
            belong to the entropy coder).
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
    tensors: tuple[TensorRecord, ...]
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
        return 4 * self.num_weights / self.fp32_bytes if self.fp32_bytes else 0.0  # both at 4 bytes an element

    def table(self) -> Report:
        """Return a row a tensor, and the totals."""
        from sqs_pyro.reporting.tables import size_tables  # here: only who prints needs rich

        return size_tables(self.to_dict())

    def to_dict(self) -> dict[str, Any]:
        """Return plain data for JSON, derived figures included."""
        rows = [
            {
                **{key: getattr(row, key) for key in _COLUMNS},
                "shape": list(row.shape),
                "parts": {kind: size for kind, size in compressed_bytes([row]).items() if size},
            }
            for row in self.tensors
        ]
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
def size_report(packed: nn.Module | PackedContents | str | Path) -> SizeReport:
    """Report the bytes of a packed file, or of the file that a packed module or contents would be saved as.

    Args:
        packed: a module from ``packed_network`` or ``load``, contents, or a packed file's path.

    Raises:
        NetworkError: if the module has no packed weights.
        PackedFileError: if the file is not an intact packed file.
    """
    if isinstance(packed, str | Path):
        contents, found = read_file(packed)
        return _report(contents.records(), contents.leftovers, contents.draws or 1, found)
    if isinstance(packed, PackedContents):
        records, leftovers, metadata, draws = packed.records(), packed.leftovers, packed.metadata, packed.draws
    else:  # records are enough: the bytes of weights that nothing has changed since are not made again
        root, weights, metadata, draws = parts_of_packed(packed)
        records = [weight.record(name) for name, weight in weights.items()]
        leftovers = stored_leftovers(root)
    return _report(records, leftovers, draws or 1, envelope(records, leftovers, metadata, draws))


def _report(
    rows: Sequence[TensorRecord], leftovers: Mapping[str, Tensor], draws: int, found: Envelope
) -> SizeReport:
    weights = sum(row.numel for row in rows) // draws  # a tensor of S draws stands for one weight
    floats = sum(value.numel() for value in leftovers.values() if value.is_floating_point())
    # The header's JSON ends with a brace: spaces behind it only align.
    padding = len(found.header) - len(found.header.rstrip(b" "))
    return SizeReport(
        **compressed_bytes(rows),
        # A difference, so that the parts sum to the file whatever layouts come.
        uncompressed=found.data_bytes - sum(row.bytes for row in rows),
        manifest=found.manifest_bytes,
        header=len(found.header) - padding,
        padding=padding,
        fp32_bytes=4 * (weights + floats),
        num_weights=weights,
        nonzeros=sum(row.nonzeros for row in rows),
        paper_ratio=paper_ratio(rows) if draws == 1 else None,
        tensors=tuple(rows),
        draws=draws,
        largest_uncompressed=largest(
            (name, value.shape) for name, value in leftovers.items() if value.is_floating_point()
        ),
    )


def compressed_bytes(rows: Iterable[TensorRecord]) -> dict[str, int]:
    """Return the bytes of compressed tensors by what they are for: codes, masks, codebooks, tables."""
    kinds = dict.fromkeys(_KINDS.values(), 0)
    for row in rows:
        for name, size in row.lengths.items():
            kinds[_KINDS.get(name, "codes")] += size
    return kinds


def largest(floats: Iterable[tuple[str, Sequence[int]]]) -> tuple[OtherTensor, ...]:
    """Return the largest of the floating tensors that are not compressed, given by name and shape."""
    others = [OtherTensor(name, tuple(shape), math.prod(shape)) for name, shape in floats]
    return tuple(sorted(others, key=lambda other: (-other.numel, other.name))[:_MOST_NAMED])


def paper_ratio(rows: Sequence[TensorRecord]) -> float | None:
    """Return the ratio as the paper counts, see :class:`SizeReport`."""
    # K may differ from tensor to tensor; a zero costs nothing here, and neither does a code where K = 1.
    bits = sum(row.nonzeros * math.log2(row.components) for row in rows)
    return 32 * sum(row.numel for row in rows) / bits if bits else None
