"""Splits that hold out the same share of every class."""

import torch
from torch import Tensor

from sqs_pyro.errors import DataError


def stratified_split(labels: Tensor, held_out: int, seed: int) -> tuple[Tensor, Tensor]:
    """Hold out exactly `held_out` examples, in proportion from each class (within one example).

    Args:
        labels: [N], integers.
        held_out: examples to hold out, from 1 to N - 1.
        seed: chooses which.

    Returns:
        Indices of the kept [N - held_out] and of the held out [held_out] examples, each ascending.

    Raises:
        DataError: where `held_out` leaves nothing to train on.
    """
    size = len(labels)
    if not 0 < held_out < size:
        raise DataError(
            f"{held_out} of {size} training examples cannot be held out for validation: give a number from "
            f"1 to {size - 1}."
        )
    shuffled = torch.randperm(size, generator=torch.Generator().manual_seed(seed))
    order = shuffled[torch.sort(labels[shuffled], stable=True).indices]  # by class, random within a class
    _, counts = torch.unique_consecutive(labels[order], return_counts=True)
    rank = torch.cat([(torch.arange(n, dtype=torch.float64) + 0.5) / n for n in counts.tolist()])
    chosen = order[torch.sort(rank, stable=True).indices]  # every class evenly spread over the whole
    return chosen[held_out:].sort().values, chosen[:held_out].sort().values
