"""What a test needs of a network to train it for a moment: how to build it, and what enters and leaves it."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

Inputs = Callable[[int], Any]  # a number of examples -> inputs as a network takes them: tensor, tuple or mapping
CLASSES = 3


def labels(count: int) -> Tensor:
    """``[count]``, one class an example, every class there."""
    return torch.arange(count) % CLASSES


def per_position(*shape: int) -> Callable[[int], Tensor]:
    """Labels ``[count, *shape]``: one class a token or pixel."""
    return lambda count: torch.randint(CLASSES, (count, *shape))


def tensor(*shape: int) -> Inputs:
    """Inputs ``[count, *shape]`` of standard normal values."""
    return lambda count: torch.randn(count, *shape)


@dataclass(frozen=True)
class Network:
    """One network of the catalogue.

    Attributes:
        build: makes it, with random weights that depend on torch's seed only.
        inputs: number of examples -> what ``compress`` gets beside the labels.
        labels: number of examples -> observations.
        likelihood: as for ``compress``.
        include: patterns of what the recipes compress; None: what is compressed by default.
        classifier: whether a loss of one label an example is meant, as distillation needs it.
    """

    build: Callable[[], nn.Module]
    inputs: Inputs
    labels: Callable[[int], Tensor] = labels
    likelihood: Any = "categorical"
    include: tuple[str, ...] | None = None
    classifier: bool = True


class Minibatches:
    """A loader of fixed minibatches, drawn once: ``len`` and ``dataset`` as torch's has them."""

    def __init__(self, network: Network, minibatches: int = 2, size: int = 6, seed: int = 1) -> None:
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            self.batches = [(network.inputs(size), network.labels(size)) for _ in range(minibatches)]
        self.dataset = range(minibatches * size)

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[tuple[Any, Tensor]]:
        return iter(self.batches)


def built(network: Network, seed: int = 0) -> nn.Module:
    """The network in evaluation mode, with vectors (norms, biases) that are not constant."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        net = network.build().eval()
        with torch.no_grad():
            for parameter in net.parameters():
                if parameter.dim() == 1 and len(parameter) > 1 and bool((parameter == parameter[0]).all()):
                    parameter.add_(torch.rand_like(parameter) / 4)
    return net
