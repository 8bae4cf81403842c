"""What benchmarks of speed share: weights of random codes, layers of peers, medians, threads."""

import statistics
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import nn

from sqs_pyro.packing import CodedTensor

COLD_BYTES = 192 << 20  # what makes caches cold: several times a last-level cache
NF4 = "NF4 (bitsandbytes)"
#: What other libraries raise where they are not installed, or do not take a weight.
PEER_ERRORS = (ImportError, RuntimeError, AssertionError, ValueError)


def spread(seconds: Sequence[float]) -> dict[str, float]:
    """Median and quartiles of times, in microseconds."""
    low, middle, high = statistics.quantiles(seconds, n=4) if len(seconds) > 1 else [seconds[0]] * 3
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


def first_line(error: BaseException) -> str:
    """What an error says, without its details."""
    return str(error).strip().partition("\n")[0] or type(error).__name__


def random_coded(shape: Sequence[int], bits: int, nonzero_rate: float, scale: float = 1.0) -> CodedTensor:
    """Random codes of a random codebook: ``2**bits - 1`` values of this standard deviation, and zero."""
    mask = torch.rand(*shape) < nonzero_rate
    codes = torch.randint(0, 2**bits - 1, tuple(shape), dtype=torch.uint8) * mask
    return CodedTensor(codes, mask, scale * torch.randn(1, 2**bits - 1))


def nf4_linear(linear: nn.Linear) -> nn.Module:
    """A linear layer of bitsandbytes with this one's weight in NF4, for bfloat16 inputs.

    Raises:
        ImportError, RuntimeError, AssertionError, ValueError: bitsandbytes is missing, or does not take the weight.
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
    layer = layer.to("cpu").eval()
    with torch.inference_mode():
        layer(torch.zeros(1, linear.in_features, dtype=torch.bfloat16))  # rearranges its weight at the first call
    return layer
