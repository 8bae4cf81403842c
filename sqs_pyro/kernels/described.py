"""The network that a packed file describes: tried without memory, compared with the file, then built.

What a file says of its network is data: a name that is looked up, and options that may be of any kind and size.
"""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.nn.modules.module import (
    register_module_module_registration_hook,
    register_module_parameter_registration_hook,
)

from sqs_pyro.documents import shown
from sqs_pyro.errors import NetworkError, PackedFileError, SQSError
from sqs_pyro.networks.registry import INITIAL_WEIGHTS, build_network
from sqs_pyro.own_code import is_own
from sqs_pyro.packing.contents import PackedContents, parameters_to_pack

# Weights of which a file may be the description: 1,024 a byte is a five-hundredth of a bit for each.
_ELEMENTS_A_BYTE = 1024
_ALWAYS_ALLOWED = 1 << 24  # numbers of a network that is nearly all constants
# Modules and parameters that a network may have: far more than the file has tensors.
_PARTS_A_TENSOR, _FIRST_PARTS = 20, 10_000


def described_network(contents: PackedContents, file_bytes: int) -> nn.Module:
    """Build the network that a packed file names; torch's random numbers are left as they were.

    Args:
        contents: of the file.
        file_bytes: the file's size, from which follows how large a network it may be.

    Raises:
        PackedFileError: the file does not say how, or its tensors are not those of the network that it says.
        RecipeError: the registry does not know the network, or its constructor not the options.
    """
    name, options = _spec(contents.metadata.get("network"))
    # The file's own shapes first: a few bytes can state a tensor of any size.
    _check_size(file_bytes, [*contents.tensors.values(), *contents.leftovers.values()])
    parts = parts_of(len(contents.tensors) + len(contents.leftovers))
    # Constructors draw weights; those are overwritten, and the caller's random numbers are not to be spent on
    # them.
    with torch.random.fork_rng(devices=[]):
        with at_most_parts(parts):
            # On the meta device a network of any size costs nothing but its modules, whose number is bounded as
            # well.
            trial = _without_memory(name, options)
        # Otherwise the network is built unseen, but still with at most so many parts.
        if trial is not None:
            _check_fits(trial, contents)
            _check_size(file_bytes, [*trial.parameters(), *trial.buffers()])
        with at_most_parts(parts):
            return build_network(name, **options)


def _spec(spec: Any) -> tuple[str, dict[str, Any]]:
    if spec is None:
        raise PackedFileError(
            "The packed file does not say how to build its network: give load the network or its constructor."
        )
    name, options = (spec.get("name"), spec.get("options")) if isinstance(spec, dict) else (None, None)
    # Keys that make a constructor fetch weights: a file must not cause a download.
    if not isinstance(name, str) or not isinstance(options, dict) or INITIAL_WEIGHTS & options.keys():
        raise PackedFileError(
            f"The packed file says {shown(spec)} of its network, which is no name with options: give load the "
            "network or its constructor."
        )
    if is_own(name):  # a file alone never makes code run
        raise PackedFileError(
            f"The packed file's network is built by code of its user, {shown(name)}: give load the network or its "
            "constructor, `sqs` commands --network with that name."
        )
    return name, options


def _without_memory(name: str, options: dict[str, Any]) -> nn.Module | None:
    """Return the network on the meta device; None where its constructor needs the values of its tensors."""
    try:
        with torch.device("meta"):
            return build_network(name, **options)
    except Exception as error:
        # The registry puts a sentence of its own around what a constructor raises.
        cause = error.__cause__ or error
        if isinstance(cause, NotImplementedError | RuntimeError) and "meta" in str(cause).lower():
            return None
        raise


def _check_fits(net: nn.Module, contents: PackedContents) -> None:
    """Compare names and shapes; whether the file lacks a tensor is seen when it is filled in."""
    known = net.state_dict(keep_vars=True)
    try:
        parameters_to_pack(net, contents.tensors, () if contents.draws is None else (contents.draws,))
    except NetworkError as error:
        raise PackedFileError(f"The packed file does not fit the network that it names. {error}") from None
    for name, value in contents.leftovers.items():
        expected = known.get(name)
        if expected is None or expected.shape != value.shape:
            there = "is not there" if expected is None else f"has the shape {list(expected.shape)}"
            raise PackedFileError(
                f"The packed file does not fit the network that it names: tensor {shown(name)} of shape "
                f"{list(value.shape)} {there} in the network."
            )


def _check_size(size: int, values: list[Any]) -> None:
    # Of records a property, of tensors a method.
    elements = sum(value.numel if isinstance(value.numel, int) else value.numel() for value in values)
    if elements > _ALWAYS_ALLOWED + _ELEMENTS_A_BYTE * size:
        raise PackedFileError(
            f"The packed file of {size} bytes describes a network of {elements} numbers, which is not believed: "
            "give load the network or its constructor."
        )


def parts_of(tensors: int) -> int:
    """Return how many modules and parameters a network of that many stored tensors may have."""
    return _FIRST_PARTS + _PARTS_A_TENSOR * tensors


@contextmanager
def at_most_parts(parts: int, error: type[SQSError] = PackedFileError) -> Iterator[None]:
    """Stop a constructor of this thread that makes more modules and parameters.

    Raises:
        SQSError: of class ``error``; it has made more.
    """
    thread, count = threading.get_ident(), 0

    def one_more(module: nn.Module, name: str, part: Any) -> None:
        nonlocal count
        # torch's hooks are the process's: modules that other threads make meanwhile pass through here, too.
        count += threading.get_ident() == thread
        if count > parts:
            raise error(
                f"A network of more than {parts} parts is described, many more than there are tensors of it: the "
                "description is damaged, or give load the network itself."
            )

    hooks = [
        register_module_module_registration_hook(one_more),
        register_module_parameter_registration_hook(one_more),
    ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
