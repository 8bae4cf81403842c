"""Packed networks as modules, seen from storage: where in them compressed parameters and metadata are."""

from abc import ABC, abstractmethod

from torch import nn

from sqs_pyro.packing.coded import CodedTensor
from sqs_pyro.packing.finite import check_finite
from sqs_pyro.packing.layouts import PackedTensor
from sqs_pyro.packing.leftovers import check_dtype, leftover_state
from sqs_pyro.packing.record import TensorRecord

WEIGHT_PREFIX = "packed_"  # parameter `name` of a module is held by its child `packed_name`
METADATA = "packed_metadata"  # attribute of a packed network's root


class StoredWeight(nn.Module, ABC):
    """A compressed parameter inside a network: child ``packed_<parameter>`` of the parameter's module.

    Attributes:
        layout: the layout that the parameter is stored in (at run time it may have another).
        uses: what modules do with the weight.
    """

    layout: str

    def __init__(self) -> None:
        super().__init__()
        # Not in the state dict: what modules do with the weight follows from the network, not from its file.
        self.uses: set[str] = set()

    def used_for(self, product: str) -> None:
        """Tell what a module does with the weight; the form that it has at run time depends on it.

        Args:
            product: ``"linear"``, ``"convolution"``, ``"embedding"``, or ``"decoded"`` where it reads the weight.
        """
        self.uses.add(product)

    @abstractmethod
    def coded(self) -> CodedTensor:
        """Return the weights; packing them gives the same bytes again."""

    @abstractmethod
    def packed(self) -> PackedTensor:
        """Return the weights in the layout that they are stored in."""

    @abstractmethod
    def record(self, name: str) -> TensorRecord:
        """Describe what :meth:`packed` returns, under the parameter's name."""


class StoredEnsemble(nn.Module):
    """Draws of a network that are averaged.

    Attributes:
        network: holds the draws, as compressed parameters ``[*shape, S]``, and what they share.
        num_draws: S.
    """

    network: nn.Module
    num_draws: int


def stored_weights(net: nn.Module, every_name: bool = False) -> dict[str, StoredWeight]:
    """Return the compressed parameters of a network by parameter name; shared ones once, or by every name."""
    found = {}
    # In the modules' order: it is the order of tensors in a file.
    for path, module in net.named_modules(remove_duplicate=not every_name):
        if isinstance(module, StoredWeight):
            owner, _, child = path.rpartition(".")
            name = child.removeprefix(WEIGHT_PREFIX)
            found[f"{owner}.{name}" if owner else name] = module
    return found


def check_storable(net: nn.Module) -> None:
    """Check that a file can hold everything that a network's state has.

    Raises:
        NetworkError: state that is no tensor, a dtype that no file has, or NaN; the sentence names it.
    """
    check_finite(net)
    for name, value in leftover_state(net).items():
        check_dtype(name, value)
