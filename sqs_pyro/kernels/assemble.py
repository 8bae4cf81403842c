"""Assemble: packed contents and a plain network give the network that runs on packed weights."""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from sqs_pyro.errors import NetworkError, PackedFileError
from sqs_pyro.kernels.ensemble import PackedEnsemble
from sqs_pyro.kernels.placing import copy_with_weights, put_weights
from sqs_pyro.networks.linear_form import in_linear_form
from sqs_pyro.packing.contents import PackedContents
from sqs_pyro.packing.leftovers import leftover_state
from sqs_pyro.packing.stored import METADATA, stored_weights

#: Where a tensor hangs in a network: dictionaries of modules, and its key in them.
Slots = list[tuple[dict[str, Tensor | None], str]]


def assemble(net: nn.Module, contents: PackedContents) -> nn.Module:
    """Return a copy of ``net`` that runs on packed weights, with the contents' other tensors and their metadata.

    Args:
        net: the network, whatever its weights (also on the ``meta`` device); it stays as it is.
        contents: of this network, or draws of it, which give a :class:`PackedEnsemble`.

    Raises:
        NetworkError: for a name that is not a parameter, a shape that is not the parameter's, one parameter
            given under two names, or one that its module uses in a way that packing would break.
        PackedFileError: if the bytes of a tensor do not decode to what it says it is, or the network needs other
            tensors than there are.
    """
    packed: nn.Module
    # Tensors of the linear form say that the file is of a network in that form.
    with in_linear_form(net, [*contents.tensors, *contents.leftovers]):
        if contents.draws is None:
            packed = root = put_weights(*copy_with_weights(net, contents.tensors))
        else:
            packed = PackedEnsemble(net, contents.tensors, contents.draws)
            root = packed.network
    _fill(root, contents.leftovers)
    setattr(packed, METADATA, contents.metadata)
    return packed


def _fill(packed: nn.Module, leftovers: Mapping[str, Tensor]) -> None:
    """Copy the leftovers into the network, which must need exactly them."""
    # Codes and tables came with the packed weights; the file's other tensors are none of them.
    inside = {id(value) for weight in stored_weights(packed).values() for value in weight.buffers()}
    # By every name: a tied tensor may stand in the file under any of its own.
    targets = packed.state_dict(keep_vars=True)
    # By identity, so that tied tensors are asked for once.
    needed = {id(value): name for name, value in leftover_state(packed, inside).items()}
    slots = tensor_slots(packed)  # before anything is replaced
    for name, value in leftovers.items():
        target = targets.get(name)
        if target is None or needed.pop(id(target), None) is None:
            raise PackedFileError(f"The network has no tensor {name!r}: the file was made for another network.")
        # copy_ would broadcast, and round numbers to integers; another floating dtype is what a network may have.
        if target.shape != value.shape or target.is_floating_point() != value.is_floating_point():
            raise PackedFileError(
                f"Tensor {name!r} is {value.dtype} {list(value.shape)} in the file, but {target.dtype} "
                f"{list(target.shape)} in the network: the file was made for another network."
            )
        _write(target, value, slots[id(target)])
    if needed:
        raise PackedFileError(
            f"The file has no tensor {next(iter(needed.values()))!r}: it was made for another network."
        )
    # Non-persistent buffers are in no file: only a constructor that runs on the CPU computes them.
    stranded = [name for name, value in packed.named_buffers() if value.is_meta]
    if stranded:
        raise NetworkError(
            f"Buffer {stranded[0]!r} is on the meta device and no file holds it: build the network on the CPU."
        )


def _write(target: Tensor, value: Tensor, slots: Slots) -> None:
    """Put a value where ``target`` is; a tensor on the meta device has no memory, so another takes its places."""
    if target.device.type != "meta":
        with torch.no_grad():
            target.copy_(value)  # a float16 of the file becomes the network's own dtype
        return
    # A copy of its own: constants of a file are views of one element, which nobody could write to.
    made = torch.empty(value.shape, dtype=target.dtype).copy_(value)
    if isinstance(target, nn.Parameter):
        made = nn.Parameter(made, requires_grad=target.requires_grad)
    # Tied tensors hang in several modules, and stay tied.
    for held, name in slots:
        held[name] = made


def tensor_slots(net: nn.Module) -> dict[int, Slots]:
    """Return where each parameter and buffer of a network hangs, by ``id``."""
    slots: dict[int, Slots] = {}
    for module in net.modules():
        for held in (module._parameters, module._buffers):
            for name, value in held.items():
                if value is not None:
                    # Tied tensors hang in several places, and must be one again where they are replaced.
                    slots.setdefault(id(value), []).append((held, name))  # type: ignore[arg-type]
    return slots
