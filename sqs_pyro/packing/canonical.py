"""The smallest equivalent of a coded tensor: what no weight uses is not stored."""

import torch
from torch import Tensor

from sqs_pyro.packing.coded import CodedTensor, count_codes, look_up


def canonical(coded: CodedTensor) -> CodedTensor:
    """Sort every codebook row, merge equal values and drop values that no weight uses; on the CPU.

    One row is sorted by value. Of several, each is sorted by how many weights use a value, most first: sorted
    counts majorize the same counts in any other order, so that the one frequency table that the groups share has
    the least entropy (0.2 to 1 % below that of rows sorted by value).

    A weight whose codebook value is 0.0 becomes a zero like the others: its mask is cleared.
    ``canonical(coded).dense()`` equals ``coded.dense()`` bit for bit. K becomes the largest number of
    different values used in one group (at least 1); shorter rows are filled with zeros.
    """
    groups = coded.num_groups
    codes = coded.codes.cpu().reshape(groups, -1)
    mask = coded.mask.cpu().reshape(groups, -1)
    codebook = coded.codebook.cpu()
    is_zero = codebook.view(torch.int32) == 0  # not -0.0: its sign would be lost
    if is_zero.any():
        mask = mask & ~look_up(is_zero, codes)
        codes = codes * mask
    counts = count_codes(codes, mask, coded.num_components)  # [G, K]
    # Unused values go to the end of their row, where they are not finite and get no number.
    values, order = codebook.masked_fill(counts == 0, torch.inf).sort(dim=1, stable=True)
    new_index, fresh = _number_distinct(values)
    rename = torch.empty_like(new_index).scatter_(1, order, new_index)  # [G, K]: old code -> new code
    components = max(1, int(fresh.sum(dim=1).max()))
    rows = values.new_zeros(groups, components)
    keep = fresh.nonzero()  # [distinct values, 2]: row and place in the sorted row
    rows[keep[:, 0], new_index[keep[:, 0], keep[:, 1]]] = values[fresh]
    if groups > 1:
        merged = counts.new_zeros(groups, components).scatter_add_(1, rename, counts)
        by_count = merged.argsort(dim=1, descending=True, stable=True)  # [G, K']: new order -> value order
        rows, rename = rows.gather(1, by_count), by_count.argsort(dim=1).gather(1, rename)
    renamed = look_up(rename.to(torch.uint8), codes).mul_(mask)  # a zero's code back to 0
    scales = None if coded.scales is None else coded.scales.cpu()
    # Right by construction; a check would read all codes of a large layer once more.
    return CodedTensor.unchecked(renamed.view(coded.shape), mask.reshape(coded.shape), rows, scales)


def _number_distinct(values: Tensor) -> tuple[Tensor, Tensor]:
    """Number the distinct finite values of each sorted row; the second result marks first occurrences.

    Bit patterns are compared, because -0.0 and 0.0 must stay apart.
    """
    bits = values.view(torch.int32)  # [G, K]
    fresh = torch.ones_like(values, dtype=torch.bool)
    fresh[:, 1:] = bits[:, 1:] != bits[:, :-1]
    fresh &= values.isfinite()
    # A value equal to the one before has its number; clamp is for rows without any.
    return (fresh.cumsum(dim=1) - 1).clamp(min=0), fresh
