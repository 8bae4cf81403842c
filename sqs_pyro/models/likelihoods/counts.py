"""Likelihoods of counts 0, 1, 2, ...: the network's output is the logarithm of what is expected."""

from collections.abc import Sequence
from typing import Any

import pyro.distributions as dist
from pyro.nn import PyroParam
from torch import Tensor
from torch.distributions import constraints

from sqs_pyro.models.likelihoods.arguments import of_outputs, positive_numbers
from sqs_pyro.models.likelihoods.learned import LearnedLikelihood
from sqs_pyro.networks.calling import output_tensor

_DISPERSION = "The negative binomial likelihood's dispersion"


class Poisson:
    """Counts whose variance is their mean: output ``[B, ...]`` is the logarithm of the rate."""

    def __call__(self, output: Any) -> dist.TorchDistribution:
        """Return the observation's distribution, batch shape ``[B]``."""
        log_rate = output_tensor(output)
        return dist.Poisson(log_rate.exp()).to_event(log_rate.dim() - 1)


class NegativeBinomial(LearnedLikelihood):
    """Counts that spread more: output ``[B, ...]`` is log μ, their variance ``μ + α μ²`` with a learned α.

    The dispersion α is a point estimate, ``model.likelihood.dispersion``; at 0 the counts would be Poisson's.

    Args:
        dispersion: α at the start, one number for all outputs, or ``[D]``: each output in the last dimension then
            learns its own.

    Raises:
        NetworkError: it is not positive.
    """

    def __init__(self, dispersion: float | Sequence[float] | Tensor = 1.0) -> None:
        super().__init__()
        self.dispersion = PyroParam(positive_numbers(_DISPERSION, dispersion), constraints.positive)

    def __call__(self, output: Any) -> dist.TorchDistribution:
        """Return the observation's distribution, batch shape ``[B]``."""
        log_mean = output_tensor(output)
        dispersion = of_outputs(_DISPERSION, self.dispersion, log_mean)
        # Of r = 1/α failures with odds α μ: the mean is r α μ = μ.
        counts = dist.NegativeBinomial(dispersion.reciprocal(), logits=log_mean + dispersion.log())
        return counts.to_event(log_mean.dim() - 1)
