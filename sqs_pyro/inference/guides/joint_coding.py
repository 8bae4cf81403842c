"""Draws of a dense posterior as discrete networks: every weight's own noise, in codes of one codebook."""

from collections.abc import Sequence

import torch
from torch import Tensor

from sqs_pyro.distributions.kmeans import kmeans_1d
from sqs_pyro.packing import CodedTensor
from sqs_pyro.packing.leftovers import round_to


@torch.no_grad()
def code_together(
    draws: Sequence[Tensor], num_components: int, num_groups: int, codebook_dtype: torch.dtype
) -> list[CodedTensor]:
    """Return draws of one tensor with each non-zero value at the nearest of a codebook that K-means fits to all.

    Args:
        draws: S tensors of one shape.
        num_components: K; fewer where a group has fewer values in all draws.
        num_groups: G.
        codebook_dtype: codewords are rounded to this type if they survive it.
    """
    grouped = [draw.reshape(num_groups, -1) for draw in draws]  # [G, n]
    values = torch.cat(grouped, 1)  # [G, S n]
    fitted = kmeans_1d(values, min(num_components, values.shape[1]), (values != 0).to(values.dtype)).loc
    codebook = round_to(fitted.float(), str(codebook_dtype).removeprefix("torch.")).cpu()
    coded = []
    for draw, value in zip(draws, grouped, strict=True):
        mask = draw != 0
        codes = (value.unsqueeze(-1) - fitted.unsqueeze(1)).abs().argmin(-1)  # [G, n, K] -> [G, n]
        # Codes of zeros are 0, so that equal networks have equal files.
        symbols = codes.view(draw.shape).masked_fill(~mask, 0).to(torch.uint8)
        coded.append(CodedTensor(symbols.cpu(), mask.cpu(), codebook))
    return coded
