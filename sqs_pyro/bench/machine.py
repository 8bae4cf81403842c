"""What a figure of speed was measured on."""

import importlib.metadata
import importlib.util
import platform
from typing import Any

import torch

from sqs_pyro.kernels.processor import processor


def machine() -> dict[str, Any]:
    """The processor, its instructions for low precision, and versions of what did the work."""
    model, flags = processor()
    useful = ("avx2", "avx512f", "avx512_bf16", "avx512_vnni", "amx_bf16")
    return {
        "processor": model,
        "instructions": [flag for flag in useful if flag in flags],
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "python": platform.python_version(),
    }


def gpu() -> dict[str, Any]:
    """The current GPU, and versions of what its kernels are made with."""
    found = torch.cuda.get_device_properties(torch.cuda.current_device())
    triton = importlib.util.find_spec("triton") is not None and importlib.metadata.version("triton")
    return {
        "gpu": found.name,
        "capability": f"{found.major}.{found.minor}",
        "processors": found.multi_processor_count,
        "cuda": torch.version.cuda,
        "triton": triton or None,
    }
