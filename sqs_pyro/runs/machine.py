"""What a figure of speed was measured on."""

import platform
from pathlib import Path
from typing import Any

import torch


def machine() -> dict[str, Any]:
    """The processor, its instructions for low precision, and versions of what did the work."""
    info = Path("/proc/cpuinfo")
    text = info.read_text(errors="replace") if info.exists() else ""
    model = next(
        (line.partition(":")[2].strip() for line in text.splitlines() if line.startswith("model name")), ""
    )
    flags = next((line.partition(":")[2].split() for line in text.splitlines() if line.startswith("flags")), [])
    useful = ("avx2", "avx512f", "avx512_bf16", "avx512_vnni", "amx_bf16")
    return {
        "processor": model or platform.processor() or platform.machine(),
        "instructions": [flag for flag in useful if flag in flags],
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "python": platform.python_version(),
    }
