"""What makes a compression fit a memory that is given, told from plans."""

from collections.abc import Iterator, Mapping
from typing import Any

from torch import nn

from sqs_pyro.compression.blockwise.memory_plan import plan_memory
from sqs_pyro.compression.blockwise.recipe import BlockwiseRecipe

#: What libraries take beside a plan's tensors, bytes.
LIBRARIES = 500_000_000


def unfit(
    net: nn.Module, sequences: int, length: int, recipe: BlockwiseRecipe, memory: float, *, ranks: int = 1
) -> str | None:
    """Return why a compression does not fit and how it would, in one sentence; None where it fits.

    Args:
        net, sequences, length, recipe, ranks: as of
            :func:`~sqs_pyro.compression.blockwise.memory_plan.plan_memory`; streamed where the recipe says so.
        memory: of the device of one rank, bytes.
    """

    def needs(changes: Mapping[str, Any], ranks: int = ranks) -> int:
        changed = recipe.model_validate({**recipe.model_dump(), **changes})
        plan = plan_memory(net, sequences, length, changed, streamed=changed.streamed, ranks=ranks)
        return plan.peak + LIBRARIES

    here = needs({})
    if here <= memory:
        return None
    repairs = dict(_repairs(recipe))
    found = [said for said, changes in repairs.items() if needs(changes) <= memory]
    more = list(_more(ranks, recipe.units))
    found = [f"{most} ranks" for most in more if needs({}, most) <= memory][:1] + found
    every = {key: value for changes in repairs.values() for key, value in changes.items()}
    least = needs(every, max(more, default=ranks))
    together = ", ".join([*(f"{most} ranks" for most in more[-1:]), *repairs])
    if found:
        repair = f"take {' or '.join(found)}"
    elif least <= memory:
        repair = f"take {together}, all together"
    elif together:
        repair = f"with {together} it would still need {least / 1e9:.1f} GB"
    else:
        repair = "there is nothing to divide further"
    of = f"Each of {ranks} ranks" if ranks > 1 else "Compression"
    return f"{of} needs {here / 1e9:.1f} GB, libraries included, but {memory / 1e9:.1f} GB are given: {repair}."


def _more(ranks: int, units: int) -> Iterator[int]:
    """Yield twice as many ranks, and so on, up to as many as there are units."""
    while ranks < units:
        ranks = min(2 * ranks, units)
        yield ranks


def _repairs(recipe: BlockwiseRecipe) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield what makes a compression smaller, in words and as keys; first what changes least of what comes out."""
    if not recipe.streamed:
        yield (
            "blockwise.streamed with allocation even",
            {"streamed": True, "allocation": "even", "finish_steps": 0},
        )
    if recipe.batch_size > 1:
        yield "batch_size 1", {"batch_size": 1}
    if recipe.embedding is not False or recipe.head is not False:
        yield "embedding and head false", {"embedding": False, "head": False}
