"""Likelihoods of real numbers: a Gaussian whose noise is known, learned, or said by the network."""

from collections.abc import Sequence
from typing import Any

import pyro.distributions as dist
import torch
from pyro.nn import PyroParam
from torch import Tensor
from torch.distributions import constraints

from sqs_pyro.distributions.local_draw import output_moments
from sqs_pyro.errors import NetworkError
from sqs_pyro.models.likelihoods.arguments import of_outputs, positive_numbers
from sqs_pyro.models.likelihoods.learned import LearnedLikelihood
from sqs_pyro.networks.calling import output_tensor

_SCALE = "The Gaussian likelihood's scale"


class Gaussian:
    """Regression: output ``[B, ...]`` is the mean, ``scale`` the standard deviation of the noise, which is known.

    Args:
        scale: of all outputs, or ``[D]``: of each output in the last dimension.

    Raises:
        NetworkError: it is not positive.
    """

    def __init__(self, scale: float | Sequence[float] | Tensor = 1.0) -> None:
        numbers = positive_numbers(_SCALE, scale)
        self.scale: float | Tensor = numbers if numbers.dim() else float(numbers)

    def __call__(self, output: Any) -> dist.TorchDistribution:
        """Return the observation's distribution, batch shape ``[B]``."""
        return _normal(output_tensor(output), torch.as_tensor(self.scale))


class LearnedGaussian(LearnedLikelihood):
    """Regression with a noise that is not known: its standard deviation is a parameter of the model.

    It is a point estimate, ``model.likelihood.scale``, the maximum of the ELBO.

    Args:
        scale: at the start, one number for all outputs, or ``[D]``: each output in the last dimension then learns
            its own.

    Raises:
        NetworkError: it is not positive.
    """

    def __init__(self, scale: float | Sequence[float] | Tensor = 1.0) -> None:
        super().__init__()
        self.scale = PyroParam(positive_numbers(_SCALE, scale), constraints.positive)

    def __call__(self, output: Any) -> dist.TorchDistribution:
        """Return the observation's distribution, batch shape ``[B]``."""
        return _normal(output_tensor(output), self.scale)


class HeteroscedasticGaussian:
    """Regression with a noise that the network says: output ``[B, ..., 2 D]`` is D means, then D log-scales."""

    def __call__(self, output: Any) -> dist.TorchDistribution:
        """Return the distribution of ``[..., D]`` numbers, batch shape ``[B]``.

        Raises:
            NetworkError: the last dimension of the output is odd.
        """
        both = output_tensor(output)
        if both.dim() < 2 or both.shape[-1] % 2:
            raise NetworkError(
                f"The network's output has the shape {list(both.shape)}, but the likelihood 'heteroscedastic' "
                "needs D means and then D log-scales in its last dimension: give the network two outputs for each "
                "number that it predicts."
            )
        mean, log_scale = both.chunk(2, -1)
        return dist.Normal(mean, log_scale.exp()).to_event(mean.dim() - 1)


class ExpectedNormal(dist.Normal):
    """``N(f, σ²)`` of a mean f that was drawn from known moments; ``log_prob`` is the expectation over f.

    ``E log N(y; f, σ²) = log N(y; E f, σ²) - Var f / 2σ²``: of a network that ends with a random linear
    layer, the ELBO needs no draw of that layer. Samples are of the f that was drawn.

    Args:
        drawn: f, ``[*shape]``.
        scale: σ.
        mean, variance: of f, ``[*shape]``.
    """

    def __init__(self, drawn: Tensor, scale: Tensor, mean: Tensor, variance: Tensor) -> None:
        super().__init__(drawn, scale, validate_args=False)
        self.mean_of_loc, self.variance_of_loc = mean, variance

    def expand(self, batch_shape: Any, _instance: Any = None) -> "ExpectedNormal":
        """Return the same with a larger batch shape."""
        shape = torch.Size(batch_shape)
        parts = (self.loc, self.scale, self.mean_of_loc, self.variance_of_loc)
        return ExpectedNormal(*(part.expand(shape) for part in parts))

    def log_prob(self, value: Tensor) -> Tensor:
        """Return ``E log N(value; f, σ²)``."""
        around = dist.Normal(self.mean_of_loc, self.scale, validate_args=False)
        return around.log_prob(value) - self.variance_of_loc / (2 * self.scale.square())


def _normal(output: Tensor, scale: Tensor) -> dist.TorchDistribution:
    scale, moments = of_outputs(_SCALE, scale, output), output_moments(output)
    normal = dist.Normal(output, scale) if moments is None else ExpectedNormal(output, scale, *moments)
    return normal.to_event(output.dim() - 1)
