"""One file or directory of output that appears under its name only when it is complete."""

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError

from sqs_pyro.errors import OutputError
from sqs_pyro.runs.directory import check_writable


def check_free(out: Path, mark: str | None, *, overwrite: bool) -> None:
    """Check, without changing anything, that output may be written.

    Args:
        out: where to.
        mark: of a directory, a file that every output of its kind holds; None: the output is a file.
        overwrite: whether older output of the same kind may be replaced.

    Raises:
        OutputError: something is in the way.
    """
    check_writable(out.absolute().parent)
    if not out.exists() or (mark is not None and out.is_dir() and not any(out.iterdir())):
        return
    if not (out.is_file() if mark is None else (out / mark).is_file()):
        what = "no file" if mark is None else f"no directory of this format (it holds no {mark})"
        raise OutputError(f"'{out}' exists and is {what}: choose another path.")
    if not overwrite:
        raise OutputError(f"'{out}' exists: choose another path, or replace it with --overwrite.")


@contextmanager
def appearing(out: Path) -> Iterator[Path]:
    """Give a path beside ``out`` to write to; what is there afterwards is flushed to the disk and becomes ``out``.

    A failure leaves nothing, and what was there before as it was.

    Raises:
        OutputError: the disk is full, or not writable.
    """
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f".{out.name}.", suffix=".part", dir=out.parent) as place:
            made = Path(place) / out.name
            yield made
            for path in [made, *made.rglob("*")]:
                _flush(path)
            if out.is_dir():
                out.rename(Path(place) / "replaced")
            made.replace(out)
    except (OSError, SafetensorError) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        raise OutputError(f"'{out}' cannot be written ({reason}): make room, or choose another path.") from error


def _flush(path: Path) -> None:
    if path.is_file():
        handle = os.open(path, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def tree_bytes(path: Path) -> dict[str, int]:
    """Bytes of a file, or of each file of a directory by its path in it."""
    if path.is_file():
        return {path.name: path.stat().st_size}
    return {str(p.relative_to(path)): p.stat().st_size for p in sorted(path.rglob("*")) if p.is_file()}
