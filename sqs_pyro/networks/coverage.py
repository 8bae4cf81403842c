"""Which share of a network is compressed, and what the rest is."""

from collections.abc import Collection
from dataclasses import dataclass

from torch import nn


@dataclass(frozen=True)
class Uncompressed:
    """A parameter that is left as it is.

    Attributes:
        name: of the parameter.
        shape: its shape.
        numel: its elements.
        reason: why it cannot be compressed, as a clause; empty where ``include`` can name it.
    """

    name: str
    shape: tuple[int, ...]
    numel: int
    reason: str


@dataclass(frozen=True)
class Coverage:
    """How much of a network is compressed.

    Attributes:
        compressed: elements of compressed parameters.
        total: elements of all parameters; shared ones count once.
        others: what is left, largest first.
    """

    compressed: int
    total: int
    others: tuple[Uncompressed, ...]

    @property
    def share(self) -> float:
        """Compressed elements of all, 0..1."""
        return self.compressed / max(self.total, 1)

    def largest(self, count: int = 3) -> tuple[Uncompressed, ...]:
        """Return the largest uncompressed weights: of two dimensions or more, as biases and norms gain nothing."""
        return tuple(other for other in self.others if len(other.shape) > 1)[:count]


def coverage(net: nn.Module, sites: Collection[str]) -> Coverage:
    """Return how much of a network's parameters the sites are.

    Args:
        net: the network.
        sites: names of the compressed parameters.
    """
    parameters = dict(net.named_parameters())  # shared ones once, under the name that a site has
    others = [
        Uncompressed(name, tuple(value.shape), value.numel(), _reason(net, name))
        for name, value in parameters.items()
        if name not in sites
    ]
    total = sum(value.numel() for value in parameters.values())
    left = sum(other.numel for other in others)
    return Coverage(total - left, total, tuple(sorted(others, key=lambda other: -other.numel)))


def _reason(net: nn.Module, name: str) -> str:
    module = net.get_submodule(name.rpartition(".")[0])
    # In these modules another tensor in a parameter's place would not be what the forward computes with.
    if isinstance(module, nn.RNNBase):
        return f"which its {type(module).__name__} keeps by itself"
    if getattr(module, "max_norm", None) is not None:
        return "whose rows max_norm rewrites"
    if ".parametrizations." in f".{name}":
        return "of a parametrization: remove_parametrizations makes it a plain weight"
    return ""
