"""SQS: Bayesian compression of neural networks on Pyro.

A network's weights become random variables; variational inference decides, weight by weight, which are exactly
zero and which value of a small codebook the others take; the result is a packed file that runs.
"""

from sqs_pyro import _command as _command  # before anything that takes time
from sqs_pyro import _moved as _moved  # old names of modules
from sqs_pyro import _torchvision as _torchvision  # before anything that may import torchvision
from sqs_pyro.compression import CompressionResult, compress, compress_transformer
from sqs_pyro.distributions import SpikeAndSlab, SpikeGMM
from sqs_pyro.inference import SQSELBO, PruningSchedule, SpikeGMMGuide, diagnose, elbo_report
from sqs_pyro.integrations import from_pretrained
from sqs_pyro.kernels import load, save
from sqs_pyro.models import BayesianNetwork
from sqs_pyro.packing.size import size_report
from sqs_pyro.shipping.pack import pack, pack_ensemble

__all__ = [
    "SQSELBO",
    "BayesianNetwork",
    "CompressionResult",
    "PruningSchedule",
    "SpikeAndSlab",
    "SpikeGMM",
    "SpikeGMMGuide",
    "compress",
    "compress_transformer",
    "diagnose",
    "elbo_report",
    "from_pretrained",
    "load",
    "pack",
    "pack_ensemble",
    "save",
    "size_report",
]
