"""Likelihoods by name."""

from collections.abc import Callable

from sqs_pyro.errors import NetworkError
from sqs_pyro.models.likelihoods.classes import Bernoulli, categorical
from sqs_pyro.models.likelihoods.counts import NegativeBinomial, Poisson
from sqs_pyro.models.likelihoods.regression import Gaussian, HeteroscedasticGaussian, LearnedGaussian
from sqs_pyro.models.observation import Likelihood

#: Functions that make one: those with parameters belong to one model each.
_NAMED: dict[str, Callable[[], Likelihood]] = {
    "categorical": lambda: categorical,
    "gaussian": Gaussian,
    "learned_gaussian": LearnedGaussian,
    "heteroscedastic": HeteroscedasticGaussian,
    "bernoulli": Bernoulli,
    "multilabel": Bernoulli,
    "poisson": Poisson,
    "negative_binomial": NegativeBinomial,
}


def resolve(likelihood: str | Likelihood) -> Likelihood:
    """Return the likelihood of a name, and a callable as it is.

    Names are ``"categorical"``, ``"bernoulli"`` (or ``"multilabel"``), ``"gaussian"``, ``"learned_gaussian"``,
    ``"heteroscedastic"``, ``"poisson"`` and ``"negative_binomial"``.

    Raises:
        NetworkError: any other value.
    """
    # A class is callable, too, and would take the network's output for its first argument.
    if isinstance(likelihood, type):
        raise NetworkError(
            f"likelihood is the class {likelihood.__name__}: give one made of it, say {likelihood.__name__}()."
        )
    if callable(likelihood):
        return likelihood
    if likelihood not in _NAMED:
        raise NetworkError(
            f"likelihood={likelihood!r} is unknown: use {', '.join(map(repr, _NAMED))}, or a callable from the "
            "network's output to a distribution."
        )
    return _NAMED[likelihood]()
