"""What benchmarks of speed share: weights of random codes, layers of peers, medians, threads."""

import statistics
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import nn

from sqs_pyro.packing import CodedTensor

_LEAST_COLD, _MOST_COLD = 192 << 20, 512 << 20  # bytes
NF4 = "NF4 (bitsandbytes)"
#: What other libraries raise where they are not installed, or do not take a weight.
PEER_ERRORS = (ImportError, RuntimeError, AssertionError, AttributeError, TypeError, ValueError)


def cold_bytes() -> int:
    """Return how many bytes make caches cold: more than the last one holds, as far as the system says its size."""
    sizes = [path.read_text().strip() for path in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size")]
    largest = max((int(size[:-1]) << 10 for size in sizes if size.endswith("K")), default=0)
    return min(max(_LEAST_COLD, largest + largest // 4), _MOST_COLD)


def spread(seconds: Sequence[float]) -> dict[str, float]:
    """Return the median and quartiles of times, in microseconds."""
    times = seconds if len(seconds) > 1 else [*seconds, *seconds]  # quantiles ask for two
    low, middle, high = statistics.quantiles(times, n=4, method="inclusive")
    return {"microseconds": middle * 1e6, "lower_quartile": low * 1e6, "upper_quartile": high * 1e6}


@contextmanager
def torch_threads(count: int) -> Iterator[None]:
    """Let torch use this many threads inside."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def random_coded(shape: Sequence[int], bits: int, nonzero_rate: float, scale: float = 1.0) -> CodedTensor:
    """Draw codes of a codebook of ``2**bits - 1`` quantiles of N(0, scale²), none of them 0, and of zero."""
    mask, components = torch.rand(*shape) < nonzero_rate, 2**bits - 1
    codes = torch.randint(0, components, tuple(shape), dtype=torch.uint8) * mask
    # Offset by 0.4, not by ½: with the middle one of an odd number at ½, a codeword would be 0.
    codebook = scale * torch.special.ndtri((torch.arange(components) + 0.4) / components)
    return CodedTensor(codes, mask, codebook[None])


def nf4_linear(linear: nn.Linear) -> nn.Module:
    """Return a linear layer of bitsandbytes with this one's weight in NF4, on its device, for bfloat16 inputs.

    Raises:
        ImportError, RuntimeError, AssertionError, ValueError: there is no bitsandbytes, or it does not take this.
    """
    import bitsandbytes

    layer = bitsandbytes.nn.Linear4bit(
        linear.in_features,
        linear.out_features,
        bias=linear.bias is not None,
        compute_dtype=torch.bfloat16,
        quant_type="nf4",
        compress_statistics=False,
    )
    layer.weight = bitsandbytes.nn.Params4bit(
        linear.weight.detach().clone(),
        requires_grad=False,
        quant_type="nf4",
        compress_statistics=False,
        module=layer,
    )
    layer.bias = linear.bias
    layer = layer.to(linear.weight.device).eval()
    zeros = torch.zeros(1, linear.in_features, dtype=torch.bfloat16, device=linear.weight.device)
    with torch.inference_mode():
        layer(zeros)  # rearranges its weight at the first call
    return layer
