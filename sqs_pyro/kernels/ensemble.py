"""``PackedEnsemble``: draws of one network that run on packed weights, and answer with their average."""

from collections.abc import Mapping

from torch import Tensor, nn

from sqs_pyro.kernels.placing import check_reads_weights, copy_with_weights
from sqs_pyro.kernels.weight import PackedWeight
from sqs_pyro.networks.drawn import AverageOfDraws, leave_to_draws
from sqs_pyro.packing.layouts import PackedTensor
from sqs_pyro.packing.stored import WEIGHT_PREFIX, StoredEnsemble, stored_weights


class PackedEnsemble(AverageOfDraws, StoredEnsemble):
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
        class_axis, draws_used: see :class:`~sqs_pyro.networks.drawn.AverageOfDraws`; no file holds them.

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

    def draws(self) -> dict[str, Tensor]:
        """Return the compressed parameters, decoded at the first call, ``[S, *shape]`` by name."""
        weights = stored_weights(self.network, every_name=True)  # moving a network separates its shared buffers
        return {name: weight.draws() for name, weight in weights.items() if isinstance(weight, PackedWeight)}

    @property
    def called_like(self) -> nn.Module:
        """The network to which arguments are handed on."""
        return self.network

    def train(self, mode: bool = True) -> "PackedEnsemble":
        """Stay in evaluation mode, whatever is asked for."""
        return super().train(False)
