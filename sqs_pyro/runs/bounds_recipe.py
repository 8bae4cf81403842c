"""The `bounds` section of a recipe: how much is spent on measuring how far the ELBO is from the truth."""

from typing import Annotated, Any

from pydantic import BeforeValidator, Field

from sqs_pyro.recipe import RecipeSection


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


def _section(given: Any) -> Any:
    """``true`` stands for the defaults, ``false`` for none."""
    return {True: {}, False: None}[given] if isinstance(given, bool) else given


BoundsSection = Annotated[BoundsRecipe | None, BeforeValidator(_section)]
"""A field of a recipe: a section, ``true`` for its defaults, ``false`` or null to leave the bounds out."""
