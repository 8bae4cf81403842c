"""How what a likelihood describes meets what was observed.

A likelihood is any callable from a network's output to a distribution with batch shape ``[B]``. What it describes
is never broadcast against what was observed: :func:`observe` compares the shapes, and says in a sentence where
they do not fit.
"""

from collections.abc import Callable
from typing import Any, Protocol, TypeAlias, runtime_checkable

import pyro.distributions as dist
import torch
from pyro.distributions.torch_distribution import TorchDistributionMixin
from torch import Tensor
from torch.distributions import constraints

from sqs_pyro.documents import shown
from sqs_pyro.errors import DataError, NetworkError

#: Maps a network's output to a distribution with batch shape ``[B]`` over one example's observation.
Likelihood: TypeAlias = Callable[[Any], dist.TorchDistribution]


@runtime_checkable
class ReadsLabels(Protocol):
    """A likelihood that knows several forms of labels."""

    def settle(self, output: Any, y: Tensor) -> Likelihood:
        """Return the same likelihood with everything decided that the first minibatch decides for all."""

    def observe(self, output: Any, y: Tensor) -> tuple[dist.TorchDistribution, Tensor]:
        """Return the distribution of labels of this form, batch shape ``[B]``, and the labels as a value of it."""


def observe(likelihood: Likelihood, output: Any, y: Tensor) -> tuple[dist.TorchDistribution, Tensor]:
    """Return the distribution of what was observed, batch shape ``[B]``, and the observation as a value of it.

    Args:
        likelihood: from a network's output to a distribution.
        output: the network's output for a minibatch of B examples.
        y: what was observed, first dimension B.

    Raises:
        DataError: the observation does not have the distribution's shape ``batch + event``; nothing is broadcast.
        NetworkError: the likelihood gives no distribution of B examples.
    """
    if isinstance(likelihood, ReadsLabels):
        # It compares shapes itself, because it knows more than one that fits.
        return likelihood.observe(output, y)
    return _fitted(examples_of(likelihood(output)), y)


def settle(likelihood: Likelihood, output: Any, y: Tensor) -> Likelihood:
    """Return a likelihood with its open questions (where the classes are) decided by a first minibatch."""
    return likelihood.settle(output, y) if isinstance(likelihood, ReadsLabels) else likelihood


def examples_of(distribution: Any) -> dist.TorchDistribution:
    """Return the distribution with batch shape ``[B]``: what else is in its batch is part of an example.

    Raises:
        NetworkError: it is no distribution of Pyro's, or has no batch.
    """
    if not isinstance(distribution, TorchDistributionMixin):
        raise NetworkError(
            f"The likelihood gave {shown(distribution)}, but must give a distribution of pyro.distributions."
        )
    if not distribution.batch_shape:
        raise NetworkError(
            f"The likelihood gave a {type(distribution).__name__} with an empty batch shape, but its first "
            "dimension must be the examples of the minibatch: use fewer event dimensions."
        )
    # Else the plate of examples would take pixels or tokens for more plates.
    return distribution.to_event(len(distribution.batch_shape) - 1)


def _fitted(distribution: dist.TorchDistribution, y: Tensor) -> tuple[dist.TorchDistribution, Tensor]:
    """Return an observation in the distribution's shape and, if it is integers of what is none, in its dtype."""
    shape = distribution.batch_shape + distribution.event_shape
    if y.shape != shape:
        # [B] beside [B, 1] would broadcast to [B, B]: a loss that falls, of B² pairs that nobody observed.
        if squeezed(y.shape) != squeezed(shape):
            raise DataError(
                f"Labels are {shown(y)}, but for the network's output the likelihood describes "
                f"{distribution.batch_shape[0]} examples with observations of the shape "
                f"{list(distribution.event_shape)}, {list(shape)} in all: give labels or a likelihood that fit "
                "each other (nothing is broadcast)."
            )
        y = y.reshape(shape)  # they differ by dimensions of size 1 only
    support = base_support(distribution)
    # A Bernoulli or Normal computes in its own dtype; classes stay integers.
    if support is constraints.boolean or not (y.is_floating_point() or support.is_discrete):
        y = y.to(_float_dtype(distribution))
    return distribution, y


def base_support(distribution: Any) -> Any:
    """Return the support of a single number of an observation."""
    support = distribution.support
    while isinstance(support, constraints.independent):
        support = support.base_constraint
    return support


def innermost(distribution: Any) -> Any:
    """Return what ``to_event``, ``mask`` and the like are wrapped around."""
    while hasattr(distribution, "base_dist"):
        distribution = distribution.base_dist
    return distribution


def _float_dtype(distribution: Any) -> torch.dtype:
    base = innermost(distribution)
    parameters = (vars(base).get(name) for name in base.arg_constraints)
    found = (p.dtype for p in parameters if isinstance(p, Tensor) and p.is_floating_point())
    return next(found, torch.get_default_dtype())


def squeezed(shape: torch.Size) -> tuple[int, ...]:
    """Return a shape without its ones, but for the examples in front."""
    return (*shape[:1], *(size for size in shape[1:] if size != 1))
