"""``PackedEnsemble``: draws of one network that run on packed weights, and answer with their average."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from sqs_pyro.kernels.placing import check_reads_weights, copy_with_weights
from sqs_pyro.kernels.weight import PackedWeight
from sqs_pyro.networks.drawn import average_log_probabilities, leave_to_draws
from sqs_pyro.packing.layouts import PackedTensor
from sqs_pyro.packing.stored import WEIGHT_PREFIX, StoredEnsemble, stored_weights


class PackedEnsemble(StoredEnsemble):
    """Log-probabilities ``log 1/S Σ_s softmax(f(x; θ_s))``, ``[B, C]``, of S packed draws of one network.

    A compressed parameter has all of its draws in one packed tensor ``[*shape, S]`` with one codebook; all other
    tensors are shared. Several threads may call it at once.

    Args:
        net: the network; it stays as it is. Its other tensors are taken over.
        tensors: the draws by parameter name.
        num_draws: S.
        draws_at_once: networks that run together, by ``torch.vmap``; 1 runs one after the other, which is faster
            on CPUs.

    Attributes:
        class_axis: the dimension of the networks' outputs that holds the classes; to be set where there are more
            than two dimensions.

    Raises:
        NetworkError: for a name that is not a parameter, or a shape that is not the parameter's with S behind.
        PackedFileError: if the bytes of a tensor do not decode to what it says it is.
    """

    def __init__(
        self, net: nn.Module, tensors: Mapping[str, PackedTensor], num_draws: int, draws_at_once: int = 1
    ) -> None:
        super().__init__()
        self.network, placed = copy_with_weights(net, tensors, (num_draws,))
        self.num_draws, self.draws_at_once = num_draws, draws_at_once
        # Not saved in a file; who loads an ensemble of other outputs sets it again.
        self.class_axis: int | None = None
        names: dict[int, str] = {}  # of the stand-ins that a call puts draws in the place of
        for path, module in list(self.network.named_modules()):
            found = placed.get(id(module), {})
            if found:
                check_reads_weights(module, found)  # draws come in at each call
            for name, weight in found.items():
                # The stand-in stays as a parameter: functional calls put draws in the places of names.
                names.setdefault(id(module._parameters[name]), f"{path}.{name}".removeprefix("."))
                # The child makes it a stored weight; the parameter itself is left to the draws below.
                module.add_module(WEIGHT_PREFIX + name, weight)
        leave_to_draws(self.network, names)  # takes the stand-ins out
        self.eval()

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        """Return the average of the draws' answers; the arguments are the network's."""
        weights = stored_weights(self.network, every_name=True)  # moving a network separates its shared buffers
        # [S, *shape] each, decoded at the first call.
        draws = {name: weight.draws() for name, weight in weights.items() if isinstance(weight, PackedWeight)}
        return average_log_probabilities(self.network, draws, args, kwargs, self.draws_at_once, self.class_axis)

    @property
    def called_like(self) -> nn.Module:
        """The network to which arguments are handed on."""
        return self.network

    def train(self, mode: bool = True) -> "PackedEnsemble":
        """Stay in evaluation mode, whatever is asked for."""
        return super().train(False)
