"""The memory that blockwise compression of a checkpoint is going to take, as a document."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from sqs_pyro.compression.blockwise.memory_plan import plan_memory
from sqs_pyro.compression.blockwise.recipe import BlockwiseRecipe
from sqs_pyro.errors import NetworkError
from sqs_pyro.extras import needed_for
from sqs_pyro.recipes import parse
from sqs_pyro.runs.recipe import changed


def planned_memory(
    checkpoint: Path, sequences: int, length: int, changes: Sequence[str] = (), *, whole: bool = False
) -> dict[str, Any]:
    """A plan from ``config.json``; the weights need not be there.

    Args:
        checkpoint: directory with ``config.json``.
        sequences, length: n and T of the calibration.
        changes: ``"bits=3"``: keys of :class:`BlockwiseRecipe`, in YAML notation. One block at a time needs
            ``allocation`` `even`, which is then the default.
        whole: the network is in memory as a whole.

    Returns:
        ``parameters``, ``tokens``, ``streamed``, ``peak`` and ``moments``: bytes by moment and part.

    Raises:
        NetworkError, RecipeError: one sentence.
    """
    with needed_for("Plans"):
        from sqs_pyro.integrations.streamed_weights import empty_network
    start = {} if whole else {"allocation": "even"}
    recipe = parse(BlockwiseRecipe, changed(start, changes), "blockwise")
    if not whole and recipe.allocation != "even":
        raise NetworkError(
            f"Allocation '{recipe.allocation}' needs gradients through the whole network: add --whole, or take "
            "allocation=even."
        )
    plan = plan_memory(empty_network(checkpoint, torch.float32), sequences, length, recipe, streamed=not whole)
    return {
        "checkpoint": str(checkpoint),
        "parameters": plan.parameters,
        "tokens": plan.tokens,
        "streamed": not whole,
        "peak": plan.peak,
        "moments": plan.moments,
    }
