"""Selective prediction: how wrong a predictor is on those examples of which it is surest."""

from dataclasses import dataclass

import torch
from torch import Tensor

from sqs_pyro.errors import DataError


@dataclass(frozen=True)
class RiskCoverage:
    """Mean loss of the examples that a predictor is surest of, over their share.

    Attributes:
        coverage: ``k / n`` for k from 1 to n, ``[n]``.
        risk: mean loss of the k surest examples, ``[n]``; the last is that of all.
    """

    coverage: Tensor
    risk: Tensor

    @property
    def area(self) -> float:
        """The area under the curve, the mean risk over all k: the smaller, the better the order and the loss."""
        return float(self.risk.mean())


def risk_coverage(uncertainty: Tensor, loss: Tensor) -> RiskCoverage:
    """Return risk over coverage (Geifman and El-Yaniv 2017; the area is AURC of Geifman et al. 2019).

    Examples of equal uncertainty come in no order: each counts with the mean loss of them all.

    Args:
        uncertainty: whom to leave out first has the largest, ``[n]``: an entropy, 1 minus the top probability.
        loss: 0 for right and 1 for wrong, or any other, ``[n]``.

    Raises:
        DataError: there is no example, or not one loss for each.
    """
    if uncertainty.shape != loss.shape or uncertainty.dim() != 1 or not len(loss):
        raise DataError(
            f"Uncertainties {list(uncertainty.shape)} and losses {list(loss.shape)} must be one number of each "
            "for every example, [n], and at least one."
        )
    values, group = uncertainty.double().unique(sorted=True, return_inverse=True)
    counts = torch.bincount(group, minlength=len(values))
    mean = torch.bincount(group, weights=loss.double(), minlength=len(values)) / counts
    number = torch.arange(1, len(loss) + 1, dtype=torch.float64, device=loss.device)
    return RiskCoverage(number / len(loss), mean.repeat_interleave(counts).cumsum(0) / number)
