"""What a figure of speed was measured on."""

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
