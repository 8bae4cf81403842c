"""Monte Carlo dropout (Gal and Ghahramani 2016): the network as it was trained, its dropout left on."""

from typing import Any

import torch
from torch import Tensor, nn

from sqs_pyro.arguments import is_whole
from sqs_pyro.documents import shown
from sqs_pyro.errors import ArgumentError, NetworkError
from sqs_pyro.evaluation.predictive.detection import mixture_log_probabilities
from sqs_pyro.networks.calling import output_tensor
from sqs_pyro.networks.modes import evaluating

_Dropout = nn.modules.dropout._DropoutNd


class MCDropout(nn.Module):
    """Log-probabilities of a mixture over dropout masks: ``log 1/S Σ_s softmax(f(x; mask_s))``, ``[B, C]``.

    Every example of every call has masks of its own, after torch's random state. Batch norms and all else run as
    in evaluation. Only dropout that is a module is found.

    Args:
        net: a trained network; it is not copied.
        num_samples: S, masks.

    Raises:
        NetworkError: the network has no dropout.
        ArgumentError: there would be no mask.
    """

    def __init__(self, net: nn.Module, num_samples: int = 20) -> None:
        super().__init__()
        if not is_whole(num_samples, 1):
            raise ArgumentError(f"num_samples is {shown(num_samples)}, but must be at least 1 mask.")
        if not any(isinstance(module, _Dropout) and module.p for module in net.modules()):
            raise NetworkError(
                f"{type(net).__name__} has no dropout that could be left on: take a network that was trained with "
                "it, or another of sqs_pyro.evaluation.peers."
            )
        self.net, self.num_samples = net, num_samples
        self.train(net.training)

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        """Return the average of the masks' probabilities, as logarithms; the arguments are the network's."""
        return mixture_log_probabilities(self.each(*args, **kwargs).float().log_softmax(-1))

    def each(self, *args: Any, **kwargs: Any) -> Tensor:
        """Return what the network says under each mask, ``[S, B, ...]``."""
        with evaluating(self.net):
            for module in self.net.modules():
                module.training = isinstance(module, _Dropout)
            return torch.stack([output_tensor(self.net(*args, **kwargs)) for _ in range(self.num_samples)])

    @property
    def called_like(self) -> nn.Module:
        """The network to which arguments are handed on."""
        return self.net
