"""Why a training step failed: what can be said of the user's data, and nothing that is only guessed."""

from typing import Any

import torch
from torch import Tensor
from torch.distributions import constraints

from sqs_pyro.errors import DataError
from sqs_pyro.network_io import call_arguments, tensors_in


def check_inputs(x: Any, what: str) -> None:
    """Check that inputs are finite.

    Raises:
        DataError: it begins with ``what`` and says how many values are not.
    """
    for tensor in tensors_in(x):
        bad = int((~torch.isfinite(tensor)).sum()) if tensor.is_floating_point() else 0
        if bad:
            raise DataError(
                f"{what} holds {bad} values of {tensor.numel()} that are NaN or infinite: clean the data."
            )


def check_labels(labels: Tensor, num_classes: int, what: str = "Labels") -> None:
    """Check that labels are from 0 to ``num_classes - 1``.

    Raises:
        DataError: it begins with ``what`` and names the range that was found.
    """
    lowest, highest = int(labels.min()), int(labels.max())
    if lowest < 0 or highest >= num_classes:
        raise DataError(
            f"{what} run from {lowest} to {highest}, but the network has {num_classes} classes (labels 0 to "
            f"{num_classes - 1}): use the network and the data that belong together."
        )


@torch.no_grad()
def num_classes(model: Any, x: Any) -> int | None:
    """How many classes a ``BayesianNetwork`` tells apart, by one forward pass of its network.

    None if what it observes is no class, or if the pass fails, which is then not for labels to explain.
    """
    args, kwargs = call_arguments(x)
    try:
        support = model.likelihood(model.net.eval()(*args, **kwargs)).support
    except Exception:  # the user's network or likelihood may raise anything; its first error is reported
        return None
    while isinstance(support, constraints.independent):
        support = support.base_constraint
    is_class = isinstance(support, constraints.integer_interval) and isinstance(support.upper_bound, int)
    return support.upper_bound + 1 if is_class else None
