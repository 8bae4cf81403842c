"""The ops of the forms ``dense`` and ``bitmap`` on GPUs. Imported for effect; Triton comes with the first weight.

Without Triton, with ``SQS_KERNELS=reference``, and for what kernels do not compute (float64, convolutions,
gradients, weights of one value) the reference stays: weights decoded once and kept.
"""

import os
import warnings
from functools import cache, partial
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from sqs_pyro.compiling import KernelWarning
from sqs_pyro.kernels.decode import PackedArgs
from sqs_pyro.kernels.ops import OPS, REFERENCES, result_dtype, split_arguments

_NAMES = ("linear", "embedding", "weight")


@cache
def gpu_kernels() -> ModuleType | None:
    """Return :mod:`sqs_pyro.kernels.gpu.launch`, or None, with one :class:`KernelWarning`, without Triton."""
    # Read once, as the result is kept: a process does not change its kernels.
    if os.environ.get("SQS_KERNELS") == "reference":
        return None
    try:
        from sqs_pyro.kernels.gpu import launch  # imports Triton
    except ImportError as error:
        warnings.warn(
            f"GPU kernels need Triton ({error}): packed networks run on decoded weights, slower and larger. "
            "Install triton, in the version that PyTorch names, or set SQS_KERNELS=reference to silence this.",
            KernelWarning,
            stacklevel=2,
        )
        return None
    return launch


def register(device: str) -> None:
    """Let the ops run on the kernels on this type of device."""
    for name in _NAMES:
        for form in ("dense", "bitmap"):
            # For every GPU of the type; what the kernels do not take goes on to the reference inside `run`.
            OPS[f"{name}_{form}"].register_kernel(device)(partial(run, f"{name}_{form}"))


def prepare(packed: PackedArgs) -> None:
    """Compute now what products would compute at the first call: a bitmap's ranks."""
    # Computed within the first call, ranks would be captured into a CUDA graph, or be a pause in the first answer.
    kernels = gpu_kernels() if packed.form == "bitmap" and packed.codes.is_cuda else None
    if kernels is not None and kernels.takes(packed, torch.float32):
        kernels.ranks(packed)


def run(name: str, *args: Any) -> Tensor:
    """Compute the op ``name`` with its arguments: by the kernels, or as its reference does."""
    operands, packed = split_arguments(name, args)
    kernels = gpu_kernels()
    dtype = result_dtype(operands)
    if kernels is None or not kernels.takes(packed, dtype):
        return REFERENCES[name](*args)
    if name.startswith("weight"):
        return kernels.dense(packed, dtype)
    return getattr(kernels, name.partition("_")[0])(packed, *operands)


register("cuda")
