"""Settings that single layers have of their own, by patterns of their names."""

import difflib
from collections.abc import Collection, Mapping
from fnmatch import fnmatchcase
from typing import Any, Self

from pydantic import model_validator

from sqs_pyro.errors import RecipeError
from sqs_pyro.recipes import RecipeSection

_MOST_NAMED = 12  # layers in a sentence


class OwnSettings(RecipeSection):
    """What the layers whose names match a pattern have of their own.

    Attributes:
        skip: whether they are left uncompressed; `false` takes back what a pattern before says.
    """

    skip: bool | None = None

    @property
    def given(self) -> dict[str, Any]:
        """What is said, by key."""
        return {key: value for key, value in self if value is not None}

    @model_validator(mode="after")
    def _says_something_at_once(self) -> Self:
        if not self.given:
            raise ValueError(f"at least one of {', '.join(type(self).model_fields)}")
        if self.skip and len(self.given) > 1:
            raise ValueError("skip: true alone, for what is left uncompressed has no other settings")
        return self


def of_layer(layers: Mapping[str, OwnSettings], name: str) -> dict[str, Any]:
    """Return the settings that a layer has of its own: of each, what the last pattern says that matches.

    Args:
        layers: settings by pattern of :mod:`fnmatch`.
        name: of the layer or of its weight, ``"layer3.0.conv1"`` or ``"layer3.0.conv1.weight"``.
    """
    found: dict[str, Any] = {}
    for pattern, own in layers.items():
        if _matches(pattern, name):
            found |= own.given
    return found


def check_layers(layers: Mapping[str, OwnSettings], names: Collection[str], key: str) -> None:
    """Check that every pattern says something of a layer that is there, and that not all are left uncompressed.

    Args:
        layers: settings by pattern.
        names: of all layers, or their weights, that would be compressed.
        key: where the patterns stand in a recipe.

    Raises:
        RecipeError: one sentence.
    """
    for pattern in layers:
        if not any(_matches(pattern, name) for name in names):
            plain = [_of_module(name) for name in names]
            listed = ", ".join(plain[:_MOST_NAMED])
            more = f" and {len(plain) - _MOST_NAMED} more" if len(plain) > _MOST_NAMED else ""
            close = difflib.get_close_matches(pattern, plain, n=1)
            hint = f"did you mean '{close[0]}'?" if close else "correct or remove it."
            raise RecipeError(
                f"Recipe key '{key}' has the pattern {pattern!r}, which no layer that would be compressed matches "
                f"(they are {listed}{more}): {hint}"
            )
    decides = {(_last(layers, name, setting), setting) for name in names for setting in _counting(layers, name)}
    for pattern, own in layers.items():
        for setting in own.given:
            if (pattern, setting) not in decides:
                raise RecipeError(
                    f"Recipe key '{key}' has {setting} for the pattern {pattern!r}, which has no effect, because "
                    "patterns behind it say otherwise of all its layers: put it behind them, or remove it."
                )
    if layers and all(of_layer(layers, name).get("skip") for name in names):
        raise RecipeError(f"Recipe key '{key}' leaves all layers uncompressed: leave one to be compressed.")


def _counting(layers: Mapping[str, OwnSettings], name: str) -> set[str]:
    """Return which settings of a layer have an effect: of one that is left uncompressed, that it is."""
    own = of_layer(layers, name)
    return {"skip"} if own.get("skip") else set(own)


def _last(layers: Mapping[str, OwnSettings], name: str, setting: str) -> str:
    """Return the pattern that decides a setting of a layer."""
    return [pattern for pattern, own in layers.items() if setting in own.given and _matches(pattern, name)][-1]


def _matches(pattern: str, name: str) -> bool:
    return fnmatchcase(name, pattern) or fnmatchcase(_of_module(name), pattern)


def _of_module(name: str) -> str:
    return name.removesuffix(".weight")
