"""The variational posterior of a prior inclusion probability that is itself random."""

from collections.abc import Iterable
from typing import Any

import pyro.distributions as dist
import torch
from pyro.distributions import constraints
from pyro.nn import PyroParam
from torch import Tensor

from sqs_pyro.errors import NetworkError
from sqs_pyro.models.ownership import OwningModule


class InclusionGuide(OwningModule):
    """``q(λ₀) = Beta(a, b)`` for the prior inclusion probability of some sites.

    Attributes:
        site_name: of λ₀ in the model.
        weight_sites: the sites whose weights are included with this probability.
        concentration1, concentration0: a, b > 0, scalars.
    """

    prior_counts: Tensor

    def __init__(self, name: str, prior: Any, weight_sites: Iterable[str]) -> None:
        super().__init__()
        if not isinstance(prior, dist.Beta):
            raise NetworkError(
                f"The model's site '{name}' has a {type(prior).__name__} prior, but this guide knows "
                "posteriors of Beta sites only: give the inclusion a Beta prior."
            )
        self.site_name, self.weight_sites = name, tuple(weight_sites)
        counts = torch.stack([prior.concentration1, prior.concentration0]).detach()
        # Not saved: the model's prior has them.
        self.register_buffer("prior_counts", counts, persistent=False)
        self.concentration1 = PyroParam(counts[0].clone(), constraints.positive)
        self.concentration0 = PyroParam(counts[1].clone(), constraints.positive)

    @torch.no_grad()
    def fit(self, gates: Iterable[Tensor]) -> None:
        """Set the ELBO's optimum for gates λ, ``Beta(a₀ + Σ λ, b₀ + Σ (1-λ))``; gradients lead there, too."""
        open_, closed = self.prior_counts
        for gate in gates:
            open_, closed = open_ + gate.sum(), closed + (1 - gate).sum()
        # Beta and Bernoulli are conjugate, and a gate's λ is the expected count of one open gate.
        self.concentration1, self.concentration0 = open_, closed

    def distribution(self) -> dist.TorchDistribution:
        """Return the posterior as it is now."""
        return dist.Beta(self.concentration1, self.concentration0)

    def expected_logit(self) -> Tensor:
        """Return ``E log (λ₀ / (1-λ₀)) = ψ(a) - ψ(b)``, a scalar: what the gates' optimum sees of λ₀."""
        return torch.digamma(self.concentration1) - torch.digamma(self.concentration0)
