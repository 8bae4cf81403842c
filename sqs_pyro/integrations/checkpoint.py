"""Compression of a transformer straight from its checkpoint: one block of it is in memory at a time."""

from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sqs_pyro.compression.blockwise.blocks import BlockwiseResult
from sqs_pyro.compression.blockwise.call import compress_transformer
from sqs_pyro.compression.blockwise.recipe import BlockwiseRecipe
from sqs_pyro.compression.blockwise.store import BlockRecord
from sqs_pyro.errors import OutputError, ResourceError
from sqs_pyro.extras import needed_for
from sqs_pyro.recipes import parse


def compress_checkpoint(
    checkpoint: str | Path,
    sequences: Tensor,
    recipe: BlockwiseRecipe | Mapping[str, Any] | None = None,
    *,
    directory: str | Path,
    dtype: torch.dtype = torch.float32,
    progress: Callable[[BlockRecord], None] | None = None,
    metadata: Mapping[str, Any] | None = None,
) -> BlockwiseResult:
    """Compress a checkpoint to the same network, bit for bit, as ``compress_transformer`` gives of it when loaded.

    Args:
        checkpoint: directory with config.json and safetensors files, one or shards with their index.
        sequences: calibration text, int64 ``[n, T]``.
        recipe: what to do, with ``allocation: even``: ``importance`` needs the whole network in memory.
        directory: where finished blocks are kept: the same call goes on behind them.
        dtype: the network computes in, whatever the checkpoint is stored in.
        progress: told of each finished block.
        metadata: written into the packed file.

    Raises:
        NetworkError, DataError, RecipeError, OutputError, ResourceError: one sentence that says what to repair;
            finished blocks are kept.
    """
    with needed_for("Checkpoints"):
        from sqs_pyro.integrations.streamed_weights import StreamedWeights, empty_network
    if not isinstance(recipe, BlockwiseRecipe):
        recipe = parse(BlockwiseRecipe, recipe or {}, "blockwise")
    net = empty_network(Path(checkpoint), dtype)
    run = partial(compress_transformer, net, sequences, recipe, residency=StreamedWeights(net, Path(checkpoint)))
    try:
        return run(directory=directory, progress=progress, metadata=metadata)
    except (OutputError, ResourceError) as error:
        kept = f"finished blocks are kept in '{directory}', and the same call goes on behind them."
        raise type(error)(f"{str(error).rstrip('.')}; {kept}") from error
    except OSError as error:
        raise OutputError(
            f"Compression stopped ({error}): make room and call it again, finished blocks are kept in "
            f"'{directory}'."
        ) from error
