"""Linear layers of a packed network that hand their weight to ``F.linear`` and to nothing else."""

import torch
from torch import nn

from sqs_pyro.kernels.modules import PackedLinear
from sqs_pyro.packing.stored import StoredWeight


def linear_weights(packed: nn.Module) -> dict[str, StoredWeight]:
    """Return weights of linear layers in whose place another form of them can stand, by every name."""
    return {
        f"{path}.weight".lstrip("."): module.packed_weight
        for path, module in packed.named_modules(remove_duplicate=False)
        if isinstance(module, PackedLinear) and is_plain_linear(module)
    }


def is_plain_linear(module: PackedLinear) -> bool:
    """Return whether nothing but ``F.linear`` reads the weight of what a packed layer has replaced."""
    replaced = type(module.plain(nn.Parameter(torch.empty(0))))
    # Attention's C++ code reads the weight of its last layer, and subclasses may read theirs.
    reads = issubclass(replaced, nn.modules.linear.NonDynamicallyQuantizableLinear)
    return replaced.forward is nn.Linear.forward and not reads
