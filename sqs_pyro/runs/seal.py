"""A list of digests beside finished files: what belongs to a directory, and whether it is as it was written."""

import fnmatch
import hashlib
from pathlib import Path

from sqs_pyro.atomic import merging, one_sentence, write_text
from sqs_pyro.errors import OutputError

SUMS = "SHA256SUMS"  # in the format of sha256sum, which checks it too
_HEAD = "# written by sqs-pyro"  # other programs write files of this name, too


def seal(directory: Path, leave_out: tuple[str, ...] = ()) -> None:
    """Write the digests of all files in a directory, those called ``leave_out`` (or inside them) excepted.

    Raises:
        OutputError: the list cannot be written.
    """
    with one_sentence(directory / SUMS):
        files = [path for path in _files(directory) if path.relative_to(directory).parts[0] not in leave_out]
        lines = [f"{_digest(path)}  {path.relative_to(directory).as_posix()}" for path in files]
    # Last: a directory with a list is one that was finished.
    write_text(directory / SUMS, "\n".join([_HEAD, *lines]) + "\n")


def put(directory: Path, name: str, text: str) -> None:
    """Write a file of text into a finished directory, and its digest into the list, if there is one.

    Raises:
        OutputError: it cannot be written, or the list is damaged.
    """
    listed = _listed(directory)
    if listed is None:
        write_text(directory / name, text)
        return
    content = text.encode("utf-8")
    before, digest = listed.get(name), hashlib.sha256(content).hexdigest()
    if before == digest and (directory / name).is_file() and _digest(directory / name) == digest:
        return  # as it is: nothing is written, and nobody who reads the directory meanwhile is disturbed
    with merging(directory, last=SUMS) as made:
        (made / name).write_bytes(content)
        lines = [f"{sum_}  {path}" for path, sum_ in sorted({**listed, name: digest}.items())]
        (made / SUMS).write_text("\n".join([_HEAD, *lines]) + "\n", encoding="utf-8")


def check_sealed(directory: Path, only: tuple[str, ...] = ()) -> None:
    """Check the files of a sealed directory, or ``only`` some; one without a list, of older versions, passes.

    Raises:
        OutputError: naming the file that is missing or was altered.
    """
    for name, digest in (_listed(directory) or {}).items():
        path = directory / name
        if only and name not in only:
            continue
        if not path.is_file():
            raise OutputError(f"'{path}' is missing: put it back, or delete '{directory}' and make it anew.")
        if _digest(path) != digest:
            raise OutputError(
                f"'{path}' was altered after it was written: put it back, or delete '{directory}' and make it "
                "anew."
            )


def foreign_file(directory: Path, older: tuple[str, ...]) -> str | None:
    """Return the first file of a directory that this program did not write, or None.

    Args:
        directory: to look at.
        older: patterns of the names that older versions, which wrote no list, gave to their files.

    Raises:
        OutputError: the list is damaged.
    """
    listed = _listed(directory)
    if listed is None:
        return unknown_file(directory, older)
    # Of any depth; that a listed file was altered or removed is `check_sealed`'s to say.
    return next((name for name in _names(directory) if name not in listed), None)


def unknown_file(directory: Path, known: tuple[str, ...]) -> str | None:
    """Return the first file of a directory whose path in it fits no pattern of ``known``, or None."""
    for name in _names(directory):
        if not any(fnmatch.fnmatchcase(name, pattern) for pattern in known):
            return name
    return None


def is_sealed(directory: Path) -> bool:
    """Return whether a directory has a list of digests of this program."""
    try:
        with (directory / SUMS).open(encoding="utf-8", errors="replace") as file:
            return file.readline().rstrip("\n") == _HEAD
    except OSError:
        return False


def is_our_directory(out: Path) -> bool:
    """Return whether a directory was written as a whole by this program, and nobody has put anything into it."""
    return out.is_dir() and is_sealed(out) and foreign_file(out, ()) is None


def _listed(directory: Path) -> dict[str, str] | None:
    """Return digests by name; None: there is no list."""
    path = directory / SUMS
    if not path.exists():
        return None
    # The last line must be whole, ending in a newline: a list that was cut would know too few files.
    lines = path.read_bytes().decode("utf-8", errors="replace").split("\n")  # not at every control character
    parted = [line.partition("  ") for line in lines[1:-1]]
    if lines[0] != _HEAD or lines[-1] or not all(len(digest) == 64 and name for digest, _, name in parted):
        raise OutputError(f"'{path}' is damaged: put it back, or delete '{directory}' and make it anew.")
    return {name: digest for digest, _, name in parted}


def _files(directory: Path) -> list[Path]:
    return [path for path in sorted(directory.rglob("*")) if path.is_file() and path.name != SUMS]


def _names(directory: Path) -> list[str]:
    return [path.relative_to(directory).as_posix() for path in _files(directory)]


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
