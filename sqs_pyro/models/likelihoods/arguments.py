"""Numbers that likelihoods are given, and whether they fit a network's output."""

from typing import Any

import torch
from torch import Tensor

from sqs_pyro.documents import shown
from sqs_pyro.errors import NetworkError


def finite_numbers(name: str, given: Any) -> Tensor | None:
    """Return what was given as finite float32 numbers; None if it is None."""
    if given is None:
        return None
    try:
        numbers = torch.as_tensor(given, dtype=torch.float32)
    except (TypeError, ValueError, RuntimeError):
        # What is no number at all is told in the same sentence as what is not finite.
        numbers = torch.tensor(torch.nan)
    if not bool(numbers.isfinite().all()):
        raise NetworkError(f"{name} is {shown(given)}, but must be finite numbers.")
    return numbers


def positive_numbers(name: str, given: Any) -> Tensor:
    """Return one positive number, ``[]``, or one for each of D outputs, ``[D]``.

    Raises:
        NetworkError: they are anything else.
    """
    numbers = finite_numbers(name, given)
    if numbers is None or numbers.dim() > 1 or not numbers.numel() or not bool((numbers > 0).all()):
        raise NetworkError(f"{name} is {shown(given)}, but must be one positive number, or one for each output.")
    return numbers.squeeze()


def of_outputs(name: str, numbers: Tensor, output: Tensor) -> Tensor:
    """Return numbers ``[]`` or ``[D]`` in the shape of an output ``[B, ..., D]``.

    Raises:
        NetworkError: the output has another number of them in its last dimension.
    """
    # Of [B] the last dimension is the examples.
    if numbers.dim() and (output.dim() < 2 or output.shape[-1] != len(numbers)):
        raise NetworkError(
            f"{name} is {len(numbers)} numbers, but the network's output has the shape {list(output.shape)}: give "
            "one number, or one for each output in its last dimension."
        )
    return numbers.to(output).expand_as(output)
