"""The fewest bits at which a language model loses at most so much: a few compressions that share their plan."""

import math
from collections.abc import Sequence

from pydantic import Field

from sqs_pyro.compression.blockwise.recipe import BlockwiseRecipe
from sqs_pyro.compression.searching import Attempt, LossLaw, next_place
from sqs_pyro.recipes import RecipeSection

# The excess of perplexity is as the squared error of weights, which a bit makes four times smaller: s = ln 4 about
# (SmolLM2-135M: 1.4 between 3.2 and 2.6 bits, 1.5 between 2.6 and 2.1). Beyond 8 bits nothing is lost.
_LAW = LossLaw(growth=math.log(4), uncertainty=0.3, width=0.7, noise=0.05, whole=-8.0, enough=0.05)
_FEWEST = 0.5  # bits
_BELOW_MOST = 1.0  # bits below log2(1 + K), to which K values keep no layer from its bits


class BitsSearchRecipe(RecipeSection):
    """The fewest bits are looked for at which perplexity grows by at most so much; `blockwise.bits` are the first.

    Attributes:
        points: hundredths by which the perplexity on validation text may exceed the network's own.
        attempts: at most. Each is a whole compression; only gradients are taken once.
    """

    points: float = Field(gt=0, le=1000)
    attempts: int = Field(default=4, ge=1, le=100)


def next_bits(attempts: Sequence[Attempt], search: BitsSearchRecipe, recipe: BlockwiseRecipe) -> float | None:
    """Return the bits to try next; None: none is expected to be worth its time.

    Args:
        attempts: so far, at least one; their targets are bits a weight.
        search: what may be lost, and in how many attempts.
        recipe: with the first attempt's bits.
    """
    if len(attempts) >= search.attempts:
        return None
    most = max(math.log2(1 + recipe.num_components) - _BELOW_MOST, attempts[0].target)
    place = next_place(
        [-each.target for each in attempts],
        [each.points for each in attempts],
        search.points,
        _LAW,
        lowest=-most,
        highest=-min(_FEWEST, attempts[0].target),
    )
    return None if place is None else -place
