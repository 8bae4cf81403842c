"""The CUDA C++ kernels: compiled by nvcc for this GPU, on first use, and kept like those for CPUs.

They multiply few rows of float16 or bfloat16 with codes of 1 to 4 bits that share one table. Without nvcc the
Triton kernels do.

Environment:
    SQS_CACHE: directory of compiled kernels instead of ``~/.cache/sqs_pyro``.
    NVCC: the compiler instead of ``nvcc`` in PATH or in ``CUDA_HOME``.
"""

import ctypes
import os
import shutil
import subprocess
import warnings
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from sqs_pyro.compiling import KernelWarning, compiled, run_together

SOURCE = Path(__file__).parent / "dense.cu"


@cache
def cuda_kernels(architecture: str) -> ctypes.CDLL | None:
    """Return the library for an architecture, ``"90"`` say; None, with one :class:`KernelWarning`, without."""
    try:
        # ctypes, not a torch extension: nothing in it depends on torch, and nvcc alone can build it.
        library = ctypes.CDLL(str(compiled_cuda(architecture)))
    except (OSError, RuntimeError, subprocess.SubprocessError) as error:
        warnings.warn(
            f"CUDA kernels could not be compiled ({error}): small products run on Triton's. Install nvcc (NVCC "
            "names it where PATH and CUDA_HOME do not).",
            KernelWarning,
            stacklevel=2,
        )
        return None
    declare(library)
    return library


def declare(library: ctypes.CDLL) -> None:
    """Say what the library's functions take and return."""
    numbers, pointers = [ctypes.c_int] * 6, [ctypes.c_void_p] * 6
    library.sqs_linear.argtypes = [ctypes.c_int, ctypes.c_void_p, *numbers, *pointers]
    library.sqs_error.restype = ctypes.c_char_p


def compiled_cuda(architecture: str) -> Path:
    """Return the library compiled for an architecture.

    Raises:
        RuntimeError: there is no nvcc, or it failed; the message has what it said.
        OSError: neither the cache nor a temporary directory can be written to.
    """
    command = [*nvcc_command(architecture), "-shared", "-Xcompiler", "-fPIC"]
    # The path of nvcc stays when CUDA is updated; its version does not.
    version = subprocess.run([command[0], "--version"], capture_output=True, text=True, timeout=60).stdout

    def build(library: Path) -> None:
        run_together([[*command, str(SOURCE), "-o", str(library)]])

    return compiled("cuda", [SOURCE], [*command, version], build)


def nvcc_command(architecture: str) -> list[str]:
    """Return the compiler and what it is told of the architecture, ``"90"`` say.

    Raises:
        RuntimeError: there is no nvcc.
    """
    target = f"arch=compute_{architecture},code=sm_{architecture}"
    return [_nvcc(), "-O3", "-std=c++17", "-gencode", target]


def linear(
    x: Tensor, bias: Tensor | None, codes: Tensor, table: Tensor, scales: Tensor | None, bits: int, out: Tensor
) -> bool:
    """Write ``x @ W.T + bias`` to ``out``; returns False, and nothing is done, without the kernels.

    Args:
        x: ``[rows, K]``, float16 or bfloat16 on a GPU, at most 16 rows, K a multiple of 32.
        bias: ``[N]``, in the dtype of x.
        codes: the weight's, of at most 4 bits.
        table: float32 ``[1, S]``.
        scales: float32 ``[N]``.
        bits: of a code.
        out: ``[rows, N]``, in the dtype of x.

    Raises:
        RuntimeError: the GPU refused; the message has what CUDA said.
    """
    library = cuda_kernels("".join(map(str, torch.cuda.get_device_capability(x.device))))
    if library is None:
        return False
    # The kernels load 16 bytes at once.
    x, codes = (t if t.is_contiguous() and t.data_ptr() % 16 == 0 else t.clone().contiguous() for t in (x, codes))
    pointers = [None if t is None else t.data_ptr() for t in (x, codes, table, scales, bias, out)]
    # The caller's: results are then ordered like those of torch's own kernels.
    stream = torch.cuda.current_stream(x.device).cuda_stream
    sizes = (int(x.dtype == torch.bfloat16), bits, *out.shape, x.shape[1], table.numel())
    with torch.cuda.device(x.device):  # restores the device that the library sets
        error = library.sqs_linear(x.device.index, stream, *sizes, *pointers)
    if error:
        raise RuntimeError(f"sqs: a product on the GPU failed: {library.sqs_error(error).decode()}")
    return True


def _nvcc() -> str:
    if given := os.environ.get("NVCC"):
        if shutil.which(given) is None:
            raise RuntimeError(f"NVCC is {given!r}, which is no program")
        return given
    homes = [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH"), "/usr/local/cuda"]
    places = [str(Path(home) / "bin") for home in homes if home]
    found = shutil.which("nvcc") or shutil.which("nvcc", path=os.pathsep.join(places))
    if found is None:
        raise RuntimeError("no nvcc is there")
    return found
