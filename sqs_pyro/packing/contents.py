"""``PackedContents``: all that a packed file holds, the hub between a network, its file, its size and its run.

    guide.harden() -> CodedTensor -> pack -> PackedContents -> write_packed | size_report | assemble

:func:`pack` makes contents of a plain network and its coded weights, :func:`contents_of` of a packed network, and
:func:`~sqs_pyro.packing.file.read_packed` of a file.
"""

import difflib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from sqs_pyro.errors import NetworkError
from sqs_pyro.packing.coded import CodedTensor, stack_draws
from sqs_pyro.packing.finite import check_finite
from sqs_pyro.packing.layouts import PackedTensor, pack_tensor
from sqs_pyro.packing.leftovers import (
    check_leftover_dtype,
    in_fixed_point,
    leftover_state,
    round_to,
    smallest_exact,
)
from sqs_pyro.packing.record import TensorRecord
from sqs_pyro.packing.stored import METADATA, StoredEnsemble, StoredWeight, stored_weights

# The first version of files that have them.
_VERSIONS = {"structured": 4, "adaptive": 5}


@dataclass(frozen=True, eq=False)
class PackedContents:
    """What a packed file holds.

    Attributes:
        tensors: compressed tensors by parameter name.
        leftovers: uncompressed tensors by name, as stored (often float16); constants of a file are expanded views.
        metadata: ``"network"`` (what rebuilds it, or None), ``"recipe"``, ``"metrics"``: plain JSON.
        draws: S, if the tensors hold draws of a posterior in their last dimension; None: one network.
    """

    tensors: Mapping[str, PackedTensor]
    leftovers: Mapping[str, Tensor]
    metadata: dict[str, Any]
    draws: int | None = None

    def records(self) -> list[TensorRecord]:
        """Describe the compressed tensors; reads all of their bytes once, for the checksums."""
        return [TensorRecord.of(name, packed) for name, packed in self.tensors.items()]

    @property
    def format_version(self) -> int:
        """The oldest version of the file format that can say what there is."""
        tensors = ((packed.layout, packed.shape[0], packed.num_scales) for packed in self.tensors.values())
        return format_version(tensors, self.draws, self.leftovers.values())


def pack(
    net: nn.Module,
    coded: Mapping[str, CodedTensor | PackedTensor],
    *,
    layout: str = "auto",
    leftover_dtype: str | None = "float16",
    metadata: Mapping[str, Any] | None = None,
) -> PackedContents:
    """Pack a network's coded weights, and round what is not compressed; see ``kernels.packed_network``.

    Raises:
        NetworkError: names or shapes that are not the network's, an unknown layout or dtype, or state that is no
            tensor.
    """
    check_leftover_dtype(leftover_dtype)
    parameters = parameters_to_pack(net, coded)  # wrong names are told before anything is packed
    tensors = {
        name: value if isinstance(value, PackedTensor) else pack_tensor(value, layout)
        for name, value in coded.items()
    }
    leftovers = _leftovers(net, parameters, leftover_dtype)
    return PackedContents(_in_file_order(net, parameters, tensors), leftovers, about(net, metadata))


def pack_draws(
    net: nn.Module,
    draws: Sequence[Mapping[str, CodedTensor]],
    *,
    layout: str = "auto",
    leftover_dtype: str | None = "float16",
    metadata: Mapping[str, Any] | None = None,
) -> PackedContents:
    """Pack several networks' coded weights, each parameter's as one tensor ``[*shape, S]``.

    Raises:
        NetworkError: as :func:`pack`; or there is no draw, or draws differ in names or codebooks.
    """
    check_leftover_dtype(leftover_dtype)
    if not draws or any(set(draw) != set(draws[0]) for draw in draws):
        raise NetworkError(f"The {len(draws)} draws to pack must be at least one, and all of the same parameters.")
    stacked = {name: stack_draws([draw[name] for draw in draws]) for name in draws[0]}  # [*shape, S]
    parameters = parameters_to_pack(net, stacked, (len(draws),))
    tensors = {name: _smallest(value, layout) for name, value in stacked.items()}
    leftovers = _leftovers(net, parameters, leftover_dtype)
    ordered = _in_file_order(net, parameters, tensors)
    return PackedContents(ordered, leftovers, about(net, metadata), len(draws))


def contents_of(net: nn.Module) -> PackedContents:
    """Return the contents of a packed network, as a file would hold them: each tensor is packed once.

    A tensor that several modules share stands under its first name only. The metadata is the network's own.

    Raises:
        NetworkError: if the module is not a packed network, has state that is not a tensor, or holds NaN.
    """
    root, weights, metadata, draws = parts_of_packed(net)
    tensors = {name: weight.packed() for name, weight in weights.items()}
    # `stored_weights` walks a packed network in the order that `_in_file_order` makes: both write the same file.
    return PackedContents(tensors, stored_leftovers(root), metadata, draws)


def parts_of_packed(net: nn.Module) -> tuple[nn.Module, dict[str, StoredWeight], dict[str, Any], int | None]:
    """Return a packed network (of an ensemble the inner one), its weights by name, metadata and draws.

    Raises:
        NetworkError: the module is not a packed network, or holds NaN.
    """
    metadata = getattr(net, METADATA, None)
    if metadata is None:
        raise NetworkError(
            f"A packed network is needed (the result of packed_network or load), but a {type(net).__name__} "
            "without packed weights was given: pack it first."
        )
    # Metadata hang on what was packed; of an ensemble, the weights are in the network inside it.
    root = net.network if isinstance(net, StoredEnsemble) else net
    check_finite(root)  # no reader would take the file
    return root, stored_weights(root), metadata, net.num_draws if isinstance(net, StoredEnsemble) else None


def stored_leftovers(net: nn.Module) -> dict[str, Tensor]:
    """Return what of a packed network is not compressed, each in the smallest dtype that holds it exactly."""
    # Codes and tables are buffers of the packed weights' modules, hence in its state; they are no leftovers.
    inside = {id(value) for weight in stored_weights(net).values() for value in weight.buffers()}
    return {name: smallest_exact(value) for name, value in leftover_state(net, inside).items()}


def parameters_to_pack(
    net: nn.Module, tensors: Mapping[str, CodedTensor | PackedTensor | TensorRecord], draws: tuple[int, ...] = ()
) -> dict[str, nn.Parameter]:
    """Return the parameters that compressed tensors stand for; the tensors' shapes have ``draws`` behind theirs.

    Raises:
        NetworkError: for a name that is not a parameter, a shape that is not the parameter's, or one parameter
            given under two names.
    """
    known = dict(net.named_parameters(remove_duplicate=False))  # a shared parameter may go by any of its names
    names: dict[int, str] = {}
    for name, packed in tensors.items():
        if name not in known:
            close = difflib.get_close_matches(name, known, n=1)
            hint = f"; did you mean {close[0]!r}?" if close else "."
            raise NetworkError(f"The network has no parameter {name!r}{hint}")
        if (*known[name].shape, *draws) != packed.shape:
            of_draws = f", which should be its {draws[0]} draws" if draws else ""
            raise NetworkError(
                f"Parameter {name!r} has shape {list(known[name].shape)} in the network, but "
                f"{list(packed.shape)} in compressed form{of_draws}."
            )
        # Two names of one parameter could be given two different weights.
        other = names.setdefault(id(known[name]), name)
        if other != name:
            raise NetworkError(f"{other!r} and {name!r} are one shared parameter: give only one of them.")
    return {name: known[name] for name in tensors}


def about(net: nn.Module, metadata: Mapping[str, Any] | None) -> dict[str, Any]:
    """Return the metadata of a network's file: what builds the network, and over it what the caller gives."""
    # None: whoever loads the file has to bring the network.
    known: dict[str, Any] = {"network": getattr(net, "network_spec", None), "recipe": {}, "metrics": {}}
    return with_metadata(known, metadata)


def with_metadata(known: Mapping[str, Any], own: Mapping[str, Any] | None) -> dict[str, Any]:
    """Return what a file says of itself, and over it what the caller gives.

    Raises:
        NetworkError: that is no mapping.
    """
    if own is not None and not isinstance(own, Mapping):
        raise NetworkError(
            f"The metadata is a {type(own).__name__}, but must be a mapping: give {{'a name': value}}."
        )
    return {**known, **(own or {})}


def format_version(tensors: Iterable[tuple[str, int, int]], draws: int | None, leftovers: Iterable[Tensor]) -> int:
    """Return the oldest version for tensors of these layouts, out-channels and scales, and for what is not coded.

    Version 2 can say draws, 3 scales of out-channels as well, 4 structured zeros as well, 5 adaptive streams and
    numbers in fixed point, too, and 6 scales of parts of out-channels.
    """
    version = 1 if draws is None else 2
    for layout, channels, scales in tensors:
        of_scales = 1 if not scales else 3 if scales == channels else 6
        version = max(version, of_scales, _VERSIONS.get(layout, 1))
    return max(version, 5) if any(in_fixed_point(value) for value in leftovers) else version


def _smallest(draws: CodedTensor, layout: str) -> PackedTensor:
    """Pack in the smallest layout; draws gain by one that would not pay for one network."""
    # "auto" itself leaves out what only pays for draws.
    layouts = ("auto", "conditional") if layout == "auto" else (layout,)
    return min((pack_tensor(draws, each) for each in layouts), key=lambda packed: packed.num_bytes)


def _leftovers(
    net: nn.Module, parameters: Mapping[str, nn.Parameter], leftover_dtype: str | None
) -> dict[str, Tensor]:
    """Everything but the coded parameters, under first names; parameters are rounded, buffers never are."""
    trained = {id(value) for value in net.parameters()}  # by identity: a tensor may have many names
    coded = {id(value) for value in parameters.values()}
    leftovers = {}
    for name, value in leftover_state(net, coded).items():
        rounds = leftover_dtype is not None and id(value) in trained
        leftovers[name] = smallest_exact(round_to(value.detach(), str(leftover_dtype)) if rounds else value)
    return leftovers


def _in_file_order(
    net: nn.Module, parameters: Mapping[str, nn.Parameter], tensors: Mapping[str, PackedTensor]
) -> dict[str, PackedTensor]:
    """Return tensors under their first names, in the order in which a packed network has them.

    Its weights are the last children of their modules, so those of a module's other children come before its own.
    """
    packed = {id(parameters[name]): tensor for name, tensor in tensors.items()}
    ordered: dict[str, PackedTensor] = {}
    seen: set[int] = set()

    def visit(module: nn.Module, path: str) -> None:
        if id(module) in seen:
            return
        seen.add(id(module))
        for name, child in module.named_children():
            # Once each, where it is met first, as named_modules goes.
            visit(child, f"{path}{name}.")
        for name, parameter in module.named_parameters(recurse=False):
            # Popped: a parameter that modules share stands under the first name only.
            if (tensor := packed.pop(id(parameter), None)) is not None:
                ordered[path + name] = tensor

    visit(net, "")
    return ordered
