"""Networks as Pyro models: any ``nn.Module`` by :class:`BayesianNetwork`, and those offered here by name."""

from sqs_pyro.models.bayesian import BayesianNetwork
from sqs_pyro.models.catalogue import digits_net, resnet18, resnet20, resnet32, resnet44, resnet50, resnet56
from sqs_pyro.models.learned_prior import LearnedPrior
from sqs_pyro.models.learned_slab import LearnedSlab
from sqs_pyro.models.likelihoods import (
    Bernoulli,
    Categorical,
    Gaussian,
    HeteroscedasticGaussian,
    LearnedGaussian,
    NegativeBinomial,
    Poisson,
)
from sqs_pyro.models.network_prior import NetworkPrior
from sqs_pyro.models.priors import (
    HierarchicalInclusion,
    gaussian_spike_prior,
    normal_prior,
    scale_matched_prior,
)
from sqs_pyro.models.sharding import shard_sites
from sqs_pyro.networks.architectures import Architecture, architecture_of, include_patterns, register_architecture

__all__ = [
    "Architecture",
    "BayesianNetwork",
    "Bernoulli",
    "Categorical",
    "Gaussian",
    "HeteroscedasticGaussian",
    "HierarchicalInclusion",
    "LearnedGaussian",
    "LearnedPrior",
    "LearnedSlab",
    "NegativeBinomial",
    "NetworkPrior",
    "Poisson",
    "architecture_of",
    "digits_net",
    "gaussian_spike_prior",
    "include_patterns",
    "normal_prior",
    "register_architecture",
    "resnet18",
    "resnet20",
    "resnet32",
    "resnet44",
    "resnet50",
    "resnet56",
    "scale_matched_prior",
    "shard_sites",
]
