"""Which parameters of a network become sample sites."""

import re
from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import nn

from sqs_pyro.documents import shown
from sqs_pyro.errors import NetworkError
from sqs_pyro.networks.weight_scale import LARGEST_WEIGHT

#: Modules whose ``weight`` is a site unless patterns say otherwise.
DEFAULT_TYPES: tuple[type[nn.Module], ...] = (
    nn.Linear,
    nn.Conv1d,
    nn.Conv2d,
    nn.Conv3d,
    nn.ConvTranspose1d,
    nn.ConvTranspose2d,
    nn.ConvTranspose3d,
)
#: Weights of linear maps that torch's attention keeps without modules of their own; they go with Linear's.
_OF_ATTENTION = ("in_proj_weight", "q_proj_weight", "k_proj_weight", "v_proj_weight")


def select_sites(
    net: nn.Module,
    include: str | Sequence[str] | None = None,
    exclude: str | Sequence[str] = (),
    types: tuple[type[nn.Module], ...] = DEFAULT_TYPES,
) -> dict[str, nn.Parameter]:
    """Return the parameters of ``net`` to compress, by name, in the network's own order.

    Without ``include``: the ``weight`` of every Linear and convolution, first and last layer too, and the
    projections of torch's MultiheadAttention, which are linear maps without a module; biases, norms and embeddings
    stay as they are. A tied parameter is one site under its first name, and only if every module that shares it
    would be selected (so a language model's head tied to its embedding is left alone).

    Args:
        net: any module.
        include: regular expressions, or one; a floating-point parameter of any module whose name one of them
            matches (``re.search``) is a site. Replaces the choice by module type.
        exclude: regular expressions, or one; names that match are left uncompressed.
        types: the module types of the default choice.

    Raises:
        NetworkError: a pattern is not a regular expression or matches nothing of use, no parameter is left, or a
            selected parameter is a single number or holds NaN, infinity or numbers beyond 1e15.
    """
    include = None if include is None else as_patterns(include)
    exclude = as_patterns(exclude)
    names_of = _names_by_parameter(net)
    # A pattern that matches nothing is a misspelt name, whatever else matches.
    for pattern in (*(include or ()), *exclude):
        _check_pattern(pattern, [name for names in names_of.values() for name in names])
    for pattern in include or ():
        _check_floating(pattern, {name: p for p, names in names_of.items() for name in names})
    if include is None:
        # All owners of a tied parameter must be of these types: an embedding would be compressed with the head.
        chosen = {p: names for p, names in names_of.items() if all(_is_weight_of(net, n, types) for n in names)}
    else:
        chosen = {
            p: names
            for p, names in names_of.items()
            if p.is_floating_point() and any(_matches(name, include) for name in names)
        }
    sites = {
        names[0]: parameter
        for parameter, names in chosen.items()
        if not any(_matches(name, exclude) for name in names)
    }
    if not sites:
        raise NetworkError(
            f"{type(net).__name__} has no compressible layer: by default the weights of Linear and convolution "
            f"layers are, less those matching exclude={list(exclude)!r}; name others with include=[...]."
        )
    for name, parameter in sites.items():
        check_finite(name, parameter)
        _check_compressible(name, parameter)
    return sites


def as_patterns(given: str | Iterable[str]) -> tuple[str, ...]:
    """Return patterns as a tuple; a text is one pattern, not one for each of its letters."""
    patterns = [given] if isinstance(given, str) or not isinstance(given, Iterable) else list(given)
    if odd := [each for each in patterns if not isinstance(each, str)]:
        raise NetworkError(
            f"A pattern of include or exclude is {shown(odd[0])}, but must be a text, a regular expression for "
            "names of parameters: give one, or a list."
        )
    return tuple(patterns)


def check_finite(name: str, value: torch.Tensor) -> None:
    """Raise :class:`NetworkError` if the weight tensor ``value`` is empty, or has a NaN or infinite element."""
    if value.numel() == 0:
        raise NetworkError(f"Weight '{name}' is empty (shape {tuple(value.shape)}): exclude it.")
    bad = int((~torch.isfinite(value.detach())).sum())
    if bad:
        raise NetworkError(
            f"Weight '{name}' has {bad} values of {value.numel()} that are NaN or infinite: "
            "repair the checkpoint, or exclude the layer."
        )


def _check_compressible(name: str, value: torch.Tensor) -> None:
    if not value.dim():
        raise NetworkError(f"Weight '{name}' is a single number, which no codebook makes smaller: exclude it.")
    largest = float(value.detach().abs().max())
    if largest > LARGEST_WEIGHT:
        raise NetworkError(
            f"Weight '{name}' has values up to {largest:.2g}, whose squares float32 cannot add up (those of "
            f"{LARGEST_WEIGHT:.0g} it can): repair the checkpoint, or exclude the layer."
        )


def _names_by_parameter(net: nn.Module) -> dict[nn.Parameter, list[str]]:
    names: dict[nn.Parameter, list[str]] = {}  # by identity, which is how torch hashes tensors
    for name, parameter in net.named_parameters(remove_duplicate=False):
        names.setdefault(parameter, []).append(name)
    return names


def _is_weight_of(net: nn.Module, name: str, types: tuple[type[nn.Module], ...]) -> bool:
    owner, _, attribute = name.rpartition(".")
    module = net.get_submodule(owner)
    if isinstance(module, nn.MultiheadAttention):
        return attribute in _OF_ATTENTION and nn.Linear in types
    return attribute == "weight" and isinstance(module, types)


def _matches(name: str, patterns: Iterable[str]) -> bool:
    return any(re.search(pattern, name) for pattern in patterns)


def _check_pattern(pattern: str, names: list[str]) -> None:
    try:
        used = _matches_any(pattern, names)
    except re.error as error:
        raise NetworkError(f"Pattern {pattern!r} is not a regular expression: {error}.") from None
    if not used:
        raise NetworkError(
            f"Pattern {pattern!r} matches no parameter of the network; its parameters are named like "
            f"{', '.join(names[:4])}."
        )


def _check_floating(pattern: str, parameters: Mapping[str, torch.Tensor]) -> None:
    named = {name: value for name, value in parameters.items() if re.search(pattern, name)}
    if not any(value.is_floating_point() for value in named.values()):
        name, value = next(iter(named.items()))
        raise NetworkError(
            f"Pattern {pattern!r} of include matches nothing that can be compressed, because '{name}' is "
            f"{str(value.dtype).removeprefix('torch.')}: leave it out, only real floating-point weights can be."
        )


def _matches_any(pattern: str, names: list[str]) -> bool:
    return any(re.search(pattern, name) for name in names)
