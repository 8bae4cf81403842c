"""Networks by name, so that a packed file can say how to rebuild the network it belongs to.

Names are registered here, or are those of :mod:`sqs_pyro.networks.elsewhere`.
"""

import difflib
import inspect
import json
from collections.abc import Callable
from typing import Any, TypeVar

from torch import nn

from sqs_pyro.documents import shown
from sqs_pyro.errors import RecipeError, SQSError, said
from sqs_pyro.networks.elsewhere import LIBRARIES, constructor_elsewhere, options_of

Constructor = TypeVar("Constructor", bound=Callable[..., nn.Module])

#: Options that are never part of a packed file, here, in torchvision and in timm: where first weights come from.
INITIAL_WEIGHTS = frozenset(
    {"weights", "weights_backbone", "pretrained", "pretrained_cfg", "pretrained_cfg_overlay", "checkpoint_path"}
)

_constructors: dict[str, Callable[..., nn.Module]] = {}


def register_network(name: str) -> Callable[[Constructor], Constructor]:
    """Return a decorator that makes a constructor (function or class) known as ``name``.

    The constructor itself stays as it is. Its keyword parameters are the network's options; their values
    must be JSON-able, because they are stored in packed files.

    Raises:
        ValueError: if another constructor has that name already.
    """

    def register(constructor: Constructor) -> Constructor:
        # By where it was defined, not by identity: after a reload it is another object.
        known = _constructors.setdefault(name, constructor)
        if (known.__module__, known.__qualname__) != (constructor.__module__, constructor.__qualname__):
            raise ValueError(
                f"Network name {name!r} belongs to {known.__module__}.{known.__qualname__} already; "
                f"register {constructor.__module__}.{constructor.__qualname__} under another name."
            )
        _constructors[name] = constructor  # a reloaded module replaces its own older constructor
        return constructor

    return register


def network_names() -> list[str]:
    """Return the names of all registered networks, sorted."""
    return sorted(_constructors)


def network_options(name: str) -> dict[str, Any] | None:
    """Return the options of a network and their defaults (``inspect.Parameter.empty``: required).

    None: the network is of a library, whose options are its own affair.

    Raises:
        RecipeError: there is no such network.
    """
    return options_of(_constructor(name)[1])


def build_network(name: str, /, **options: Any) -> nn.Module:
    """Build a network by its name.

    Args:
        name: one of :func:`network_names`; ``"torchvision/NAME"``, ``"timm/NAME"`` or either's bare NAME; or
            ``"module:function"`` or ``"path/file.py:function"``, which imports the user's code.
        options: keyword arguments of the network's constructor.

    Returns:
        The network, with ``network_spec = {"name": name, "options": options}`` set on it, the name with its
        library. Options of :data:`INITIAL_WEIGHTS` are left out: a packed file must not depend on them.

    Raises:
        RecipeError: for an unknown name, an unknown or missing option, one that is not JSON-able, or one that the
            constructor cannot take; or what it makes is no network.
        MissingPackageError: the library that has it is not installed.
    """
    full_name, constructor = _constructor(name)
    _check_options(name, constructor, options)
    try:
        net: Any = constructor(**options)
    except SQSError:
        raise
    except Exception as error:  # whatever options of another kind, or too large, end in
        reason = shown(said(error), 300)
        raise RecipeError(
            f"Network {name!r} cannot be built with the options {shown(options)} ({reason}): correct the options."
        ) from error
    if not isinstance(net, nn.Module):
        raise RecipeError(f"Network {name!r} is a function that returns {shown(net)}: let it return an nn.Module.")
    stored = {option: value for option, value in options.items() if option not in INITIAL_WEIGHTS}
    net.network_spec = {"name": full_name, "options": stored}  # type: ignore[assignment]
    return net


def _constructor(name: str) -> tuple[str, Callable[..., nn.Module]]:
    found = (name, _constructors[name]) if name in _constructors else constructor_elsewhere(name)
    if found is None:
        others = [*(f"{library}/NAME" for library in LIBRARIES), "module:function", "file.py:function"]
        allowed = _allowed("networks", name, [*network_names(), *others])
        raise RecipeError(f"Network {shown(name, 80)} is unknown: {allowed}")
    return found


def _check_options(name: str, constructor: Callable[..., nn.Module], options: dict[str, Any]) -> None:
    parameters = inspect.signature(constructor).parameters.values()
    takes_any = any(p.kind is p.VAR_KEYWORD for p in parameters)
    named = [p for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]
    allowed = sorted(p.name for p in named)
    for option, value in options.items():
        if option not in allowed and not takes_any:
            raise RecipeError(
                f"Network {name!r} has no option {shown(option, 80)}: {_allowed('options', option, allowed)}"
            )
        _check_json(name, option, value)
    missing = [p.name for p in named if p.default is p.empty and p.name not in options]
    if missing:
        raise RecipeError(f"Network {name!r} needs the option {missing[0]!r}: {_allowed('options', '', allowed)}.")


def _check_json(name: str, option: str, value: Any) -> None:
    try:
        json.dumps(value, allow_nan=False)  # now, not when a file is written after hours
    except (TypeError, ValueError, RecursionError):
        raise RecipeError(
            f"Option {option!r} of network {name!r} is {shown(value)}, which cannot be written to a file: "
            "give numbers, texts, true/false, or lists and mappings of them."
        ) from None


def _allowed(what: str, given: str, names: list[str]) -> str:
    # Bounded, as files say which network they are of, and difflib takes quadratic time.
    close = difflib.get_close_matches(given[:80], names, n=1)
    hint = f"; did you mean {close[0]!r}?" if close else "."
    return f"allowed {what} are {', '.join(names) or '(none)'}{hint}"
