"""The `bounds` section of a recipe: how much is spent on measuring how far the ELBO is from the truth."""

from collections.abc import Mapping
from typing import Any

from pydantic import Field

from sqs_pyro.recipes import RecipeSection


class BoundsRecipe(RecipeSection):
    """How `bounds.json` is measured: bounds on the KL exactly, the KL itself and the likelihood by draws.

    Attributes:
        examples: training examples, the first, on which the likelihood is measured.
        networks: networks drawn for it at each temperature, at most.
        draws: Monte Carlo draws of each weight, at most; large networks get fewer, but at least 2.
        standard_error: of the likelihood, as a share of it, at which no more networks are drawn.
    """

    examples: int = Field(default=64, ge=1)
    networks: int = Field(default=4, ge=2)
    draws: int = Field(default=4, ge=2)
    standard_error: float = Field(default=0.01, ge=0)


def with_bounds(values: Any) -> Any:
    """A recipe's values in which ``bounds: true`` is a section of defaults, and ``false`` is none."""
    if not isinstance(values, Mapping) or not isinstance(values.get("bounds"), bool):
        return values
    return {**values, "bounds": {} if values["bounds"] else None}
