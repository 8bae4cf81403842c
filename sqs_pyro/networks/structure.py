"""An architecture found in a network: its longest list of blocks, and what those call their linear layers with."""

import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from sqs_pyro.errors import NetworkError
from sqs_pyro.networks.architecture import Architecture
from sqs_pyro.networks.architectures import architecture_of, base_path, is_known
from sqs_pyro.networks.calling import call_arguments
from sqs_pyro.networks.linear_form import LINEAR, every_token_to_every_expert, in_linear_form

#: Paths of linear layers in a block, in groups that share their input, in the order of their calls.
Groups = list[list[str]]
_Input = tuple[Tensor, int]  # and how often it had been written to


@dataclass(frozen=True, eq=False)
class FoundStructure:
    """What was found in a network; it prints itself as a list of what would be compressed.

    Attributes:
        architecture: the table that was made of it.
        blocks: how many there are.
        weights: of their linear layers that would be compressed.
        parameters: of the whole network.
    """

    architecture: Architecture
    blocks: int
    weights: int
    parameters: int

    def __str__(self) -> str:
        # Experts by a star for their number.
        named = [
            ", ".join(re.sub(r"\.\d+$", ".*", path) for path in each.values()) for each in self.architecture.groups
        ]
        groups = " | ".join(dict.fromkeys(named))
        kept = (
            f", but not {', '.join(self.architecture.kept)}, which were not called"
            if self.architecture.kept
            else ""
        )
        return (
            f"in {self.blocks} blocks at '{self.architecture.stacks[0]}' the linear layers {groups}{kept}, "
            f"{self.weights / max(self.parameters, 1):.1%} of {self.parameters:,} parameters"
        )


@torch.no_grad()
def found_by_structure(net: nn.Module, inputs: Any) -> FoundStructure:
    """Find the blocks of a network, and which of their linear layers share an input, by one call of it.

    The blocks are those of the ``nn.ModuleList`` of one class of modules whose linear layers have most weights.
    ``register_architecture(found.architecture)`` makes what was found known to everything else.

    Args:
        net: the network; it stays as it is.
        inputs: of the network, as :func:`~sqs_pyro.networks.calling.call_arguments` takes them.

    Raises:
        NetworkError: there is no such list, or its blocks group their layers in different ways.
    """
    with in_linear_form(net), every_token_to_every_expert():
        return _found(net, inputs)


def _found(net: nn.Module, inputs: Any) -> FoundStructure:
    path = _list_of_blocks(net)
    blocks = list(net.get_submodule(path).children())
    with _recorded(blocks) as (calls, outputs):
        args, kwargs = call_arguments(inputs, net)
        net(*args, **kwargs)
    each = [_groups(found) for found in calls]
    groups = _merged(each, type(net).__name__)
    called = {name for group in groups for name in group}
    layers = [_linear(block) for block in blocks]
    architecture = Architecture(
        name=getattr(getattr(net, "config", None), "model_type", None) or type(net).__name__,
        blocks=path.removeprefix(f"{base_path(net)}."),
        groups=[{name: name.removesuffix(f".{LINEAR}") for name in group} for group in groups],
        optional=sorted(name for name in called if not all(name in found for found in layers)),
        kept=sorted({name for found in layers for name in found} - called),
        bare=all(isinstance(output, Tensor) for output in outputs),
    )
    weights = sum(layer.weight.numel() for found in layers for name, layer in found.items() if name in called)
    return FoundStructure(architecture, len(blocks), weights, sum(p.numel() for p in net.parameters()))


def known_or_found(net: nn.Module, inputs: Any) -> Architecture:
    """Return the architecture that is known, or the one that is found by structure; errors as there."""
    return architecture_of(net) if is_known(net) else found_by_structure(net, inputs).architecture


def _list_of_blocks(net: nn.Module) -> str:
    found: dict[str, int] = {}
    for path, module in net.named_modules():
        # Experts, too, are lists of one class; the list that they are inside of has more weights.
        if path and isinstance(module, nn.ModuleList) and len({type(child) for child in module}) == 1:
            found[path] = sum(layer.weight.numel() for layer in _linear(module).values())
    best = max(found, key=found.__getitem__, default=None)
    if best is None or not found[best]:
        architecture_of(net)  # says that it is unknown, and what to do
        raise NetworkError(
            f"{type(net).__name__} has no list of blocks with linear layers: there is nothing to find."
        )
    return best


def _linear(module: nn.Module) -> dict[str, nn.Linear]:
    return {name: layer for name, layer in module.named_modules() if isinstance(layer, nn.Linear)}


@contextmanager
def _recorded(blocks: Sequence[nn.Module]) -> Iterator[tuple[list[dict[str, _Input]], list[Any]]]:
    """Note inside what each linear layer of each block is called with first, and what the blocks return."""
    calls: list[dict[str, _Input]] = [{} for _ in blocks]
    outputs: list[Any] = []
    hooks = []
    for block, found in zip(blocks, calls, strict=True):
        hooks += [
            layer.register_forward_pre_hook(partial(_note, found, name)) for name, layer in _linear(block).items()
        ]
        hooks.append(block.register_forward_hook(lambda block, inputs, output: outputs.append(output)))
    try:
        yield calls, outputs
    finally:
        for hook in hooks:
            hook.remove()


def _note(found: dict[str, _Input], name: str, layer: nn.Module, inputs: tuple[Tensor, ...]) -> None:
    found.setdefault(name, (inputs[0], inputs[0]._version))  # a tensor may be written to between two calls


def _groups(calls: Mapping[str, _Input]) -> Groups:
    """Return layers in groups; inputs are one if they are the same numbers in the same place of memory."""
    groups: Groups = []
    before = None
    for name, (x, version) in calls.items():  # tensors are held, so that no memory is used twice
        here = (x.data_ptr(), x.shape, x.stride(), version)
        if here == before:
            groups[-1].append(name)
        else:
            groups.append([name])
        before = here
    return groups


def _merged(each: Sequence[Groups], network: str) -> Groups:
    """Return the groups of all blocks, which may lack some of them."""
    merged: Groups = []
    for groups in each:
        for group in groups:
            others = [other for other in merged if {*other} & {*group}]
            if not others:
                merged.append(group)
            elif others != [group]:
                raise NetworkError(
                    f"Blocks of {network} call {', '.join(group)} with one input, but not all of them: register "
                    "an architecture that says which layers share theirs."
                )
    return merged
