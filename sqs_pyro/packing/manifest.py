"""The manifest: what every byte of a packed file's data means, as compact JSON, compressed."""

import json
import zlib
from collections.abc import Iterator, Mapping
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError
from torch import Tensor

from sqs_pyro.errors import NetworkError, PackedFileError
from sqs_pyro.packing.layouts import PackedTensor, get_layout
from sqs_pyro.packing.leftovers import DTYPES, checksum, describe, restore

MAX_MANIFEST_BYTES = 1 << 26  # uncompressed: far above any network, far below what would hurt
MAX_ELEMENTS = 1 << 40  # of one tensor: sizes stay far from overflow

Size = Annotated[int, Field(ge=0, le=MAX_ELEMENTS, strict=True)]
Shape = Annotated[list[Size], Field(max_length=64)]


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)


class TensorColumns(_Strict):
    """Compressed tensors, a column each: columns compress better than a record a tensor."""

    name: list[str]
    shape: list[Shape]
    layout: list[str]
    bits: list[Size]
    nonzeros: list[Size]
    groups: list[Size]
    components: list[Size]
    codebook: list[Literal["float16", "float32"]]
    lengths: list[dict[str, Size]]
    crc32: list[Size]


class _Field(_Strict):
    name: str
    dtype: Literal[tuple(DTYPES)]  # type: ignore[valid-type]
    constant: Annotated[str, Field(pattern="^([0-9a-f]{2}){1,16}$")] | None = None


class _Kind(_Strict):
    fields: list[_Field]
    modules: list[str]
    shapes: list[list[Shape]]
    crc32: list[Size]


class _Manifest(_Strict):
    tensors: TensorColumns
    leftovers: list[_Kind]
    metadata: dict[str, Any]
    draws: Annotated[int, Field(ge=1, le=MAX_ELEMENTS, strict=True)] | None = None


def write_manifest(
    tensors: Mapping[str, PackedTensor],
    leftovers: Mapping[str, Tensor],
    metadata: Mapping[str, Any],
    draws: int | None = None,
) -> tuple[bytes, list[Tensor]]:
    """Return the compressed manifest and the data's parts, uint8, in file order.

    With ``draws``, every tensor holds that many draws in its last dimension.

    Raises:
        NetworkError: for a name given twice, a leftover of a dtype that cannot be stored, or metadata that
            JSON cannot hold.
    """
    twice = sorted(set(tensors) & set(leftovers))
    if twice:
        raise NetworkError(f"Tensor {twice[0]!r} is given both compressed and uncompressed.")
    kinds, data = describe(leftovers)
    manifest: dict[str, Any] = {"tensors": tensor_columns(tensors), "leftovers": kinds, "metadata": dict(metadata)}
    if draws is not None:
        manifest["draws"] = draws
    try:
        text = json.dumps(manifest, allow_nan=False, separators=(",", ":"))
    except (TypeError, ValueError) as error:
        raise NetworkError(f"Metadata of a packed file must be plain JSON, but {error}.") from None
    parts = [part for packed in tensors.values() for part in packed.parts.values()]
    return zlib.compress(text.encode(), level=9), parts + data


def read_manifest(
    manifest: bytes, data: Tensor
) -> tuple[dict[str, PackedTensor], dict[str, Tensor], dict[str, Any], int | None]:
    """Return compressed tensors, leftovers, metadata and number of draws, out of manifest and data (uint8).

    The tensors' parts are views of ``data``.

    Raises:
        PackedFileError: naming the tensor and the reason, if anything does not fit.
    """
    content = _parse(manifest)
    tensors: dict[str, PackedTensor] = {}
    leftovers: dict[str, Tensor] = {}
    position = 0
    for name, packed in _packed_tensors(content.tensors, data):
        if name in tensors:
            raise PackedFileError(f"Tensor {name!r} is described twice.")
        if content.draws is not None and packed.shape[-1] != content.draws:
            raise PackedFileError(
                f"Tensor {name!r} of shape {list(packed.shape)} does not hold the file's {content.draws} draws in "
                "its last dimension."
            )
        tensors[name] = packed
        position += packed.num_bytes
    kinds = [kind.model_dump(exclude_none=True) for kind in content.leftovers]
    try:
        for name, value in restore(kinds, data[position:]):
            if name in tensors or name in leftovers:
                raise PackedFileError(f"tensor {name!r} is described twice")
            leftovers[name] = value
    except PackedFileError as error:
        raise PackedFileError(f"Uncompressed tensors cannot be read: {error}.") from None
    return tensors, leftovers, content.metadata, content.draws


def tensor_columns(tensors: Mapping[str, PackedTensor]) -> dict[str, list[Any]]:
    """Return the description of compressed tensors, as :class:`TensorColumns` takes it."""
    packed = list(tensors.values())
    return {
        "name": list(tensors),
        "shape": [list(p.shape) for p in packed],
        "layout": [p.layout for p in packed],
        "bits": [p.bits for p in packed],
        "nonzeros": [p.nonzeros for p in packed],
        "groups": [p.num_groups for p in packed],
        "components": [p.num_components for p in packed],
        "codebook": [p.codebook_dtype for p in packed],
        "lengths": [{name: part.numel() for name, part in p.parts.items()} for p in packed],
        "crc32": [checksum(list(p.parts.values())) for p in packed],
    }


def _parse(manifest: bytes) -> _Manifest:
    unzip = zlib.decompressobj()
    try:
        text = unzip.decompress(manifest, MAX_MANIFEST_BYTES)
    except zlib.error as error:
        raise PackedFileError(f"The manifest cannot be decompressed ({error}).") from None
    if not unzip.eof or unzip.unused_data:
        raise PackedFileError(
            f"The manifest is cut off, followed by other bytes, or larger than {MAX_MANIFEST_BYTES} bytes."
        )
    try:
        content = _Manifest.model_validate_json(text)
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(str(part) for part in first["loc"])
        raise PackedFileError(f"The manifest is wrong at {place!r}: {first['msg']}.") from None
    _check_columns("tensors", content.tensors, [*TensorColumns.model_fields])
    for kind in content.leftovers:
        _check_columns("leftovers", kind, ["modules", "shapes", "crc32"])
        if any(len(shapes) != len(kind.fields) for shapes in kind.shapes):
            raise PackedFileError("The manifest is wrong: leftovers have more or fewer shapes than fields.")
    return content


def _check_columns(what: str, record: BaseModel, columns: list[str]) -> None:
    lengths = {column: len(getattr(record, column)) for column in columns}
    if len(set(lengths.values())) > 1:
        raise PackedFileError(f"The manifest is wrong: columns of {what} differ in length: {lengths}.")


def _packed_tensors(columns: TensorColumns, data: Tensor) -> Iterator[tuple[str, PackedTensor]]:
    position = 0
    for row, name in enumerate(columns.name):
        parts = {}
        for part, length in columns.lengths[row].items():
            parts[part] = data[position : position + length]
            position += length
        try:
            if position > data.numel():
                raise PackedFileError("the data ends before it")
            if checksum(list(parts.values())) != columns.crc32[row]:
                raise PackedFileError("its bytes are damaged: their checksum does not fit")
            yield name, packed_tensor(columns, row, parts)
        except PackedFileError as error:
            raise PackedFileError(f"Tensor {name!r} cannot be read: {error}.") from None


def packed_tensor(columns: TensorColumns, row: int, parts: dict[str, Tensor]) -> PackedTensor:
    """Return the tensor that a row describes, with its parts, uint8 ``[bytes]`` by name.

    Raises:
        PackedFileError: description and parts contradict each other, or the layout is unknown.
    """
    get_layout(columns.layout[row])
    return PackedTensor(
        layout=columns.layout[row],
        shape=tuple(columns.shape[row]),
        bits=columns.bits[row],
        nonzeros=columns.nonzeros[row],
        num_groups=columns.groups[row],
        num_components=columns.components[row],
        codebook_dtype=columns.codebook[row],
        parts=parts,
    )
