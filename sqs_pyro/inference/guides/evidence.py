"""Why a weight is zero, as a number: the evidence of the data for it not to be.

For each weight ``posterior odds = Bayes factor · prior odds``, so that with λ the posterior and λ₀ the prior
probability of being non-zero

    log p(data | θ_i ≠ 0) - log p(data | θ_i = 0) = logit λ_i - logit λ₀,

as far as q is right about λ: exactly for one weight, or weights that the data do not couple; else what the other
weights, distributed as in q, leave for this one to explain.
"""

from collections.abc import Mapping
from typing import Any

import torch
from pyro import poutine
from torch import Tensor
from torch.distributions import Independent

from sqs_pyro.errors import NetworkError
from sqs_pyro.inference.called import PyroCallable
from sqs_pyro.inference.guides.inclusion import InclusionGuide


def prior_logits(
    model: PyroCallable, inclusions: Mapping[str, InclusionGuide], names: list[str], args: Any, kwargs: Any
) -> dict[str, Tensor]:
    """Return ``logit λ₀`` of some sites' weights by name, each broadcastable to its site.

    Args:
        model: one that tells its ``priors``, or any that can be called to see them.
        inclusions: posteriors of random λ₀, whose expected logits count.
        names: of the sites.
        args, kwargs: the model's.

    Raises:
        NetworkError: a prior has no inclusion probability.
    """
    priors = model.priors if hasattr(model, "priors") else _traced_priors(model, args, kwargs)
    expected = {name: own.expected_logit() for own in inclusions.values() for name in own.weight_sites}
    return {name: expected.get(name, _prior_logit(name, priors[name])) for name in names}


def _traced_priors(model: PyroCallable, args: Any, kwargs: Any) -> dict[str, Any]:
    with torch.random.fork_rng(devices=[]), poutine.block():
        nodes = poutine.trace(model).get_trace(*args, **kwargs).nodes
    return {name: site["fn"] for name, site in nodes.items() if site["type"] == "sample"}


def _prior_logit(name: str, prior: Any) -> Tensor:
    base = prior.base_dist if isinstance(prior, Independent) else prior
    if not hasattr(base, "inclusion"):
        raise NetworkError(
            f"The prior of '{name}', a {type(base).__name__}, has no inclusion probability that evidence could be "
            "counted from: take one with a spike, such as SpikeAndSlab."
        )
    return torch.logit(base.inclusion)
