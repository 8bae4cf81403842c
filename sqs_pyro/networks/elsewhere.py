"""Networks that are not the library's: torchvision's and timm's by name, and those of a user's function."""

import difflib
import importlib
import inspect
from collections.abc import Callable
from functools import partial
from typing import Any

from torch import nn

from sqs_pyro.documents import shown
from sqs_pyro.errors import MissingPackageError, RecipeError
from sqs_pyro.extras import needed_for
from sqs_pyro.own_code import is_own, own_function

Constructor = Callable[..., nn.Module]


def constructor_elsewhere(name: str) -> tuple[str, Constructor] | None:
    """Return the full name of a network and what builds it; None: there is none of this name.

    Args:
        name: ``"torchvision/NAME"``, ``"timm/NAME"`` or either's NAME, torchvision's first; or the name of a
            function, see :mod:`sqs_pyro.own_code`.

    Raises:
        RecipeError: the library that is named has no such network, or there is no such function.
        MissingPackageError: that library is not installed.
    """
    if is_own(name):
        return name, own_function(name, "Network")
    library, slash, inside = name.partition("/")
    if slash and library in _FINDERS:
        found = _FINDERS[library](inside)
        if found is None:
            raise RecipeError(f"{library} has no network {shown(inside, 80)}{_hint(library, inside)}")
        return name, found
    for library, find in _FINDERS.items():
        try:
            found = find(name)
        except MissingPackageError:  # whoever names no library need not have it
            continue
        if found is not None:
            return f"{library}/{name}", found
    return None


def options_of(constructor: Constructor) -> dict[str, Any] | None:
    """Return a constructor's options and their defaults; None: whatever a library's networks take."""
    parameters = inspect.signature(constructor).parameters.values()
    if any(p.kind is p.VAR_KEYWORD for p in parameters):
        return None
    return {p.name: p.default for p in parameters}


def _models(library: str) -> Any:
    """Return the module of a library's networks, which has their names in ``list_models()``."""
    with needed_for(f"Networks of {library}"):
        return importlib.import_module("torchvision.models" if library == "torchvision" else library)  # heavy


def _torchvision(name: str) -> Constructor | None:
    models = _models("torchvision")
    if name not in models.list_models():
        return None
    constructor: Constructor = models.get_model_builder(name)
    # Segmentation and detection would fetch a trained backbone without being asked.
    backbone = "weights_backbone" in inspect.signature(constructor).parameters
    return partial(constructor, weights_backbone=None) if backbone else constructor


def _timm(name: str) -> Constructor | None:
    timm = _models("timm")
    architecture = name.partition(".")[0]  # behind the dot: whose weights
    return partial(timm.create_model, name) if architecture in timm.list_models() else None


_FINDERS: dict[str, Callable[[str], Constructor | None]] = {"torchvision": _torchvision, "timm": _timm}

#: What is put before a name to say whose network it is.
LIBRARIES = tuple(_FINDERS)


def _hint(library: str, name: str) -> str:
    close = difflib.get_close_matches(name[:80], _models(library).list_models(), n=3)
    return f"; did you mean {' or '.join(map(repr, close))}?" if close else f": {library}'s list_models() has all."
