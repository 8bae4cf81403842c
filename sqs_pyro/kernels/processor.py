"""What the processor is: its model and its instructions."""

import platform
from pathlib import Path

import torch


def processor() -> tuple[str, list[str]]:
    """Return the model's name and the names of its instruction set's extensions, as far as the system tells."""
    info = Path("/proc/cpuinfo")
    # Linux only; elsewhere the model's name has to do.
    lines = info.read_text(errors="replace").splitlines() if info.exists() else []
    told = {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in lines)}
    model = told.get("model name") or platform.processor() or platform.machine()
    return model, told.get("flags", told.get("Features", "")).split()  # x86 and ARM


def processor_text() -> str:
    """Return all that ``-march=native`` depends on, as one text."""
    model, extensions = processor()
    return "\n".join([platform.machine(), model, *sorted(extensions)])


def multiplies_bfloat16(device: torch.device) -> bool:
    """Return whether a device has instructions for bfloat16; of CPUs without them only x86 ones are known."""
    if device.type != "cpu" or platform.machine() not in ("x86_64", "AMD64"):
        return True
    return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
