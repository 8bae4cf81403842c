"""Packed networks as modules, seen from storage: which tensors a file of the module would hold."""

from abc import ABC, abstractmethod
from collections.abc import Collection, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from sqs_pyro.errors import NetworkError
from sqs_pyro.packing.coded import CodedTensor
from sqs_pyro.packing.finite import check_finite
from sqs_pyro.packing.layouts import PackedTensor, pack_tensor
from sqs_pyro.packing.leftovers import check_dtype, round_to, smallest_exact

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


class StoredEnsemble(nn.Module):
    """Draws of a network that are averaged.

    Attributes:
        network: holds the draws, as compressed parameters ``[*shape, S]``, and what they share.
        num_draws: S.
    """

    network: nn.Module
    num_draws: int


def module_contents(
    net: nn.Module,
) -> tuple[dict[str, PackedTensor], dict[str, Tensor], dict[str, Any], int | None]:
    """Return compressed tensors, leftovers, metadata and draws of a packed network, as a file would hold them.

    A tensor that several modules share stands under its first name only.

    Raises:
        NetworkError: if the module is not a packed network, has state that is not a tensor, or holds NaN.
    """
    metadata = getattr(net, METADATA, None)
    if metadata is None:
        raise NetworkError(
            f"A packed network is needed (the result of packed_network or load), but a {type(net).__name__} "
            "without packed weights was given: pack it first."
        )
    draws = net.num_draws if isinstance(net, StoredEnsemble) else None
    net = net.network if isinstance(net, StoredEnsemble) else net
    check_finite(net)
    weights = stored_weights(net)
    tensors = {name: pack_tensor(weight.coded(), weight.layout) for name, weight in weights.items()}
    leftovers = {name: smallest_exact(value) for name, value in leftover_state(net).items()}
    return tensors, leftovers, metadata, draws


def stored_weights(net: nn.Module, every_name: bool = False) -> dict[str, StoredWeight]:
    """Return the compressed parameters of a network by parameter name; shared ones once, or by every name."""
    found = {}
    for path, module in net.named_modules(remove_duplicate=not every_name):
        if isinstance(module, StoredWeight):
            owner, _, child = path.rpartition(".")
            name = child.removeprefix(WEIGHT_PREFIX)
            found[f"{owner}.{name}" if owner else name] = module
    return found


def leftover_state(net: nn.Module) -> dict[str, Tensor]:
    """Return parameters and persistent buffers that are not compressed, by name; shared ones once, none copied."""
    inside = {id(t) for m in net.modules() if isinstance(m, StoredWeight) for t in m.buffers()}
    state = {}
    for name, value in net.state_dict(keep_vars=True).items():
        if not isinstance(value, Tensor):
            raise NetworkError(f"State {name!r} is a {type(value).__name__}: only tensors can be stored.")
        if id(value) not in inside:
            inside.add(id(value))
            state[name] = value
    return state


def check_storable(net: nn.Module) -> None:
    """Check that a file can hold everything that a network's state has.

    Raises:
        NetworkError: state that is no tensor, a dtype that no file has, or NaN; the sentence names it.
    """
    check_finite(net)
    for name, value in leftover_state(net).items():
        check_dtype(name, value)


def with_metadata(about: Mapping[str, Any], own: Mapping[str, Any] | None) -> dict[str, Any]:
    """What a file says of itself, and over it what the caller gives.

    Raises:
        NetworkError: that is no mapping.
    """
    if own is not None and not isinstance(own, Mapping):
        raise NetworkError(
            f"The metadata is a {type(own).__name__}, but must be a mapping: give {{'a name': value}}."
        )
    return {**about, **(own or {})}


@torch.no_grad()
def round_leftovers(net: nn.Module, coded: Collection[str], dtype: str, kept: Collection[str] = ()) -> None:
    """Round, in place, the parameters that are not compressed, each where its values survive it.

    Parameters are what training finds, to no more digits than float16 has. Buffers are what a network was told:
    means and scales of its inputs, positions, masks, times, counts; they stay exact.

    Args:
        net: a network, packed or dense.
        coded: names of parameters whose values are codewords; none in a packed network.
        dtype: see :func:`~sqs_pyro.packing.leftovers.round_to`.
        kept: names of modules whose parameters stay exact.
    """
    exact = {id(value) for name, value in net.named_parameters(remove_duplicate=False) if name in coded}
    exact |= {id(value) for name in kept for value in net.get_submodule(name).parameters(recurse=False)}
    for value in net.parameters():
        if id(value) not in exact:
            value.copy_(round_to(value, dtype))
