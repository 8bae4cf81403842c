"""Networks by name, so that a packed file can say how to rebuild the network it belongs to."""

import difflib
import inspect
import json
from collections.abc import Callable
from typing import Any, TypeVar

from torch import nn

from sqs_pyro.documents import shown
from sqs_pyro.errors import RecipeError, SQSError, said

Constructor = TypeVar("Constructor", bound=Callable[..., nn.Module])

#: An option that is never part of a packed file: a path to initial weights.
INITIAL_WEIGHTS = "weights"

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


def network_options(name: str) -> dict[str, Any]:
    """Return the options of a registered network and their defaults (``inspect.Parameter.empty``: required)."""
    return {p.name: p.default for p in inspect.signature(_constructors[name]).parameters.values()}


def build_network(name: str, /, **options: Any) -> nn.Module:
    """Build a registered network.

    Args:
        name: a name out of :func:`network_names`.
        options: keyword arguments of the network's constructor.

    Returns:
        The network, with ``network_spec = {"name": name, "options": options}`` set on it. An option
        ``weights``, a path to initial weights, is left out: a packed file must not depend on it.

    Raises:
        RecipeError: for an unknown name, an unknown or missing option, one that is not JSON-able, or one that the
            constructor cannot take.
    """
    if name not in _constructors:
        raise RecipeError(f"Network {shown(name, 80)} is unknown: {_allowed('networks', name, network_names())}")
    constructor = _constructors[name]
    _check_options(name, constructor, options)
    try:
        net = constructor(**options)
    except SQSError:
        raise
    except Exception as error:  # whatever options of another kind, or too large, end in
        reason = shown(said(error), 300)
        raise RecipeError(
            f"Network {name!r} cannot be built with the options {shown(options)} ({reason}): correct the options."
        ) from error
    stored = {option: value for option, value in options.items() if option != INITIAL_WEIGHTS}
    net.network_spec = {"name": name, "options": stored}  # type: ignore[assignment]
    return net


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
