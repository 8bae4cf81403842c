"""Compiling a source file of this package once, by one call of a compiler, and keeping the library.

Environment:
    SQS_CACHE: directory of compiled kernels instead of ``~/.cache/sqs_pyro``.
"""

import hashlib
import os
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path

_SECONDS = 300


class KernelWarning(UserWarning):
    """Some kernels are not there: packed networks run right, but slower, and perhaps larger."""


def compiled(
    kind: str, source: Path, command: Sequence[str], libraries: Sequence[str] = (), key: str = ""
) -> Path:
    """Return the compiled library; compiles it if there is none for this source, command and key.

    Two processes may do so at once: each writes a file of its own and renames it.

    Args:
        kind: what its file is called first.
        source: the file to compile.
        command: compiler and flags.
        libraries: what stands behind the source in the command.
        key: what else the library depends on.

    Raises:
        RuntimeError: the compiler failed; the message has what it said.
        OSError: neither the cache nor a temporary directory can be written to.
    """
    digest = hashlib.sha256(source.read_bytes())
    digest.update("\n".join([*command, key]).encode())
    name = f"{kind}-{digest.hexdigest()[:16]}.so"
    directory = _cache()
    target = directory / name
    if target.exists():
        return target
    try:
        directory.mkdir(parents=True, exist_ok=True)
        handle, part = tempfile.mkstemp(suffix=".so", dir=directory)
    except OSError:  # a cache that cannot be written to: this process compiles for itself
        directory = Path(tempfile.mkdtemp(prefix="sqs_pyro-"))
        target = directory / name
        handle, part = tempfile.mkstemp(suffix=".so", dir=directory)
    os.close(handle)
    try:
        result = subprocess.run(
            [*command, str(source), "-o", part, *libraries], capture_output=True, text=True, timeout=_SECONDS
        )
        if result.returncode:
            errors = [line for line in result.stderr.splitlines() if "error" in line] or result.stderr.splitlines()
            raise RuntimeError(f"{command[0]} failed: {errors[0].strip() if errors else 'it said nothing'}")
        Path(part).chmod(0o755)
        Path(part).replace(target)
    finally:
        Path(part).unlink(missing_ok=True)
    return target


def _cache() -> Path:
    if given := os.environ.get("SQS_CACHE"):
        return Path(given)
    home = os.environ.get("XDG_CACHE_HOME")
    return (Path(home) if home else Path.home() / ".cache") / "sqs_pyro"
