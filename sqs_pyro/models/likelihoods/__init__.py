"""From a network's output to the distribution of what was observed, and from labels of any form to a value of it.

These are the likelihoods that have names; any callable can be one, see :mod:`sqs_pyro.models.observation`.
"""

from sqs_pyro.models.likelihoods.classes import Bernoulli, Categorical, categorical, categorical_last
from sqs_pyro.models.likelihoods.counts import NegativeBinomial, Poisson
from sqs_pyro.models.likelihoods.learned import LearnedLikelihood
from sqs_pyro.models.likelihoods.named import resolve
from sqs_pyro.models.likelihoods.regression import Gaussian, HeteroscedasticGaussian, LearnedGaussian

__all__ = [
    "Bernoulli",
    "Categorical",
    "Gaussian",
    "HeteroscedasticGaussian",
    "LearnedGaussian",
    "LearnedLikelihood",
    "NegativeBinomial",
    "Poisson",
    "categorical",
    "categorical_last",
    "resolve",
]
