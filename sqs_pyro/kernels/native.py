"""The CPU kernels: compiled for this machine by one call of its C++ compiler, on first use, and kept.

Environment:
    SQS_KERNELS: ``reference`` leaves them out: weights are decoded once and kept, in full size.
    SQS_CACHE: directory of compiled kernels instead of ``~/.cache/sqs_pyro``.
    CXX: the compiler instead of ``c++``, ``g++`` or ``clang++``.
    SQS_CXXFLAGS: what to compile for, ``-march=native`` by default.
"""

import hashlib
import os
import platform
import shlex
import shutil
import subprocess
import tempfile
import warnings
from functools import cache
from pathlib import Path

import torch

_SOURCE = Path(__file__).parent / "cpu" / "tiled.cpp"
_COMPILERS = ("c++", "g++", "clang++")
_SECONDS = 300


class KernelWarning(UserWarning):
    """There are no compiled CPU kernels: packed networks run on decoded weights, right but slow and large."""


@cache
def native_kernels() -> bool:
    """Whether ``sqs::linear_tiled`` runs compiled on the CPU; compiles and loads it at the first call.

    Where that fails, one :class:`KernelWarning` says why and what would help, and nothing else changes.
    """
    if os.environ.get("SQS_KERNELS") == "reference":
        return False
    try:
        torch.ops.load_library(compiled_kernels())
    except (OSError, RuntimeError, subprocess.SubprocessError) as error:
        warnings.warn(
            f"CPU kernels could not be compiled ({error}): packed networks run on decoded weights, slower and "
            "larger. Install a C++20 compiler (say g++ 11; CXX names another), or set SQS_KERNELS=reference "
            "to silence this.",
            KernelWarning,
            stacklevel=2,
        )
        return False
    return True


def has_native_kernel(op: str) -> bool:
    """Whether ``sqs::<op>`` is compiled for CPUs: the dispatcher knows what the library has brought."""
    return native_kernels() and torch._C._dispatch_has_kernel_for_dispatch_key(f"sqs::{op}", "CPU")


def compiled_kernels(standalone: bool = False) -> Path:
    """Return the compiled library; compiles it if there is none for this source, compiler, torch and machine.

    Two processes may do so at once: each writes a file of its own and renames it.

    Args:
        standalone: a library that declares its operators, too, for processes without Python.

    Raises:
        RuntimeError: there is no compiler, or it failed; the message has what it said.
        OSError: neither the cache nor a temporary directory can be written to.
    """
    command = [*_compiler(), *_flags(standalone)]
    key = hashlib.sha256()
    key.update(_SOURCE.read_bytes())
    key.update("\n".join([*command, str(torch.__version__), _machine()]).encode())
    name = f"cpu-{key.hexdigest()[:16]}.so"
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
            [*command, str(_SOURCE), "-o", part, *_linked()], capture_output=True, text=True, timeout=_SECONDS
        )
        if result.returncode:
            errors = [line for line in result.stderr.splitlines() if "error" in line] or result.stderr.splitlines()
            raise RuntimeError(f"{command[0]} failed: {errors[0].strip() if errors else 'it said nothing'}")
        Path(part).chmod(0o755)
        Path(part).replace(target)
    finally:
        Path(part).unlink(missing_ok=True)
    return target


def _compiler() -> list[str]:
    if given := os.environ.get("CXX"):
        if shutil.which(shlex.split(given)[0]) is None:
            raise RuntimeError(f"CXX is {given!r}, which is no program")
        return shlex.split(given)
    found = next((path for name in _COMPILERS if (path := shutil.which(name))), None)
    if found is None:
        raise RuntimeError(f"none of {', '.join(_COMPILERS)} is there")
    return [found]


def _flags(standalone: bool) -> list[str]:
    root = Path(torch.__file__).parent / "include"
    flags = [
        "-O2",
        "-fpeel-loops",
        "-funswitch-loops",
        "-std=c++20",
        "-shared",
        "-fPIC",
        "-w",
        f"-I{root}",
        f"-I{root / 'torch/csrc/api/include'}",
    ]
    machine = shlex.split(os.environ.get("SQS_CXXFLAGS", "-march=native"))
    return [*flags, *machine, *(["-DSQS_STANDALONE"] if standalone else [])]


def _linked() -> list[str]:
    return [f"-L{Path(torch.__file__).parent / 'lib'}", "-ltorch_cpu"]


def _machine() -> str:
    """What ``-march=native`` depends on."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text(errors="replace").splitlines() if info.exists() else []
    told = [line for line in lines if line.startswith(("flags", "Features", "model name"))]
    return "\n".join([platform.machine(), *sorted(set(told))])


def _cache() -> Path:
    if given := os.environ.get("SQS_CACHE"):
        return Path(given)
    home = os.environ.get("XDG_CACHE_HOME")
    return (Path(home) if home else Path.home() / ".cache") / "sqs_pyro"
