"""Attention of a few queries to a cache that is longer than what it holds so far.

torch's own reads all of a cache that a mask is given with, and copies keys and values that several heads share to
each of them. What is compiled here (cpu/attention.cpp) reads what the mask lets be seen, where it is.
"""

from torch import Tensor
from torch.library import custom_op
from torch.nn.functional import scaled_dot_product_attention


@custom_op("sqs::cached_attention", mutates_args=())
def cached_attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float) -> Tensor:
    """Return ``softmax(scale q kᵀ) v``, ``[B, T, H, E]``, over the places that the mask lets be seen.

    Args:
        q: ``[B, H, T, D]``.
        k: ``[B, G, S, D]``; each of the G serves ``H / G`` heads beside each other.
        v: ``[B, G, S, E]``.
        mask: which of the S places each query sees, bool ``[B or 1, 1, T, S]``; all of them if left out.
        scale: of the products.
    """
    found = scaled_dot_product_attention(q, k, v, mask, scale=scale, enable_gqa=q.shape[1] != k.shape[1])
    return found.transpose(1, 2).contiguous()


@cached_attention.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float) -> Tensor:
    return q.new_empty(q.shape[0], q.shape[2], q.shape[1], v.shape[3])
