"""How a compressed weight multiplies: custom ops, modules around them, packed networks and their files."""

import sqs_pyro.kernels.gpu.register  # noqa: F401  imported for effect: the ops on GPUs
from sqs_pyro.kernels.ensemble import PackedEnsemble
from sqs_pyro.kernels.modules import (
    PackedConv1d,
    PackedConv2d,
    PackedConv3d,
    PackedConvTranspose1d,
    PackedConvTranspose2d,
    PackedConvTranspose3d,
    PackedEmbedding,
    PackedLinear,
)
from sqs_pyro.kernels.network import dense_state, load, packed_ensemble, packed_network, save
from sqs_pyro.kernels.weight import PackedWeight

__all__ = [
    "PackedConv1d",
    "PackedConv2d",
    "PackedConv3d",
    "PackedConvTranspose1d",
    "PackedConvTranspose2d",
    "PackedConvTranspose3d",
    "PackedEmbedding",
    "PackedEnsemble",
    "PackedLinear",
    "PackedWeight",
    "dense_state",
    "load",
    "packed_ensemble",
    "packed_network",
    "save",
]
