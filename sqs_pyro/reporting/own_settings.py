"""Settings that single layers have of their own in a recipe."""

from collections.abc import Mapping
from typing import Any

Document = Mapping[str, Any]


def own_settings(recipe: Document) -> dict[str, str]:
    """Return in words what a recipe, of a run or of compression alone, says of single layers, by pattern."""
    for section in (recipe.get("compression"), recipe.get("blockwise"), recipe):
        layers = section.get("layers") if isinstance(section, Mapping) else None
        if isinstance(layers, Mapping) and layers:
            return {str(pattern): _said(own) for pattern, own in layers.items()}
    return {}


def _said(own: Any) -> str:
    given = own if isinstance(own, Mapping) else {}  # a file's metadata may hold anything
    words = {True: "left uncompressed", False: "compressed"}
    said = [words[value] if key == "skip" and value in words else f"{key} {value}" for key, value in given.items()]
    return ", ".join(text for text, value in zip(said, given.values(), strict=True) if value is not None)
