"""Compression of a transformer straight from its checkpoint: one block of it is in memory at a time."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from sqs_pyro.compression.blockwise.blocks import BlockwiseResult
from sqs_pyro.compression.blockwise.call import compress_transformer
from sqs_pyro.compression.blockwise.fitting import unfit
from sqs_pyro.compression.blockwise.machines import MACHINES, Machine
from sqs_pyro.compression.blockwise.memory_plan import MemoryPlan, plan_memory
from sqs_pyro.compression.blockwise.recipe import BlockwiseRecipe
from sqs_pyro.compression.blockwise.store import BlockRecord
from sqs_pyro.compression.blockwise.time_plan import TimePlan, plan_time
from sqs_pyro.errors import OutputError, ResourceError
from sqs_pyro.extras import needed_for
from sqs_pyro.networks.residency import Residency
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
        recipe: what to do, with ``allocation: even``: ``importance`` needs the whole network in memory. Its
            ``streamed`` is for `sqs compress`, and without effect here.
        directory: where finished blocks are kept: the same call goes on behind them.
        dtype: the network computes in, whatever the checkpoint is stored in.
        progress: told of each finished block.
        metadata: written into the packed file.

    Raises:
        NetworkError, DataError, RecipeError, OutputError, ResourceError: one sentence that says what to repair;
            finished blocks are kept.
    """
    recipe = parse(BlockwiseRecipe, recipe or {}, "blockwise")
    net, residency = streamed_network(checkpoint, dtype)
    with _kept_blocks_are_named(directory):
        return compress_transformer(
            net,
            sequences,
            recipe,
            directory=directory,
            residency=residency,
            progress=progress,
            metadata=metadata,
        )


def streamed_network(checkpoint: str | Path, dtype: torch.dtype) -> tuple[nn.Module, Residency]:
    """Return a checkpoint's network, parameters on the meta device, and what reads them while they are at work.

    Raises:
        NetworkError, MissingPackageError: the checkpoint is not complete, or a package is missing.
    """
    with needed_for("Checkpoints"):
        from sqs_pyro.integrations.streamed_weights import StreamedWeights, empty_network  # needs transformers
    net = empty_network(Path(checkpoint), dtype)
    return net, StreamedWeights(net, Path(checkpoint))


@dataclass(frozen=True)
class CheckpointPlan:
    """What compression of a checkpoint takes.

    Attributes:
        memory: of a rank.
        time: of all ranks together, and
        alone: of one.
        unfit: why it does not fit the memory that was given, and how it would; None where it does.
    """

    memory: MemoryPlan
    time: TimePlan
    alone: TimePlan
    unfit: str | None


def plan_checkpoint(
    checkpoint: str | Path,
    sequences: int,
    length: int,
    recipe: BlockwiseRecipe,
    *,
    ranks: int = 1,
    device_memory: float | None = None,
    machine: Machine = MACHINES["cpu"],
) -> CheckpointPlan:
    """Return what compression of a checkpoint takes, from config.json alone; the weights need not be there.

    Args:
        checkpoint: directory with config.json.
        sequences, length: n and T of the calibration's ``[n, T]``.
        recipe: what is going to be done; ``streamed`` says whether the whole network is in memory.
        ranks: how many share the work: the plan is of one of them.
        device_memory: bytes that a rank has, if it is to be said whether they are enough.
        machine: whose throughputs tell the time.

    Raises:
        NetworkError, RecipeError, MissingPackageError: the architecture is unknown, there are more ranks than
            units, or a package is missing.
    """
    with needed_for("Plans"):
        from sqs_pyro.integrations.streamed_weights import empty_network
    net = empty_network(Path(checkpoint), torch.float32)
    what, streamed = (net, sequences, length, recipe), recipe.streamed
    memory = plan_memory(*what, streamed=streamed, ranks=ranks)
    time = plan_time(*what, machine, streamed=streamed, ranks=ranks)
    alone = time if ranks == 1 else plan_time(*what, machine, streamed=streamed, ranks=1)
    return CheckpointPlan(
        memory, time, alone, None if device_memory is None else unfit(*what, device_memory, ranks=ranks)
    )


@contextmanager
def _kept_blocks_are_named(directory: str | Path) -> Iterator[None]:
    """Say of an error that costs no finished block where these are."""
    try:
        yield
    except (OutputError, ResourceError) as error:
        kept = f"finished blocks are kept in '{directory}', and the same call goes on behind them."
        # The same class: callers and exit codes go by it.
        raise type(error)(f"{str(error).rstrip('.')}; {kept}") from error
    except OSError as error:
        raise OutputError(
            f"Compression stopped ({error}): make room and call it again, finished blocks are kept in "
            f"'{directory}'."
        ) from error
