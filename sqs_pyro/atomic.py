"""Whole or not at all: files and directories that have their names only when all of their bytes are on the disk.

What is written is made in a *place* beside its target, a directory ``.sqs-KEY-RANDOM.part``, flushed, and
renamed. A place belongs to whoever holds the lock in it. So a place without an owner is what a killed process
left; the next call for the same target removes it.
"""

import contextlib
import errno
import os
import re
import secrets
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import Timeout
from safetensors import SafetensorError

from sqs_pyro.errors import OutputError, first_line
from sqs_pyro.locks import held, key_of, lock_beside

_REPLACED = "replaced"  # in a place: the directory that is being replaced
_OWNER = ".owner"  # in a place: held by whoever works there
# In messages of the system, which names the file that it was given.
_PLACE = re.compile(r"\.sqs-[0-9a-f]{12}-[0-9a-f]{8}\.part/")
_NUMBER = re.compile(r"(?:code: |os error )(\d{1,4})\b")  # as releases of safetensors say it
_REPAIRS = {
    errno.ENOSPC: "make room on the disk",
    errno.EDQUOT: "make room within your quota",
    errno.EFBIG: "make room, or raise the limit on the size of files",
    errno.ENAMETOOLONG: "choose a shorter name",
    errno.ENOENT: "make its directory first, or correct the path",
    errno.ENOTDIR: "correct the path",
    errno.ELOOP: "correct the symbolic link",
    errno.EROFS: "choose a place that can be written",
    errno.EACCES: "choose a place that you may write to",
    errno.EPERM: "choose a place that you may write to",
    errno.EISDIR: "choose another path",
    errno.EEXIST: "choose another path",
}


@contextmanager
def one_sentence(path: str | Path) -> Iterator[None]:
    """Say in one sentence why ``path`` cannot be written, whatever the operating system or safetensors raise.

    Raises:
        OutputError: with the reason and the repair.
    """
    try:
        yield
    except (OSError, SafetensorError) as error:
        repair = _repair(error)
        if isinstance(error, FileNotFoundError) and Path(path).parent.is_dir():
            repair = "choose another path"  # as in /proc
        raise OutputError(f"'{path_text(path)}' cannot be written ({_reason(error)}): {repair}.") from error


def _reason(error: OSError | SafetensorError) -> str:
    return error.strerror if isinstance(error, OSError) and error.strerror else first_line(error)


def _repair(error: OSError | SafetensorError) -> str:
    # safetensors has one class for everything, and the system's number stands in its text only
    code = error.errno if isinstance(error, OSError) else _number_in(str(error))
    return _REPAIRS.get(code or 0, "make room, or choose another path")


def _number_in(text: str) -> int:
    found = _NUMBER.search(text)
    return int(found[1]) if found else 0


def path_text(path: str | Path) -> str:
    """Return a path for a sentence: where it shall be once its place is gone; a very long one is cut."""
    text = _PLACE.sub("", str(path))
    return text if len(text) <= 200 else f"{text[:90]}…{text[-90:]}"


def resolved(path: str | Path) -> Path:
    """Return the absolute path that is meant, behind symbolic links, whether or not something is there.

    Raises:
        OutputError: symbolic links lead in a circle, or the text is no path.
    """
    try:
        found = Path(os.path.realpath(path))
    except ValueError as error:  # a zero byte
        raise OutputError(f"{path_text(str(path))!r} is no path ({error}): correct it.") from None
    with one_sentence(path):
        if found.is_symlink():  # realpath stops in a circle
            raise OSError(errno.ELOOP, os.strerror(errno.ELOOP))
    return found


def check_place(path: str | Path, *, room: int = 0) -> None:
    """Check, before any work, that a file or directory can be made at ``path``; parents may be missing.

    Args:
        path: of what is to be made.
        room: bytes that its name must leave, for longer names beside it.

    Raises:
        OutputError: a file is in the way, the name is too long, or the place takes no files.
    """
    target = resolved(path)
    with one_sentence(path):
        if target == target.parent:
            raise OSError(errno.EISDIR, os.strerror(errno.EISDIR))
        parent = next(above for above in target.parents if above.exists())
        if not parent.is_dir():
            raise OutputError(f"'{path_text(path)}' cannot be made, because '{path_text(parent)}' is a file.")
        longest = os.pathconf(parent, "PC_NAME_MAX") - room
        if any(len(os.fsencode(part)) > longest for part in target.relative_to(parent).parts):
            raise OSError(errno.ENAMETOOLONG, os.strerror(errno.ENAMETOOLONG))
        with _place(parent / target.name):  # trying is the only check that knows of quotas, root and /proc
            pass


@contextmanager
def appearing(out: str | Path, *, parents: bool = False) -> Iterator[Path]:
    """Give a path to write to, a file or a directory; what is there afterwards becomes ``out``.

    It is flushed to the disk first and gets the mode that the umask gives to new files. A symbolic link stays one:
    its target is written. A failure leaves nothing, and what was there before as it was; so does a process that is
    killed, once the next call for the same ``out`` has removed its leftover.

    Args:
        out: the target; an older one is replaced.
        parents: whether missing parent directories are made.

    Raises:
        OutputError: the disk is full, the place cannot be written, or its name cannot be used.
    """
    target = resolved(out)
    with one_sentence(out):
        if parents:
            target.parent.mkdir(parents=True, exist_ok=True)
        clean(target)
        with _place(target) as place:
            # Under its own name already: some writers choose the format by it, or write it into the file.
            made = place / target.name
            yield made
            _give_mode(made, place.stat().st_mode)
            flush(made)  # before the rename: after a power cut the name must not stand for an empty file
            _exchange(made, target, place)


def write_bytes(path: str | Path, parts: Iterable[bytes | memoryview]) -> None:
    """Write a file of ``parts``, one behind the other; see :func:`appearing`."""
    with appearing(path) as made, made.open("wb") as file:
        file.writelines(parts)


def write_text(path: str | Path, text: str) -> None:
    """Write a file of UTF-8 text; see :func:`appearing`."""
    write_bytes(path, [text.encode("utf-8")])


def replace_directory(made: Path, target: Path, *, without: Iterable[str] = ()) -> None:
    """Publish a directory under its final name; an older one is removed after that.

    Args:
        made: the finished directory, beside ``target``; nothing else works in it.
        target: its final name.
        without: names in ``made`` that are left out, and removed.

    Raises:
        OutputError: it cannot be renamed or flushed.
    """
    with one_sentence(target):
        flush(made)
        with _place(target) as place:
            # Into the place, which is removed: the directory is without them before it has its final name.
            for name in without:
                if (made / name).exists():
                    (made / name).rename(place / name)
            _exchange(made, target, place)


@contextmanager
def merging(directory: str | Path, *, last: str, stale: Iterable[str] = ()) -> Iterator[Path]:
    """Give an empty directory to write to; its files take their places in ``directory`` when all are complete.

    Other files there stay. The file ``last`` is moved after all others: a reader begins with it.

    Args:
        directory: made if it is missing.
        last: name of the file that says what the others are.
        stale: patterns of older files that are removed unless they were written anew.

    Raises:
        OutputError: as :func:`appearing`.
    """
    target = resolved(directory)
    with one_sentence(directory):
        target.mkdir(parents=True, exist_ok=True)
        clean(target)
        with _place(target) as place:
            made = place / target.name
            made.mkdir()
            yield made
            _give_mode(made, place.stat().st_mode)
            flush(made)
            names = [path.relative_to(made) for path in tree(made) if path.is_file()]
            for old in {path for pattern in stale for path in target.glob(pattern)}:
                if old.relative_to(target) not in names:
                    old.unlink()
            # One by one, so not all at once; but who finds the new `last` finds all that it speaks of.
            for name in sorted(names, key=lambda name: (str(name) == last, name)):
                (target / name).parent.mkdir(exist_ok=True)
                (made / name).replace(target / name)
            _flush_one(target)


def clean(target: Path) -> None:
    """Remove what killed processes have left of ``target``; a directory that one was replacing is put back."""
    for left in target.parent.glob(f".sqs-{key_of(target)}-*.part"):
        with contextlib.suppress(OSError), held(left / _OWNER):  # another process owns it, or was faster
            if (left / _REPLACED).exists() and not target.exists():
                (left / _REPLACED).rename(target)
            shutil.rmtree(left)
    if (lock := lock_beside(target)).exists():
        with contextlib.suppress(OSError), held(lock):  # which removes it
            pass


def clean_inside(directory: Path) -> None:
    """Remove what killed processes have left in a directory that only the caller works in."""
    for left in directory.glob(".sqs-*.part"):
        shutil.rmtree(left)


@contextmanager
def _place(target: Path) -> Iterator[Path]:
    """Make a directory of our own beside the target, gone afterwards."""
    with contextlib.ExitStack() as owned:
        place = _new_place(target, owned)
        try:
            yield place
        finally:
            shutil.rmtree(place, ignore_errors=True)


def _new_place(target: Path, owned: contextlib.ExitStack) -> Path:
    while True:  # another name if somebody was faster; beside the target, as a rename cannot leave its disk
        place = target.parent / f".sqs-{key_of(target)}-{secrets.token_hex(4)}.part"
        place.mkdir()
        # between the two lines another process may take it for a leftover
        with contextlib.suppress(Timeout, FileNotFoundError):
            owned.enter_context(held(place / _OWNER))
            return place


def _exchange(made: Path, target: Path, place: Path) -> None:
    """Rename to the target; a directory, which cannot be renamed over, steps aside first."""
    if target.is_dir():
        if made.is_file():
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
        target.rename(place / _REPLACED)
    made.replace(target)
    _flush_one(target.parent)  # the directory holds the name, and is flushed by itself


def _give_mode(made: Path, mode: int) -> None:
    """Give the modes of the umask, in ``mode``; libraries make private files and rename them."""
    for path in tree(made):
        path.chmod(mode & 0o777 if path.is_dir() else mode & 0o666)


def flush(made: Path) -> None:
    """Wait until a file, or a directory and all that is in it, is on the disk."""
    for path in tree(made):
        _flush_one(path)


def _flush_one(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def tree(top: Path) -> list[Path]:
    """Return a file, or a directory and all that is in it; symbolic links left out."""
    return [path for path in [top, *top.rglob("*")] if not path.is_symlink()]
