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
    found = [f"{most} ranks" for most in range(ranks + 1, recipe.units + 1) if needs({}, most) <= memory][:1]
    found += [said for said, changes in _repairs(recipe) if needs(changes) <= memory]
    every: dict[str, Any] = {}
    for _, changes in _repairs(recipe):
        every |= changes
    least, all_said = needs(every, recipe.units), ", ".join(said for said, _ in _repairs(recipe))
    together = ", ".join(
        [*([f"{recipe.units} ranks"] if ranks < recipe.units else []), *([all_said] * bool(all_said))]
    )
    if found:
        repair = f"take {' or '.join(found)}"
    elif least <= memory:
        repair = f"take {together}, all together"
    else:
        together = (
            f"with {together} it would still need" if together else "there is nothing to divide further: give"
        )
        repair = f"{together} {least / 1e9:.1f} GB"
    of = f"Each of {ranks} ranks" if ranks > 1 else "Compression"
    return f"{of} needs {here / 1e9:.1f} GB, libraries included, but {memory / 1e9:.1f} GB are given: {repair}."


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
