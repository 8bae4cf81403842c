"""Documents that a page is made of: plain data, of which parts may be missing."""

from collections.abc import Mapping
from typing import Any

Document = Mapping[str, Any]


def at(document: Document, key: str) -> Any:
    """Return what a document has at a dotted key; None if it has nothing there."""
    value: Any = document
    for part in key.split("."):
        value = value.get(part) if isinstance(value, Mapping) else None
    return value


def headline(metrics: Document) -> str | None:
    """Return the name of the figure by which a run compares networks: of ``accuracy_drop`` the first part."""
    return next((key.removesuffix("_drop") for key in metrics if key.endswith("_drop")), None)


def is_language_model(metrics: Document) -> bool:
    """Return whether a run was of a language model, which is judged by perplexities."""
    return "perplexity_ratio" in metrics
