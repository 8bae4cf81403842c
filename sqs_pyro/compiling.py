"""Compiling sources of this package once and keeping the library.

Environment:
    SQS_CACHE: directory of compiled kernels instead of ``~/.cache/sqs_pyro``.
    CXX: the compiler instead of ``c++``, ``g++`` or ``clang++``.
"""

import hashlib
import os
import shlex
import shutil
import signal
import subprocess
import tempfile
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from pathlib import Path

_COMPILERS = ("c++", "g++", "clang++")
_SECONDS = 300  # of one compiler, on a machine that does other things as well
_SEAL, _DIGEST = b"sqs-pyro sha256 ", 32


class KernelWarning(UserWarning):
    """Some kernels are not there: packed networks run right, but slower, and perhaps larger."""


def compiled(
    kind: str, sources: Iterable[Path], key: Sequence[str], build: Callable[[Path], None], *, suffix: str = ".so"
) -> Path:
    """Return the compiled library; builds it if there is none of these sources and this key, or a damaged one.

    Two processes may do so at once: each builds in a directory of its own, and renames. A library ends with its
    own digest, so that one that was cut or altered since is known: loading it would end the process.

    Args:
        kind: what its file is called first.
        sources: the files that it is made from.
        key: what else it depends on: compiler, flags, versions, machine.
        build: writes the library to a path; what else it writes beside it is removed.
        suffix: of the library.

    Raises:
        RuntimeError: ``build`` failed; the message has what the compiler said.
        OSError: neither the cache nor a temporary directory can be written to, or there is no library then.
    """
    # What the library is made of is its name: a changed source, compiler or processor finds no file and compiles
    # anew.
    digest = hashlib.sha256()
    for source in sources:
        digest.update(source.read_bytes())
    digest.update("\n".join(key).encode())
    name = f"{kind}-{digest.hexdigest()[:16]}{suffix}"
    directory = cache_directory()
    target = directory / name
    # No lock: whoever finds a whole library takes it, and a rename puts nothing else there.
    if _is_whole(target):
        return target
    try:
        directory.mkdir(parents=True, exist_ok=True)
        # Within the cache: a rename is atomic on one file system only.
        work = tempfile.TemporaryDirectory(prefix="part-", dir=directory)
    except OSError:  # a cache that cannot be written to: this process compiles for itself
        directory = Path(tempfile.mkdtemp(prefix="sqs_pyro-"))
        target = directory / name
        work = tempfile.TemporaryDirectory(prefix="part-", dir=directory)
    with work as part:
        library = Path(part) / name
        build(library)
        _seal(library)
        # An equal library of another process may be there, and even in use: a process keeps the file that it has
        # loaded.
        library.replace(target)
    return target


def _seal(library: Path) -> None:
    """Put the digest behind a library's bytes, where no loader looks, and all of it on the disk."""
    with library.open("r+b") as file:
        digest = hashlib.file_digest(file, "sha256").digest()
        file.seek(0, os.SEEK_END)
        file.write(_SEAL + digest)
        file.flush()
        os.fsync(file.fileno())  # a crash must not leave a name without content


def _is_whole(library: Path) -> bool:
    """Return whether a file is there that :func:`_seal` has ended."""
    try:
        content = library.read_bytes()
    except OSError:
        return False
    end = len(content) - len(_SEAL) - _DIGEST
    return end > 0 and content[end:] == _SEAL + hashlib.sha256(memoryview(content)[:end]).digest()


def compiler() -> list[str]:
    """Return the command of this machine's C++ compiler.

    Raises:
        RuntimeError: there is none.
    """
    if given := os.environ.get("CXX"):
        # CXX may bring options, as make has it: "ccache g++".
        if shutil.which(shlex.split(given)[0]) is None:
            raise RuntimeError(f"CXX is {given!r}, which is no program")
        return shlex.split(given)
    found = next((path for name in _COMPILERS if (path := shutil.which(name))), None)
    if found is None:
        raise RuntimeError(f"none of {', '.join(_COMPILERS)} is there")
    return [found]


def run_together(commands: Iterable[Sequence[str]]) -> None:
    """Run compilers side by side.

    Raises:
        RuntimeError: one failed; the message has its first error.
        subprocess.TimeoutExpired: one took too long.
    """
    # All at once: errors of one are looked at when all have ended, so that none is left running.
    started = [(command, _start(command)) for command in commands]
    try:
        said = [process.communicate(timeout=_SECONDS)[1] for _, process in started]
    finally:
        for _, process in started:
            _end(process)
    for (command, process), errors in zip(started, said, strict=True):
        if process.returncode:
            lines = [line for line in errors.splitlines() if "error" in line] or errors.splitlines()
            raise RuntimeError(f"{command[0]} failed: {lines[0].strip() if lines else 'it said nothing'}")


def _start(command: Sequence[str]) -> "subprocess.Popen[str]":
    # In a session of its own, which can be ended with all that the compiler's driver has started.
    return subprocess.Popen(
        command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, start_new_session=True
    )


def _end(process: "subprocess.Popen[str]") -> None:
    """Kill a compiler with what it has started; one that has ended stays so."""
    if process.poll() is None:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def cache_directory() -> Path:
    """Return where compiled kernels are kept."""
    if given := os.environ.get("SQS_CACHE"):
        return Path(given)
    home = os.environ.get("XDG_CACHE_HOME")
    return (Path(home) if home else Path.home() / ".cache") / "sqs_pyro"
