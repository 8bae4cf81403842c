"""Compressed tensors of a checkpoint: their bytes as one tensor each, and what these mean as plain JSON.

The description is that of a packed file's manifest (docs/format.md), one record a tensor. JSON that other
programs write may sort its keys, so the parts' names are a list: their order is that of the bytes.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from sqs_pyro.documents import shown
from sqs_pyro.errors import PackedFileError
from sqs_pyro.packing.layouts import PackedTensor
from sqs_pyro.packing.leftovers import checksum
from sqs_pyro.packing.manifest import RECORD_KEYS, TensorRecord, packed_tensor, tensor_columns, tensor_record


@dataclass(frozen=True, eq=False)
class StoredTensor:
    """A compressed tensor whose bytes are not there yet.

    Attributes:
        structure: the tensor with parts on the meta device: everything but the bytes has been checked.
        crc32: CRC-32 of the bytes.
    """

    structure: PackedTensor
    crc32: int

    @property
    def num_bytes(self) -> int:
        """Bytes of all parts."""
        return self.structure.num_bytes

    def with_bytes(self, stored: Tensor) -> PackedTensor:
        """Return the tensor that the bytes, uint8 ``[num_bytes]`` on the CPU, are of.

        Raises:
            PackedFileError: the bytes are not those that were written.
        """
        if stored.dtype != torch.uint8 or stored.shape != (self.num_bytes,):
            raise PackedFileError(
                f"{self.num_bytes} bytes should be there, but {stored.dtype} {list(stored.shape)} is"
            )
        if checksum([stored]) != self.crc32:
            raise PackedFileError("its bytes are damaged or absent: their checksum does not fit")
        parts = stored.split([part.numel() for part in self.structure.parts.values()])
        return replace(self.structure, parts=dict(zip(self.structure.parts, parts, strict=True)))


def stored_bytes(packed: PackedTensor) -> Tensor:
    """Return the bytes of all parts, one after the other, uint8 ``[num_bytes]``."""
    return torch.cat([part.cpu() for part in packed.parts.values()])


def record_of(name: str, packed: PackedTensor) -> dict[str, Any]:
    """Return the JSON record of a tensor."""
    record = {column: values[0] for column, values in tensor_columns({name: packed}).items()}
    del record["name"]
    lengths = record.pop("lengths")
    return {**record, "parts": list(lengths), "lengths": list(lengths.values())}


def read_record(name: str, record: Mapping[str, Any]) -> StoredTensor:
    """Return what a record describes.

    Raises:
        PackedFileError: naming the tensor and the reason, if the record is incomplete or contradicts itself.
    """
    try:
        found = _record(record)
        parts = {part: torch.empty(size, dtype=torch.uint8, device="meta") for part, size in found.lengths.items()}
        return StoredTensor(packed_tensor(found, parts), found.crc32)
    except PackedFileError as error:
        raise PackedFileError(
            f"Tensor {shown(name)} is described wrongly in the quantization config: {error}; fetch config.json "
            "again."
        ) from None


def _record(record: Any) -> TensorRecord:
    if not isinstance(record, Mapping):
        raise PackedFileError(f"it is a {type(record).__name__} instead of a record")
    missing = [key for key in RECORD_KEYS if key not in record]
    others = [key for key in record if key not in RECORD_KEYS]
    if missing or others:
        said = f"has no {missing[0]!r}" if missing else f"has the unknown key {shown(others[0], 80)}"
        raise PackedFileError(f"it {said}")
    parts, lengths = record["parts"], record["lengths"]
    if not isinstance(parts, list) or not isinstance(lengths, list) or len(parts) != len(lengths):
        raise PackedFileError("'parts' and 'lengths' should be lists of the same length")
    return tensor_record({**record, "lengths": dict(zip(map(str, parts), lengths, strict=True))}, "record")
