"""The packed file: one safetensors file with two tensors, ``manifest`` and ``data``. See docs/format.md.

The header is canonical: it follows from version, checksum and the two lengths alone. So the same content
always gives the same bytes, and a header with any other byte in it is recognised.
"""

import hashlib
import json
import os
import struct
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from sqs_pyro.atomic import write_bytes
from sqs_pyro.documents import parse_json, shown
from sqs_pyro.errors import PackedFileError
from sqs_pyro.packing.contents import PackedContents, format_version
from sqs_pyro.packing.layouts import PackedTensor, UnreadTensor
from sqs_pyro.packing.leftovers import buffer
from sqs_pyro.packing.manifest import Source, read_manifest, write_manifest
from sqs_pyro.packing.record import TensorRecord

FORMAT = "sqs-pyro"
FORMAT_VERSION = 6  # the newest; a file that needs no newer one keeps an older version, which older programs read
_WITH_WORDS = 5  # the first version whose manifests are compressed with words that all have in common
_VERSIONS = tuple(str(version) for version in range(1, FORMAT_VERSION + 1))
_DIGEST = 2 * hashlib.sha256().digest_size  # hexadecimal digits
_MAX_HEADER = 4096  # a canonical header is a tenth of it


@dataclass(frozen=True, eq=False)
class FileImage:
    """A packed file in memory: header, manifest and the data's parts, in file order."""

    header: bytes
    manifest: bytes
    data: list[Tensor]


@dataclass(frozen=True)
class Envelope:
    """What of a packed file is known without its data.

    Attributes:
        header: the file's header; of a file that is not written yet, with zeros for its checksum.
        manifest_bytes: bytes of its compressed manifest.
        data_bytes: bytes of its data.
    """

    header: bytes
    manifest_bytes: int
    data_bytes: int

    @property
    def total(self) -> int:
        """Bytes of the file."""
        return len(self.header) + self.manifest_bytes + self.data_bytes


def file_image(contents: PackedContents) -> FileImage:
    """Return the file that :func:`write_packed` would write. Same input, same bytes."""
    version = contents.format_version
    described = contents.records(), contents.leftovers, contents.metadata, contents.draws
    manifest, others = write_manifest(*described, words=version >= _WITH_WORDS)
    # In the manifest's order: it says how long each part is, not where it stands.
    data = [part for packed in contents.tensors.values() for part in packed.parts.values()] + others
    # Of all bytes but the header's, which holds the digest and follows from it and the two lengths.
    digest = hashlib.sha256(manifest)
    for part in data:
        digest.update(buffer(part))
    size = sum(part.numel() for part in data)
    header = _header(str(version), digest.hexdigest(), len(manifest), size)
    return FileImage(header, manifest, data)


def envelope(
    records: Sequence[TensorRecord],
    leftovers: Mapping[str, Tensor],
    metadata: Mapping[str, Any],
    draws: int | None = None,
) -> Envelope:
    """Return what surrounds the data of a file of such tensors, whose bytes need not be there.

    Raises:
        NetworkError: if something cannot be stored.
    """
    tensors = ((record.layout, record.shape[0], record.num_scales) for record in records)
    version = format_version(tensors, draws, leftovers.values())
    manifest, others = write_manifest(records, leftovers, metadata, draws, words=version >= _WITH_WORDS)
    size = sum(record.bytes for record in records) + sum(part.numel() for part in others)
    # Of a real digest only its length would count here.
    return Envelope(_header(str(version), "0" * _DIGEST, len(manifest), size), len(manifest), size)


def write_packed(path: str | Path, contents: PackedContents) -> None:
    """Write a packed file: beside its place, flushed to the disk, then renamed. A failure leaves nothing.

    Args:
        path: where to; an older file there is replaced.
        contents: what to write.

    Raises:
        NetworkError: if something cannot be stored.
        OutputError: if the place cannot be written.
    """
    image = file_image(contents)
    write_bytes(path, [image.header, image.manifest, *map(buffer, image.data)])


def read_packed(path: str | Path) -> PackedContents:
    """Read a packed file into memory once, and check all of it before anything is used.

    Raises:
        PackedFileError: one sentence with the path, the tensor where there is one, and the reason: not a
            packed file, of a newer format, truncated, altered, or contradicting itself.
        OSError: if there is no such file or it cannot be read.
    """
    return read_file(path)[0]


def read_file(path: str | Path) -> tuple[PackedContents, Envelope]:
    """Return the contents of a packed file and what surrounds its data; errors as :func:`read_packed`."""
    with Path(path).open("rb") as stream, _told_of(path):
        return _read(stream, _InMemory)


@contextmanager
def opened_file(path: str | Path) -> Iterator[tuple[PackedContents, Envelope]]:
    """Read and check a packed file without keeping the bytes of its compressed tensors.

    Inside of the block they are read again, and their checksums compared, when
    :meth:`~sqs_pyro.packing.layouts.PackedTensor.in_memory` asks for them; errors as :func:`read_packed`.
    """
    if not isinstance(path, str | os.PathLike):
        raise PackedFileError(f"A packed file's path is needed, but {shown(path)} was given.")
    with Path(path).open("rb") as stream:
        with _told_of(path):
            found = _read(stream, _OnDisk)
        yield found


@contextmanager
def _told_of(path: str | Path) -> Iterator[None]:
    """Say of which file an error is."""
    try:
        yield
    except PackedFileError as error:
        raise PackedFileError(f"Packed file {str(path)!r} cannot be used. {error}") from None
    except MemoryError:
        raise PackedFileError(f"Packed file {str(path)!r} does not fit into the memory that is left.") from None


class _InMemory:
    """Data that is read at once: tensors are views of it, so that nothing is read twice or copied."""

    def __init__(self, stream: BinaryIO, size: int, digest: "hashlib._Hash") -> None:
        content = _read_bytes(stream, size)
        digest.update(buffer(content))
        self._data, self.left = content, size

    def take(self, size: int) -> Tensor:
        """Return the next bytes, uint8 ``[size]``."""
        start = self._data.numel() - self.left
        self.left -= size
        return self._data[start : start + size]

    def keep(self, record: TensorRecord, packed: PackedTensor) -> PackedTensor:
        """Return the tensor, a view."""
        return packed


class _OnDisk:
    """Data of which no more is in memory than is taken; tensors are read again when they are asked for."""

    def __init__(self, stream: BinaryIO, size: int, digest: "hashlib._Hash") -> None:
        self._stream, self.left, self._digest = stream, size, digest

    def take(self, size: int) -> Tensor:
        """Return the next bytes, uint8 ``[size]``."""
        content = _read_bytes(self._stream, size)
        self._digest.update(buffer(content))
        self.left -= size
        return content

    def keep(self, record: TensorRecord, packed: PackedTensor) -> PackedTensor:
        """Return the tensor without its bytes, and with what reads them."""
        stream, start = self._stream, self._stream.tell() - record.bytes

        def read() -> PackedTensor:
            stream.seek(start)
            return record.with_bytes(_read_bytes(stream, record.bytes))  # compares the checksum again

        parts = {
            part: torch.empty(size, dtype=torch.uint8, device="meta") for part, size in record.lengths.items()
        }
        return UnreadTensor(**{**vars(packed), "parts": parts}, read=read)


def _read_bytes(stream: BinaryIO, size: int) -> Tensor:
    """Return the next bytes of a file, uint8 ``[size]``."""
    content = bytearray(size)
    found = stream.readinto(content)  # type: ignore[attr-defined]  # of a buffered file: all that there is
    if found != size:
        raise PackedFileError(f"It was cut while it was read: {found} bytes were there instead of {size}.")
    return torch.frombuffer(content, dtype=torch.uint8) if size else torch.empty(0, dtype=torch.uint8)


def _read(
    stream: BinaryIO, source: "Callable[[BinaryIO, int, hashlib._Hash], Source]"
) -> tuple[PackedContents, Envelope]:
    """Read a file that is open: it stays the same file when another takes its place meanwhile."""
    size = os.fstat(stream.fileno()).st_size
    header = _read_header(stream, size)
    version, digest = _read_metadata(header)
    manifest_size, data_size = (_length(header, name) for name in ("manifest", "data"))
    expected = _header(version, digest, manifest_size, data_size)
    stream.seek(0)
    # As bytes, not as JSON: the same JSON spelt otherwise would be a second file of the same content.
    if stream.read(len(expected)) != expected:
        raise PackedFileError("Its header has been altered, or rewritten by another program.")
    total = len(expected) + manifest_size + data_size
    # Before memory is taken: a header may state any length.
    if size != total:
        what = "truncated" if size < total else "followed by other bytes"
        raise PackedFileError(f"It is {what}: {size} bytes instead of {total}.")
    manifest = buffer(_read_bytes(stream, manifest_size)).tobytes()
    found = hashlib.sha256(manifest)
    # Names the tensor that is damaged; the file's own checksum, told last, says less.
    contents = PackedContents(*read_manifest(manifest, source(stream, data_size, found)))
    intact = found.hexdigest() == digest
    if not intact:
        raise PackedFileError("Its checksum does not fit: manifest, data or the checksum itself was altered.")
    # Otherwise one content would have several files that are all taken.
    if version != str(contents.format_version):
        raise PackedFileError(
            f"Its format version is {version}, but its content (draws: {contents.draws}) is of version "
            f"{contents.format_version}."
        )
    return contents, Envelope(expected, manifest_size, data_size)


def _header(version: str, digest: str, manifest_size: int, data_size: int) -> bytes:
    """Return the canonical safetensors header: its length in 8 bytes, JSON, spaces up to a multiple of 8."""
    tensors: dict[str, Any] = {
        "__metadata__": {"format": FORMAT, "format_version": version, "sha256": digest},
        "manifest": {"dtype": "U8", "shape": [manifest_size], "data_offsets": [0, manifest_size]},
        "data": {
            "dtype": "U8",
            "shape": [data_size],
            "data_offsets": [manifest_size, manifest_size + data_size],
        },
    }
    text = json.dumps(tensors, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # safetensors aligns its data to 8 bytes
    return struct.pack("<Q", len(text)) + text


def _read_header(stream: BinaryIO, size: int) -> dict[str, Any]:
    if size < 8:
        raise PackedFileError(f"It has only {size} bytes.")
    (length,) = struct.unpack("<Q", stream.read(8))
    # A foreign file may have a header of megabytes, or of any number: it is not read, let alone parsed.
    if length > min(_MAX_HEADER, size - 8):
        raise PackedFileError("It is truncated within its header, or not a safetensors file of sqs-pyro.")
    repair = "it is damaged, or not a safetensors file"
    header = parse_json(stream.read(length), PackedFileError, "Its header", repair)
    if not isinstance(header, dict):
        raise PackedFileError("Its header is not that of a safetensors file.")
    return header


def _read_metadata(header: Mapping[str, Any]) -> tuple[str, str]:
    metadata = header.get("__metadata__")
    if not isinstance(metadata, dict) or metadata.get("format") != FORMAT:
        raise PackedFileError(f"It is a safetensors file, but not one of format {FORMAT!r}.")
    version, digest = metadata.get("format_version"), metadata.get("sha256")
    # Only what `int` takes: isdigit alone lets superscripts pass, and thousands of digits are an error of their
    # own.
    if not isinstance(version, str) or not (version.isascii() and version.isdigit() and len(version) < 10):
        raise PackedFileError(f"Its format version is {shown(version, 40)}, which is not a number.")
    # Apart from versions that never existed: a newer file is not damaged, and has another repair.
    if int(version) > FORMAT_VERSION:
        raise PackedFileError(
            f"It has format version {version}, this program reads up to {FORMAT_VERSION}: update sqs-pyro."
        )
    if version not in _VERSIONS:
        raise PackedFileError(f"It has format version {version}, which has never existed.")
    if not isinstance(digest, str):
        raise PackedFileError("Its header has no checksum.")
    return version, digest


def _length(header: Mapping[str, Any], name: str) -> int:
    entry = header.get(name)
    shape = entry.get("shape") if isinstance(entry, dict) else None
    # A bool is an int; 2^62 is far above any disk, and sums stay in 64 bits.
    if not isinstance(shape, list) or len(shape) != 1 or type(shape[0]) is not int or not 0 <= shape[0] < 1 << 62:
        raise PackedFileError(f"Its header has no valid entry for {name!r}.")
    return shape[0]
