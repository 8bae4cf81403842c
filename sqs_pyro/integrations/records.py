"""Compressed tensors of a checkpoint: their bytes as one tensor each, and what these mean as plain JSON.

The description is that of a packed file's manifest (docs/format.md), one record a tensor. JSON that other
programs write may sort its keys, so the parts' names are a list: their order is that of the bytes.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from sqs_pyro.documents import shown
from sqs_pyro.errors import PackedFileError
from sqs_pyro.packing.layouts import PackedTensor
from sqs_pyro.packing.manifest import RECORD_KEYS, tensor_record
from sqs_pyro.packing.record import TensorRecord


def stored_bytes(packed: PackedTensor) -> Tensor:
    """Return the bytes of all parts, one after the other, uint8 ``[num_bytes]``."""
    # One tensor for all parts: loaders map, shard and move it like any other, and cannot tear it apart.
    return torch.cat([part.cpu() for part in packed.parts.values()])


def record_of(record: TensorRecord) -> dict[str, Any]:
    """Return the JSON record of a tensor."""
    columns = {key: getattr(record, key) for key in RECORD_KEYS if key != "parts"}
    return {
        **columns,
        "shape": list(record.shape),
        # Two lists in place of a dictionary, whose order a JSON writer may change.
        "parts": list(record.lengths),
        "lengths": list(record.lengths.values()),
    }


def read_record(name: str, record: Mapping[str, Any]) -> TensorRecord:
    """Return what a record describes: everything but the bytes is checked.

    Raises:
        PackedFileError: naming the tensor and the reason, if the record is incomplete or contradicts itself.
    """
    try:
        found = _record(name, record)
        # On the meta device: the checks of a packed tensor need sizes, not bytes.
        found.with_parts({part: torch.empty(size, device="meta") for part, size in found.lengths.items()})
        return found
    except PackedFileError as error:
        raise PackedFileError(
            f"Tensor {shown(name)} is described wrongly in the quantization config: {error}; fetch config.json "
            "again."
        ) from None


def _record(name: str, record: Any) -> TensorRecord:
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
    return tensor_record(name, {**record, "lengths": dict(zip(map(str, parts), lengths, strict=True))}, "record")
