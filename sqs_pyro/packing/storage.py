"""``Storage``: how a network is stored, as recipes and callers say it."""

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Storage:
    """How a network is stored.

    Attributes:
        layout: of compressed tensors; ``"auto"`` is the smallest for each.
        leftover_dtype: of parameters that are not compressed, each where its values survive it.
        codebook_dtype: of codebook values, each codebook where its values survive it.
    """

    layout: str = "auto"
    leftover_dtype: str = "float16"
    codebook_dtype: str = "float16"

    @property
    def codebook(self) -> torch.dtype:
        """The codebooks' type."""
        return getattr(torch, self.codebook_dtype)
