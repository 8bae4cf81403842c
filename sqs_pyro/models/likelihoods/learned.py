"""Likelihoods with parameters of their own: learned with the model that they belong to, by the ELBO's gradient."""

from typing import Any

from pyro.distributions import TorchDistribution

from sqs_pyro.errors import NetworkError
from sqs_pyro.models.observation import Likelihood
from sqs_pyro.models.ownership import OwningModule


class LearnedLikelihood(OwningModule):
    """A likelihood whose parameters are point estimates of the model.

    They train and move with it, and are in its ``state_dict``; in Pyro's store they are ``likelihood.<name>``.
    """

    belongs_to_a_network = False

    # Not `forward`, which would enter parameters into Pyro's store: networks are judged by their likelihood
    # outside of any model. In a model that runs they are Pyro's all the same, by the model's context.
    def __call__(self, output: Any) -> TorchDistribution:
        """Return the observation's distribution, batch shape ``[B]``."""
        raise NotImplementedError


def taken(likelihood: Likelihood) -> Likelihood:
    """Return a likelihood as that of one network; only of one if it is learned.

    Raises:
        NetworkError: it already belongs to another.
    """
    if isinstance(likelihood, LearnedLikelihood):
        if likelihood.belongs_to_a_network:
            raise NetworkError(
                f"This {type(likelihood).__name__} already belongs to a network, with which its parameters are "
                "learned: make another one."
            )
        likelihood.belongs_to_a_network = True
    return likelihood
