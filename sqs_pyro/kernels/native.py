"""The CPU kernels: compiled for this machine by one call of its C++ compiler, on first use, and kept.

Environment:
    SQS_KERNELS: ``reference`` leaves them out: weights are decoded once and kept, in full size.
    SQS_CACHE: directory of compiled kernels instead of ``~/.cache/sqs_pyro``.
    CXX: the compiler instead of ``c++``, ``g++`` or ``clang++``.
    SQS_CXXFLAGS: what to compile for, ``-march=native`` by default.
"""

import os
import platform
import shlex
import shutil
import subprocess
import warnings
from functools import cache
from pathlib import Path

import torch

from sqs_pyro.kernels.compiled import KernelWarning, compiled, run_together

_SOURCE = Path(__file__).parent / "cpu" / "tiled.cpp"
_COMPILERS = ("c++", "g++", "clang++")


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

    def build(library: Path) -> None:
        run_together([[*command, str(_SOURCE), "-o", str(library), *_linked()]])

    return compiled("cpu", [_SOURCE], [*command, str(torch.__version__), _machine()], build)


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
