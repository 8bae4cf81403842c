"""From a network's output to the distribution of what was observed."""

from collections.abc import Callable
from typing import Any, TypeAlias

import pyro.distributions as dist
import torch

from sqs_pyro.errors import NetworkError
from sqs_pyro.network_io import output_tensor

#: Maps a network's output to a distribution with batch shape ``[B]`` over one example's observation.
Likelihood: TypeAlias = Callable[[Any], dist.TorchDistribution]


def categorical(output: Any) -> dist.TorchDistribution:
    """Class logits ``[B, ..., C]`` to a categorical; the middle dimensions (tokens) are one event."""
    logits = output_tensor(output)
    return dist.Categorical(logits=logits).to_event(logits.dim() - 2)


class Gaussian:
    """Regression: output ``[B, ...]`` is the mean, ``scale`` the standard deviation of the noise."""

    def __init__(self, scale: float = 1.0) -> None:
        if not scale > 0:
            raise NetworkError(f"The Gaussian likelihood's scale is {scale!r}, but must be positive.")
        self.scale = scale

    def __call__(self, output: Any) -> dist.TorchDistribution:
        """The observation's distribution, batch shape ``[B]``."""
        mean = output_tensor(output)
        return dist.Normal(mean, torch.full_like(mean, self.scale)).to_event(mean.dim() - 1)


def resolve(likelihood: str | Likelihood) -> Likelihood:
    """``"categorical"``, ``"gaussian"`` or a callable, as a callable.

    Raises:
        NetworkError: any other value.
    """
    if callable(likelihood):
        return likelihood
    known: dict[str, Likelihood] = {"categorical": categorical, "gaussian": Gaussian()}
    if likelihood not in known:
        raise NetworkError(
            f"likelihood={likelihood!r} is unknown: use 'categorical', 'gaussian', or a callable from the "
            "network's output to a distribution."
        )
    return known[likelihood]
