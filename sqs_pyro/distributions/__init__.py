"""What a weight is: its prior, its variational family, and the KL terms between them."""

from sqs_pyro.distributions.codebook import Codebook
from sqs_pyro.distributions.codebook_gmm import CodebookGMM, LatentSpikeAndSlab
from sqs_pyro.distributions.kl import certified_bracket, gate_divergence, kl_bound, register_bound
from sqs_pyro.distributions.mixture_kl import log_sum_divergence, shares_components
from sqs_pyro.distributions.monte_carlo import monte_carlo_kl, sampled_kl
from sqs_pyro.distributions.spike_and_mixture import GaussianSpikeAndSlab, SpikeAndMixture
from sqs_pyro.distributions.spike_and_slab import SpikeAndSlab
from sqs_pyro.distributions.spike_gmm import SpikeGMM

__all__ = [
    "Codebook",
    "CodebookGMM",
    "GaussianSpikeAndSlab",
    "LatentSpikeAndSlab",
    "SpikeAndMixture",
    "SpikeAndSlab",
    "SpikeGMM",
    "certified_bracket",
    "gate_divergence",
    "kl_bound",
    "log_sum_divergence",
    "monte_carlo_kl",
    "register_bound",
    "sampled_kl",
    "shares_components",
]
