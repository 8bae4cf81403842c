"""Training in bfloat16: half the traffic where processors multiply such numbers, ten times the work where not."""

import warnings

import torch

from sqs_pyro.kernels.processor import multiplies_bfloat16


class SlowPrecisionWarning(UserWarning):
    """The precision that was asked for takes many times as long as float32 on this machine."""


def training_dtype(precision: str) -> torch.dtype | None:
    """Return the dtype of autocast in training, None for none."""
    return torch.bfloat16 if precision == "bfloat16" else None


def training_autocast(precision: str, device: torch.device) -> torch.autocast:
    """Return the context in which losses are computed in training."""
    dtype = training_dtype(precision)
    return torch.autocast(device.type, dtype, enabled=dtype is not None)


def warn_of_slow_precision(precision: str, device: torch.device) -> None:
    """Warn, before hours of work, of a precision that is slow on this device."""
    if precision == "bfloat16" and not multiplies_bfloat16(device):
        warnings.warn(
            "Training in bfloat16 takes about ten times as long as in float32 on this processor, which has no "
            "AVX-512 instructions: set `precision` to float32.",
            SlowPrecisionWarning,
            stacklevel=3,
        )
