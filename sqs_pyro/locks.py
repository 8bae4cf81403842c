"""Locks between processes, by `filelock`: the system takes a lock back when its process ends, however it ends.

A lock is a file that is there only while somebody holds it. What a killed process left is taken over, or removed,
by the next one.
"""

import contextlib
import hashlib
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

from sqs_pyro.errors import OutputError


@contextmanager
def held(lock: Path, *, wait: bool = False) -> Iterator[None]:
    """Hold a lock file, which is made for it and gone afterwards.

    Raises:
        filelock.Timeout: another process holds it, and it is not waited for.
        OSError: the file cannot be made.
    """
    with FileLock(lock, blocking=wait):
        try:
            yield
        finally:
            # While it is held: whoever opened it meanwhile finds that it has no name, and makes a new one.
            with contextlib.suppress(OSError):
                lock.unlink()


@contextmanager
def alone_in(place: Path, lock: Path) -> Iterator[None]:
    """Keep other processes from working in a place.

    Args:
        place: a directory, for the sentence.
        lock: the file that stands for it.

    Raises:
        OutputError: another process works in it.
        OSError: the file cannot be made.
    """
    # Only the taking is tried: a Timeout out of the body, of a lock within it, means something else.
    with contextlib.ExitStack() as owned:
        try:
            owned.enter_context(held(lock))
        except Timeout:
            raise OutputError(
                f"'{place}' is in use by another process: wait for it, or choose another output directory."
            ) from None
        yield


def key_of(target: Path) -> str:
    """Return twelve hexadecimal digits for a name: what is beside a long one must not have a longer one."""
    return hashlib.sha256(os.fsencode(target.name)).hexdigest()[:12]


def lock_beside(target: Path) -> Path:
    """Return the lock file of whoever makes ``target``."""
    return target.with_name(f".sqs-{key_of(target)}.lock")
