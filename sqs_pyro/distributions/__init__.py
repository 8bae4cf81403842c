"""What a weight is: its prior, its variational family, and the KL terms between them."""

from sqs_pyro.distributions.codebook_gmm import CodebookGMM, LatentSpikeAndSlab
from sqs_pyro.distributions.kl import certified_bracket, gate_divergence, kl_bound, register_bound
from sqs_pyro.distributions.monte_carlo import monte_carlo_kl, sampled_kl
from sqs_pyro.distributions.spike_and_slab import SpikeAndSlab
from sqs_pyro.distributions.spike_gmm import SpikeGMM

__all__ = [
    "CodebookGMM",
    "LatentSpikeAndSlab",
    "SpikeAndSlab",
    "SpikeGMM",
    "certified_bracket",
    "gate_divergence",
    "kl_bound",
    "monte_carlo_kl",
    "register_bound",
    "sampled_kl",
]
