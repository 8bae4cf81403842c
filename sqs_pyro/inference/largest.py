"""The largest of many numbers, exactly so many of them: also where ranks have some of the numbers each.

Ranks look for the threshold together, by bisection of the bits of a float32: at each of 32 steps every rank counts
what it has above a number, and only counts are sent.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from sqs_pyro.distributions.sharded_tensor import as_rows
from sqs_pyro.models.sharding import gathered_over_ranks

_INFINITY, _SIGN = 0x7F800000, 0x7FFFFFFF  # bits of a float32: of infinity, and all but the sign's


def keep_largest(tensors: Sequence[Tensor], rate: float) -> list[Tensor]:
    """Return masks of the ``round(rate · n)`` largest of all n values of some tensors; of equal ones the first.

    Args:
        tensors: of any shapes, or ``DTensor``s of which ranks have rows, which are compared as float32.
        rate: 0 to 1.
    """
    if any(hasattr(values, "placements") for values in tensors):
        return _keep_largest_rows(tensors, rate)
    # One threshold: all side by side, cut apart again below.
    keep = _keep_largest(torch.cat([values.flatten() for values in tensors]), rate)
    parts = keep.split([values.numel() for values in tensors])
    return [part.view_as(values) for part, values in zip(parts, tensors, strict=True)]


def _keep_largest(values: Tensor, rate: float) -> Tensor:
    count = round(rate * len(values))
    if count == 0:
        return torch.zeros_like(values, dtype=torch.bool)
    # The count-th largest of n is the (n - count + 1)-th smallest.
    threshold = values.kthvalue(len(values) - count + 1).values
    keep = values > threshold
    # Several weights may equal the threshold, thousands in a network of equal gates: the first of them, to be
    # exact.
    ties = (values == threshold).nonzero()[: count - int(keep.sum()), 0]
    keep[ties] = True
    return keep


def _keep_largest_rows(tensors: Sequence[Any], rate: float) -> list[Any]:
    mesh, own = tensors[0].device_mesh, [values.to_local().float() for values in tensors]
    count = round(rate * sum(values.numel() for values in tensors))

    def gathered(found: list[Tensor]) -> Tensor:
        """Return how many each rank has found in each tensor, ``[ranks, tensors]``."""
        return gathered_over_ranks(torch.stack([torch.count_nonzero(each) for each in found]), mesh)

    # The largest threshold that `count` values reach, among float32s in their order.
    low, high = ~_INFINITY, _INFINITY
    while low < high:
        middle = (low + high + 1) // 2
        if int(gathered([values >= _float_at(middle) for values in own]).sum()) >= count:
            low = middle
        else:
            high = middle - 1
    threshold = _float_at(low)
    keep, equal = [values > threshold for values in own], [values == threshold for values in own]
    left = count - int(gathered(keep).sum())
    ties = gathered(equal).T  # [tensors, ranks]: in this order they come first
    before = (ties.flatten().cumsum(0).view_as(ties) - ties)[:, mesh.get_local_rank()].tolist()
    for mask, tied, earlier in zip(keep, equal, before, strict=True):
        mask[tuple(tied.nonzero()[: max(left - earlier, 0)].T)] = True
    return [as_rows(mask, values) for mask, values in zip(keep, tensors, strict=True)]


def _float_at(place: int) -> float:
    """Return the float32 at a place in their order, of which 0 is at 0."""
    bits = place if place >= 0 else place ^ _SIGN  # of negative ones more bits are less
    return float(torch.tensor(bits, dtype=torch.int32).view(torch.float32))
