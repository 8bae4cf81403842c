"""The manifest: what every byte of a packed file's data means, as compact JSON, compressed."""

import json
import re
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, Protocol

from torch import Tensor

from sqs_pyro.documents import parse_json, shown
from sqs_pyro.errors import NetworkError, PackedFileError
from sqs_pyro.packing import checked
from sqs_pyro.packing.layouts import PackedTensor
from sqs_pyro.packing.leftovers import DTYPES, checksum, describe, restore
from sqs_pyro.packing.record import TensorRecord
from sqs_pyro.packing.words import WORDS

# What a reader takes in follows from the file's own size, before anything is built from it. Honest manifests
# shrink to a twentieth; a writer whose manifest shrinks more leaves it as it is.
MAX_MANIFEST_BYTES = 1 << 25  # uncompressed: a hundred thousand tensors
_ALWAYS_ALLOWED = 1 << 20
_MOST_SHRUNK = 100
MAX_TENSORS = 1 << 17
_MOST_NAMES = 1 << 24  # characters of all names together

_TENSOR_COLUMNS = tuple(field.name for field in fields(TensorRecord))
#: Of a record that stands for itself, in a checkpoint's config: parts are a list there, for their order.
RECORD_KEYS = (*_TENSOR_COLUMNS[1:], "parts")
_CONSTANT = re.compile("([0-9a-f]{2}){1,16}")


@dataclass(frozen=True)
class _Manifest:
    tensors: dict[str, TensorRecord]
    leftovers: list[dict[str, Any]]
    metadata: dict[str, Any]
    draws: int | None


def write_manifest(
    records: Sequence[TensorRecord],
    leftovers: Mapping[str, Tensor],
    metadata: Mapping[str, Any],
    draws: int | None = None,
    *,
    words: bool = False,
) -> tuple[bytes, list[Tensor]]:
    """Return the compressed manifest, and the data of the leftovers, uint8, which follows that of the tensors.

    With ``draws``, every tensor holds that many draws in its last dimension. With ``words`` a reader has to know
    those that manifests have in common, as one of version 5 does.

    Raises:
        NetworkError: for a name given twice, a leftover of a dtype that cannot be stored, or metadata that
            JSON cannot hold.
    """
    names = [record.name for record in records]
    twice = sorted(set(names) & set(leftovers))
    if twice:
        raise NetworkError(f"Tensor {shown(twice[0])} is given both compressed and uncompressed.")
    _check_names([*names, *leftovers])
    kinds, data = describe(leftovers)
    # A list for each column, not an object for each tensor: keys stand once, and equal numbers side by side
    # shrink.
    columns = {column: [getattr(record, column) for record in records] for column in _TENSOR_COLUMNS}
    manifest: dict[str, Any] = {"tensors": columns, "leftovers": kinds, "metadata": dict(metadata)}
    # Left out otherwise, so that files of one network stay version 1.
    if draws is not None:
        manifest["draws"] = draws
    try:
        # NaN is no JSON; the metadata is written a second time, alone, to be read back below.
        text = json.dumps(manifest, allow_nan=False, separators=(",", ":"))
        about = json.dumps(manifest["metadata"])
    except (TypeError, ValueError, RecursionError) as error:
        raise NetworkError(f"Metadata of a packed file must be plain JSON, but {error}.") from None
    parse_json(about, NetworkError, "Metadata of a packed file", "shorten or flatten it")  # else no reader would
    return _compressed(text.encode(), WORDS if words else b""), data


class Source(Protocol):
    """The data of a packed file, taken part by part.

    Attributes:
        left: bytes that have not been taken.
    """

    left: int

    def take(self, size: int) -> Tensor:
        """Return the next bytes, uint8 ``[size]``."""
        ...

    def keep(self, record: TensorRecord, packed: PackedTensor) -> PackedTensor:
        """Return a tensor whose bytes were taken last, as it is to be kept."""
        ...


def read_manifest(
    manifest: bytes, source: Source
) -> tuple[dict[str, PackedTensor], dict[str, Tensor], dict[str, Any], int | None]:
    """Return compressed tensors, leftovers, metadata and number of draws, out of manifest and data.

    Raises:
        PackedFileError: naming the tensor and the reason, if anything does not fit.
    """
    content = _parse(manifest)
    tensors: dict[str, PackedTensor] = {}
    leftovers: dict[str, Tensor] = {}
    # Parts stand one behind the other: lengths are enough, and no gap or overlap can be described.
    for name, record in content.tensors.items():
        tensors[name] = packed = _read_tensor(record, source)
        if content.draws is not None and packed.shape[-1] != content.draws:
            raise PackedFileError(
                f"Tensor {name!r} of shape {list(packed.shape)} does not hold the file's {content.draws} draws in "
                "its last dimension."
            )
    try:
        for name, value in restore(content.leftovers, source.take(source.left)):
            # Of two descriptions one reader might take the first and another the last.
            if name in tensors or name in leftovers:
                raise PackedFileError(f"tensor {name!r} is described twice")
            leftovers[name] = value
    except PackedFileError as error:
        raise PackedFileError(f"Uncompressed tensors cannot be read: {error}.") from None
    return tensors, leftovers, content.metadata, content.draws


def tensor_record(name: str, row: Mapping[str, Any], place: str, end: str = "") -> TensorRecord:
    """Return the record that a row of a file's JSON is.

    Args:
        name: of the tensor.
        row: its other fields.
        place: of the row in the file, for messages: ``place.column`` and ``end``.
        end: ``".3"``, where the file has a list for each column.

    Raises:
        Wrong: a value is of another kind, or outside of what can be.
    """
    # Any names for now: the layout compares them with its parts when the tensor is made.
    lengths = checked.record(row["lengths"], f"{place}.lengths{end}", (), optional=row["lengths"])
    if len(lengths) > checked.MAX_DIMENSIONS:
        raise checked.wrong(f"{place}.lengths{end}", list(lengths), "a few parts")
    numbers = {
        key: checked.integer(row[key], f"{place}.{key}{end}")
        for key in ("bits", "nonzeros", "groups", "components", "crc32")
    }
    return TensorRecord(
        name=name,
        layout=checked.name(row["layout"], f"{place}.layout{end}"),
        shape=checked.shape(row["shape"], f"{place}.shape{end}"),
        codebook=checked.choice(row["codebook"], f"{place}.codebook{end}", ("float16", "float32")),
        lengths={
            checked.name(part, f"{place}.lengths{end}"): checked.integer(size, f"{place}.lengths{end}")
            for part, size in lengths.items()
        },
        **numbers,
    )


def _check_names(names: list[str]) -> None:
    """Refuse to write what no reader would take."""
    longest = max(names, key=len, default="")
    if len(longest) > checked.MAX_NAME:
        raise NetworkError(
            f"A tensor's name has {len(longest)} characters, and a packed file takes {checked.MAX_NAME}: "
            f"{shown(longest, 80)}; give its modules shorter names."
        )
    if len(names) > MAX_TENSORS or sum(map(len, names)) > _MOST_NAMES:
        raise NetworkError(
            f"{len(names)} tensors, of names with {sum(map(len, names))} characters, are more than the "
            f"{MAX_TENSORS} and {_MOST_NAMES} that a packed file takes: split the network."
        )


def _compressed(text: bytes, words: bytes) -> bytes:
    """Return the text compressed, or only wrapped where it would shrink to less than a reader believes."""
    if len(text) > MAX_MANIFEST_BYTES:
        raise NetworkError(
            f"The network's description has {len(text)} bytes, and a packed file takes {MAX_MANIFEST_BYTES}: "
            "shorten the metadata (recipe, metrics)."
        )
    compressor = zlib.compressobj(9, zdict=words) if words else zlib.compressobj(9)
    smallest = compressor.compress(text) + compressor.flush()
    # Level 0 wraps without shrinking: then the text is no longer than its own size allows.
    return smallest if len(text) <= _most_bytes(smallest) else zlib.compress(text, level=0)


def _most_bytes(manifest: bytes) -> int:
    return min(MAX_MANIFEST_BYTES, _ALWAYS_ALLOWED + _MOST_SHRUNK * len(manifest))


def _parse(manifest: bytes) -> _Manifest:
    # The words are asked for by manifests that were written with them alone.
    unzip, most = zlib.decompressobj(zdict=WORDS), _most_bytes(manifest)
    try:
        text = unzip.decompress(manifest, most)  # no more is unpacked than such a manifest can honestly have
    except zlib.error as error:
        raise PackedFileError(f"The manifest cannot be decompressed ({error}).") from None
    if not unzip.eof or unzip.unused_data:
        raise PackedFileError(f"The manifest is cut off, followed by other bytes, or larger than {most} bytes.")
    try:
        return _checked(parse_json(text, PackedFileError, "The manifest is wrong: it", "the file is damaged"))
    except checked.Wrong as error:
        raise PackedFileError(f"The manifest is wrong {error}.") from None


def _checked(content: Any) -> _Manifest:
    top = checked.record(content, "manifest", ("tensors", "leftovers", "metadata"), ("draws",))
    if not isinstance(top["metadata"], dict):
        raise checked.wrong("metadata", top["metadata"], "an object")
    draws = top.get("draws")
    return _Manifest(
        tensors=_tensor_records(top["tensors"]),
        leftovers=_kinds(top["leftovers"]),
        metadata=top["metadata"],
        draws=draws if draws is None else checked.integer(draws, "draws", least=1),
    )


def _tensor_records(value: Any) -> dict[str, TensorRecord]:
    columns = checked.record(value, "tensors", _TENSOR_COLUMNS)
    rows = _length("tensors", columns, _TENSOR_COLUMNS)
    records: dict[str, TensorRecord] = {}
    for row in range(rows):
        each = {column: columns[column][row] for column in _TENSOR_COLUMNS}
        name = checked.name(each.pop("name"), f"tensors.name.{row}")
        if name in records:
            raise PackedFileError(f"Tensor {shown(name)} is described twice.")
        records[name] = tensor_record(name, each, "tensors", f".{row}")
    return records


def _kinds(value: Any) -> list[dict[str, Any]]:
    """Return descriptions of leftovers, as :func:`restore` takes them."""
    found, tensors, names = [], 0, 0
    for row, each in enumerate(checked.items(value, "leftovers")):
        place = f"leftovers.{row}"
        kind = checked.record(each, place, ("fields", "modules", "shapes", "crc32"))
        fields = [_field(field, f"{place}.fields") for field in checked.items(kind["fields"], f"{place}.fields")]
        modules = _length(place, kind, ("modules", "shapes", "crc32"))
        paths = [checked.name(module, f"{place}.modules") for module in kind["modules"]]
        # A description is fields times modules, so that few bytes can say millions: counted before anything is
        # made.
        tensors += modules * len(fields)
        names += len(fields) * sum(map(len, paths)) + modules * sum(len(field["name"]) for field in fields)
        if tensors > MAX_TENSORS or names > _MOST_NAMES + MAX_TENSORS:
            raise PackedFileError(f"The manifest is wrong: it has more than {MAX_TENSORS} uncompressed tensors.")
        if any(len(checked.items(shapes, f"{place}.shapes")) != len(fields) for shapes in kind["shapes"]):
            raise PackedFileError("The manifest is wrong: leftovers have more or fewer shapes than fields.")
        shapes = [[checked.shape(s, f"{place}.shapes") for s in shapes] for shapes in kind["shapes"]]
        crc32 = [checked.integer(crc, f"{place}.crc32") for crc in kind["crc32"]]
        found.append({"fields": fields, "modules": paths, "shapes": shapes, "crc32": crc32})
    return found


def _field(value: Any, place: str) -> dict[str, Any]:
    field = checked.record(value, place, ("name", "dtype"), ("constant", "bits"))
    checked.name(field["name"], f"{place}.name")
    checked.choice(field["dtype"], f"{place}.dtype", DTYPES)
    if "bits" in field:  # in fixed point
        checked.integer(field["bits"], f"{place}.bits", least=8, most=8)
        checked.choice(field["dtype"], f"{place}.dtype", ("float16", "bfloat16", "float32"))
    constant = field.get("constant", "00")
    if not isinstance(constant, str) or not _CONSTANT.fullmatch(constant):
        raise checked.wrong(f"{place}.constant", constant, "1 to 16 bytes in hexadecimal digits")
    return dict(field)


def _length(what: str, record: Mapping[str, Any], columns: tuple[str, ...]) -> int:
    lengths = {column: len(checked.items(record[column], f"{what}.{column}")) for column in columns}
    if len(set(lengths.values())) > 1:
        raise PackedFileError(f"The manifest is wrong: columns of {what} differ in length: {lengths}.")
    length = next(iter(lengths.values()))
    if length > MAX_TENSORS:
        raise PackedFileError(f"The manifest is wrong: {length} rows of {what}, and {MAX_TENSORS} are allowed.")
    return length


def _read_tensor(record: TensorRecord, source: Source) -> PackedTensor:
    """Return the tensor whose bytes come next."""
    sizes = list(record.lengths.values())
    try:
        if sum(sizes) > source.left:
            raise PackedFileError("the data ends before it")
        data = source.take(sum(sizes))
        parts = dict(zip(record.lengths, data.split(sizes), strict=True)) if sizes else {}  # views
        # Before the parts are looked at: damage should be told as damage, not as a contradiction that it has led
        # to.
        if checksum(list(parts.values())) != record.crc32:
            raise PackedFileError("its bytes are damaged: their checksum does not fit")
        return source.keep(record, record.with_parts(parts))
    except PackedFileError as error:
        raise PackedFileError(f"Tensor {shown(record.name)} cannot be read: {error}.") from None
