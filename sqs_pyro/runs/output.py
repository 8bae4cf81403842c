"""What stands in the way of an output, and how large it is. It is written through :mod:`sqs_pyro.atomic`."""

from collections.abc import Callable
from pathlib import Path

from sqs_pyro.atomic import check_place, clean, resolved
from sqs_pyro.errors import OutputError
from sqs_pyro.runs.seal import foreign_file, is_sealed


def check_free(out: Path, kind: str, is_ours: Callable[[Path], bool], *, overwrite: bool) -> None:
    """Check that output may be written; nothing but leftovers of killed processes is changed.

    Args:
        out: where to.
        kind: what it is, for the sentence.
        is_ours: whether what is there is older output of that kind; only that is ever replaced.
        overwrite: whether it may be.

    Raises:
        OutputError: something is in the way.
    """
    check_place(out)
    clean(resolved(out))
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return
    if not is_ours(out):
        raise OutputError(f"'{out}' exists and is no {kind} that sqs-pyro wrote: choose another path.")
    if not overwrite:
        raise OutputError(f"'{out}' exists: choose another path, or replace it with --overwrite.")


def is_our_directory(out: Path) -> bool:
    """Whether a directory was written as a whole by this program, and nobody has put anything into it."""
    return out.is_dir() and is_sealed(out) and foreign_file(out, ()) is None


def tree_bytes(path: Path) -> dict[str, int]:
    """Bytes of a file, or of each file of a directory by its path in it."""
    if path.is_file():
        return {path.name: path.stat().st_size}
    return {str(p.relative_to(path)): p.stat().st_size for p in sorted(path.rglob("*")) if p.is_file()}
