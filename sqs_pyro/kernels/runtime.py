"""What a loaded network multiplies with: the run-time form of each packed weight, and why it has it."""

import math
from dataclasses import dataclass

from torch import nn

from sqs_pyro.kernels.weight import PackedWeight
from sqs_pyro.packing.stored import StoredEnsemble, stored_weights


@dataclass(frozen=True)
class RuntimeWeight:
    """One packed weight where it is now.

    Attributes:
        name: of the parameter.
        shape: of the weight; of draws in one tensor, their number is last.
        form, reason: see :class:`~sqs_pyro.kernels.form.RuntimeForm`.
        packed_bytes: that codes, tables, mask and scales take.
        decoded_bytes: that the decoded copy takes from its first use on, in the network's dtype; 0 where kernels
            multiply with the codes.
    """

    name: str
    shape: tuple[int, ...]
    form: str
    reason: str
    packed_bytes: int
    decoded_bytes: int


def runtime_weights(packed: nn.Module) -> list[RuntimeWeight]:
    """Return the packed weights of a network or ensemble; a weight that modules share stands once."""
    net = packed.network if isinstance(packed, StoredEnsemble) else packed
    found = []
    for name, weight in stored_weights(net).items():
        if isinstance(weight, PackedWeight):
            form = weight.best_form()
            # What will be there after the first call, not what is: a report before that call would praise too
            # much.
            decoded = 0 if form.has_kernels else math.prod(weight.shape) * weight.like.element_size()
            size = sum(buffer.nbytes for buffer in weight.buffers())
            found.append(RuntimeWeight(name, weight.shape, form.name, form.reason, size, decoded))
    return found
