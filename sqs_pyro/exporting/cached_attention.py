"""Our attention to a cache as one that networks of transformers can be told to use."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from sqs_pyro.kernels.attention import cached_attention
from sqs_pyro.kernels.native import has_native_kernel

_NAME, _IN_PLACE_OF = "sqs_cached", "sdpa"


@contextmanager
def reading_what_is_seen(network: Any) -> Iterator[None]:
    """Let a network whose attention is torch's read of its cache what its mask lets be seen, in the body.

    Nothing changes where it has another attention, or there is no compiled kernel.
    """
    ours = network.config._attn_implementation == _IN_PLACE_OF and has_native_kernel("cached_attention")
    if ours:
        network.set_attn_implementation(_NAME)
    try:
        yield
    finally:
        if ours:
            network.set_attn_implementation(_IN_PLACE_OF)


def _forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    **options: Any,
) -> tuple[Tensor, None]:
    """Attend as :func:`sdpa_attention_forward`, from which nothing but time tells it."""
    alike = query.dtype == key.dtype == value.dtype
    if not alike or not _takes(query, attention_mask) or options.get("position_bias") is not None:
        found: tuple[Tensor, None] = sdpa_attention_forward(
            module, query, key, value, attention_mask, scaling=scaling, **options
        )
        return found
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    return cached_attention(query, key, value, attention_mask, float(scale)), None


def _takes(query: Tensor, mask: Tensor | None) -> bool:
    # Of several queries without a mask torch's own says what each sees.
    masked = query.shape[2] == 1 if mask is None else mask.dtype == torch.bool and mask.shape[1] == 1
    return masked and query.dtype == torch.float32


AttentionInterface.register(_NAME, _forward)
AttentionMaskInterface.register(_NAME, sdpa_mask)
