"""What every run tells while it goes on, and notes beside its results: time, versions, machine."""

import importlib.metadata
import importlib.util
import platform
import time
from collections.abc import Callable
from typing import Any

import torch

from sqs_pyro.errors import RecipeError
from sqs_pyro.kernels.processor import processor

Progress = Callable[[str, int, int, str], None]
"""Called as ``progress(stage, done, total, text)``, often: a stage is a word, its text one short line."""


def silent(stage: str, done: int, total: int, text: str) -> None:
    """Tell nobody."""


class Clock:
    """Seconds from lap to lap, by the lap's name."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._last = time.perf_counter()

    def lap(self, name: str) -> None:
        """Note under a name how long it is since the last lap, or since the clock was made."""
        now = time.perf_counter()
        self.seconds[name], self._last = now - self._last, now


def versions(*more: str) -> dict[str, str]:
    """Return versions of Python and of the packages that results depend on, ``more`` of them if need be."""
    packages = ("sqs-pyro", "torch", "pyro-ppl", *more)
    return {"python": platform.python_version()} | {name: importlib.metadata.version(name) for name in packages}


def machine() -> dict[str, Any]:
    """Return the processor, its instructions for low precision, and versions of what did the work."""
    model, flags = processor()
    # Those that torch's and our kernels choose by: timings of two machines differ by them first.
    useful = ("avx2", "avx512f", "avx512_bf16", "avx512_vnni", "amx_bf16")
    return {
        "processor": model,
        "instructions": [flag for flag in useful if flag in flags],
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "python": platform.python_version(),
    }


def chosen_device(name: str) -> torch.device:
    """Return the device of a name: ``"auto"`` is what the machine has, any other has to be there.

    Raises:
        RecipeError: it is not.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    device = torch.device(name)
    there = {"cpu": 1, "mps": int(torch.backends.mps.is_available()), "cuda": torch.cuda.device_count()}
    if (device.index or 0) >= there[device.type]:
        seen = f"sees {there['cuda']} GPUs" if device.type == "cuda" else "has no such device"
        raise RecipeError(f"Recipe key 'device' is {name!r}, but torch {seen} here: give 'auto' or 'cpu'.")
    return device


def gpu() -> dict[str, Any]:
    """Return the current GPU, and versions of what its kernels are made with."""
    found = torch.cuda.get_device_properties(torch.cuda.current_device())
    # Asked, not imported: a benchmark of CUDA kernels alone does without.
    triton = importlib.util.find_spec("triton") is not None and importlib.metadata.version("triton")
    return {
        "gpu": found.name,
        "capability": f"{found.major}.{found.minor}",
        "processors": found.multi_processor_count,
        "cuda": torch.version.cuda,
        "triton": triton or None,
    }
