"""The CPU kernels: compiled for this machine by its C++ compiler, on first use, and kept.

Environment:
    SQS_KERNELS: ``reference`` leaves them out: weights are decoded once and kept, in full size.
    SQS_CACHE: directory of compiled kernels instead of ``~/.cache/sqs_pyro``.
    CXX: the compiler instead of ``c++``, ``g++`` or ``clang++``.
    SQS_CXXFLAGS: what to compile for, ``-march=native`` by default.
"""

import ctypes
import os
import shlex
import subprocess
import warnings
from functools import cache
from pathlib import Path

import torch

from sqs_pyro.compiling import KernelWarning, compiled, compiler, run_together
from sqs_pyro.kernels.processor import processor_text

_DIRECTORY = Path(__file__).parent / "cpu"
#: What is compiled together, side by side: the form of weights, or the operation, that needs it, and its sources.
SOURCES = {
    "tiled": ("tiled.cpp", "convolution_float32.cpp", "convolution_bfloat16.cpp", "convolution.cpp"),
    "rows": ("rows.cpp",),
    "attention": ("attention.cpp",),
    "coding": ("coding.cpp",),
}
#: What some are compiled with besides: here each operation is rounded for itself, as by a call of torch for each.
_OPTIONS = {"coding": ["-ffp-contract=off"]}
#: What declares the operators for processes without our Python, which has them from :mod:`sqs_pyro.kernels.ops`.
DECLARATIONS = "declarations"
_LIBRARIES = {**SOURCES, DECLARATIONS: ("declarations.cpp",)}


@cache
def native_kernels(form: str) -> bool:
    """Return whether the ops of a form run compiled on the CPU; compiles and loads them at the first call.

    Where that fails, one :class:`KernelWarning` says why and what would help, and nothing else changes.
    """
    if os.environ.get("SQS_KERNELS") == "reference":
        return False
    try:
        # Cached by form: a library is loaded once, and one that failed is not tried, nor warned of, again.
        torch.ops.load_library(compiled_kernels(form))
    except (OSError, RuntimeError, subprocess.SubprocessError) as error:
        warnings.warn(
            f"CPU kernels could not be compiled ({error}): packed networks run on decoded weights, slower and "
            "larger, and blocks are compressed more slowly. Install a C++20 compiler (say g++ 11; CXX names "
            "another), or set SQS_KERNELS=reference to silence this.",
            KernelWarning,
            stacklevel=2,
        )
        return False
    return True


def has_native_kernel(op: str) -> bool:
    """Return whether ``sqs::<op>`` is compiled for CPUs: the dispatcher knows what its form's library brings."""
    form = op.rpartition("_")[2]  # "linear_tiled" -> "tiled", "cached_attention" -> "attention"
    if form not in SOURCES or not native_kernels(form):
        return False
    return torch._C._dispatch_has_kernel_for_dispatch_key(f"sqs::{op}", "CPU")


def bfloat16_products() -> str | None:
    """Return what bfloat16 is multiplied by: ``"a matrix unit"``, ``"products of pairs"`` or ``"float32"``.

    None without compiled kernels. Which is the fastest depends on the processor, and is found out at first use.
    """
    if not native_kernels("tiled"):
        return None
    said = ctypes.CDLL(str(compiled_kernels("tiled"))).sqs_bfloat16_products
    said.restype = ctypes.c_char_p
    return bytes(said()).decode()


def compiled_kernels(form: str) -> Path:
    """Return the compiled library; compiles it if there is none for this source, compiler, torch and machine.

    Two processes may do so at once: each writes a file of its own and renames it.

    Args:
        form: one of ``SOURCES``, or ``DECLARATIONS``.

    Raises:
        RuntimeError: there is no compiler, or it failed; the message has what it said.
        OSError: neither the cache nor a temporary directory can be written to.
    """
    command = [*compiler(), *_flags(), *_OPTIONS.get(form, [])]
    sources = [_DIRECTORY / source for source in _LIBRARIES[form]]

    def build(library: Path) -> None:
        # Beside the library, in the directory that is removed afterwards.
        objects = [library.with_name(f"{source.name}.o") for source in sources]
        run_together([*command, "-c", str(s), "-o", str(o)] for s, o in zip(sources, objects, strict=True))
        run_together([[*command, *map(str, objects), "-o", str(library), *_linked()]])

    # -march=native means another thing on each processor, and a home directory may be shared by several.
    key = [*command, str(torch.__version__), processor_text()]
    # Every header counts, included or not: rather once too often than a stale library.
    return compiled(form, [*sources, *sorted(_DIRECTORY.glob("*.h"))], key, build)


def _flags() -> list[str]:
    root = Path(torch.__file__).parent / "include"
    flags = [
        "-O2",
        "-fpeel-loops",
        "-funswitch-loops",
        "-std=c++20",
        "-shared",
        "-fPIC",
        "-fvisibility=hidden",  # a process may load the libraries of several versions and forms
        "-w",
        f"-I{root}",
        f"-I{root / 'torch/csrc/api/include'}",
    ]
    return [*flags, *shlex.split(os.environ.get("SQS_CXXFLAGS", "-march=native"))]


def _linked() -> list[str]:
    return [f"-L{Path(torch.__file__).parent / 'lib'}", "-ltorch_cpu"]
