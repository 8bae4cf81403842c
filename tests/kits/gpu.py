"""Tests of GPU kernels run on a CUDA device, or on the CPU by Triton's interpreter; elsewhere they are skipped."""

import importlib.util
import os

import pytest
import torch

from sqs_pyro.kernels.decode import PackedArgs, write_scales, write_table
from sqs_pyro.packing.bits import pack_bits

HAS_TRITON = importlib.util.find_spec("triton") is not None
HAS_GPU = torch.cuda.is_available()
INTERPRETED = HAS_TRITON and not HAS_GPU and os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cuda" if HAS_GPU else "cpu"

needs_kernels = pytest.mark.skipif(
    not HAS_TRITON or not (HAS_GPU or INTERPRETED), reason="no GPU, and Triton's interpreter is not asked for"
)
needs_gpu = pytest.mark.skipif(not (HAS_GPU and HAS_TRITON), reason="no CUDA device with Triton")


def rounded(values: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """float32 values in another dtype; the interpreter cuts bfloat16 off instead of rounding to it."""
    if INTERPRETED and dtype == torch.bfloat16:
        values = (values.contiguous().view(torch.int32) & -65536).view(torch.float32)
    return values.to(dtype)


def tolerance(dtype: torch.dtype) -> float:
    """Of the sum of absolute products: some roundings of weights and result, and of sums in float32."""
    cut = 2 if INTERPRETED and dtype == torch.bfloat16 else 1
    return {torch.float32: 2e-6, torch.bfloat16: cut * 2.0**-8, torch.float16: 2.0**-10}[dtype]


def random_packed(
    shape: tuple[int, int],
    bits: int,
    form: str = "dense",
    groups: int = 1,
    scales: bool | int = False,
    zeros: float = 0.5,
    size: int | None = None,
    seed: int = 0,
    device: str = DEVICE,
) -> tuple[PackedArgs, torch.Tensor]:
    """A packed weight on the device, and the weight, float32 on the CPU, made without the library's readers.

    ``scales`` are of outputs, or of so many parts of each.
    """
    random = torch.Generator().manual_seed(seed)
    numel, size = shape[0] * shape[1], size or 2**bits
    symbols = torch.randint(0, size, shape, dtype=torch.uint8, generator=random)
    table = torch.randn(groups, size, generator=random)
    keep = torch.rand(shape, generator=random) >= zeros
    parts = int(scales)  # 1 of True
    factors = (0.5 + torch.rand(shape[0], max(parts, 1), generator=random)).half().float()
    if form == "dense":
        symbols[~keep] = 0
        table[:, 0] = 0
    group = torch.arange(numel) // (numel // groups)
    weight = table[group, symbols.reshape(-1).long()].view(shape)
    weight = weight * factors.repeat_interleave(shape[1] // parts, 1) if scales else weight
    codes, mask = symbols.reshape(-1), None
    if form == "bitmap":
        weight = torch.where(keep, weight, 0.0)
        codes, mask = symbols[keep], pack_bits(keep.to(torch.uint8), 1).to(device)
    stored = write_scales(factors if parts > 1 else factors[:, 0]) if scales else None
    packed = PackedArgs(
        pack_bits(codes, bits).to(device),
        write_table(table).to(device),
        mask,
        shape,
        bits,
        None if stored is None else stored.to(device),
        form,
    )
    return packed, weight
