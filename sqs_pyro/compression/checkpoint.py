"""State that is kept between runs: written whole or not at all, with a digest, read without executing anything.

A kept file is what ``torch.save`` writes and, behind it, a line with the SHA-256 of all bytes before it.
"""

import hashlib
import io
from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO, cast

import torch

from sqs_pyro.atomic import appearing
from sqs_pyro.errors import DataError, NetworkError, RecipeError, SQSError, first_line
from sqs_pyro.fingerprint import Fingerprint, first_difference

_SEAL = b"\nsqs-pyro sha256 "
_SEAL_BYTES = len(_SEAL) + 64  # and the digest in hexadecimal


class _Sealing(io.RawIOBase):
    """Passes on what is written; remembers its digest, and the system's error, which torch replaces by its own."""

    def __init__(self, file: BinaryIO) -> None:
        self.file, self.digest = file, hashlib.sha256()
        self.error: OSError | None = None

    def writable(self) -> bool:
        return True

    def write(self, data: Any) -> int:
        try:
            self.file.write(data)
        except OSError as error:
            self.error = error
            raise
        self.digest.update(data)  # of what has been written, and only that
        return len(data)


def write_checkpoint(path: Path, state: Mapping[str, Any]) -> None:
    """Keep a state; an interruption leaves the previous one whole.

    Args:
        path: the file; missing directories are made.
        state: tensors and plain data.

    Raises:
        OutputError: the disk is full, or the place cannot be written.
    """
    with appearing(path, parents=True) as made, made.open("wb") as file:
        sealing = _Sealing(file)
        # torch.save writes from front to back, so a digest can go along: no second pass over the file.
        try:
            torch.save(dict(state), cast(BinaryIO, sealing))
        except RuntimeError as error:
            if sealing.error is not None:
                raise sealing.error from None  # of which `appearing` makes a sentence
            if isinstance(error.__context__, KeyboardInterrupt):  # torch replaces it, too
                raise error.__context__ from None
            raise
        file.write(_SEAL + sealing.digest.hexdigest().encode())


def read_checkpoint(path: Path, keys: frozenset[str] = frozenset()) -> dict[str, Any]:
    """Read what :func:`write_checkpoint` wrote, on the CPU; it must hold ``keys``.

    Raises:
        NetworkError: the file is damaged, or is no checkpoint.
    """
    if path.is_dir():
        raise NetworkError(
            f"Checkpoint '{path}' is a directory: give the path of a file, say '{path / 'kept.pt'}'."
        )
    try:
        # One open file for both: nobody can put another in its place between the check and the reading.
        with path.open("rb") as file:
            _check_seal(file)
            state = torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # torch.load raises a different class for each kind of damage
        reason = first_line(error)
        raise NetworkError(f"Checkpoint '{path}' cannot be read ({reason}): delete it to start again.") from None
    missing = keys - set(state) if isinstance(state, dict) else keys
    if missing:
        raise NetworkError(
            f"'{path}' is no checkpoint of this kind: it has no {', '.join(sorted(missing))}; give another path."
        )
    return dict(state)


def _check_seal(file: BinaryIO) -> None:
    """Check the digest over the content, and go back to the beginning."""
    size = file.seek(0, io.SEEK_END)
    content = max(size - _SEAL_BYTES, 0)
    file.seek(content)
    seal = file.read(_SEAL_BYTES)
    if not seal.startswith(_SEAL):
        raise NetworkError("its checksum is missing: it is damaged, or of an older version")
    file.seek(0)
    digest = hashlib.sha256()
    # A mebibyte at a time: a state may be larger than what is left of the memory.
    while content and (part := file.read(min(content, 1 << 20))):
        digest.update(part)
        content -= len(part)
    if digest.hexdigest().encode() != seal.removeprefix(_SEAL):
        raise NetworkError("its checksum does not fit, it was altered")
    file.seek(0)


_MADE = {"network": "of another network", "data": "with other data"}
_ERRORS: dict[str, type[SQSError]] = {"network": NetworkError, "data": DataError}


def check_same(saved: Fingerprint, now: Fingerprint, path: Path) -> None:
    """Check that a kept state belongs to the call at hand.

    Args:
        saved: fingerprint of the call that kept it.
        now: of this call.
        path: where it is kept.

    Raises:
        NetworkError: it was made of another network, or of other weights.
        DataError: of other data.
        RecipeError: with another recipe or another setting. All name the first thing that differs.
    """
    difference = first_difference(saved, now)
    if difference is not None:
        part, what = difference
        raise _ERRORS.get(part, RecipeError)(
            f"'{path}' was made {_MADE.get(part, f'with another {part}')} ({what}): go back to what it was made "
            "of, or give another path to start again."
        )
