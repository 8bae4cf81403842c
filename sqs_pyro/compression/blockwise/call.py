"""Compression of a transformer in one call, block after block, without fine-tuning it as a whole."""

from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import pyro.distributions as dist
from torch import Tensor, nn

from sqs_pyro.atomic import check_place, resolved
from sqs_pyro.compression.blockwise.blocks import BlockwiseResult, compress_blocks
from sqs_pyro.compression.blockwise.recipe import WITHOUT_EFFECT, BlockwiseRecipe
from sqs_pyro.compression.blockwise.store import BlockRecord
from sqs_pyro.compression.blockwise.vocabulary import vocabulary_of
from sqs_pyro.errors import DataError, RecipeError
from sqs_pyro.isolation import isolated
from sqs_pyro.models.likelihoods import Gaussian, categorical_last
from sqs_pyro.networks.architectures import architecture_of, blocks, layer_groups
from sqs_pyro.networks.checks import check_network, check_replaceable
from sqs_pyro.networks.residency import Residency
from sqs_pyro.networks.tokens import check_tokens, longest_input, vocabulary_size
from sqs_pyro.recipes import parse
from sqs_pyro.resources import enough_resources


@enough_resources("Compression", "give fewer sequences, or lower batch_size, or raise the limit")
def compress_transformer(
    net: nn.Module,
    sequences: Tensor,
    recipe: BlockwiseRecipe | Mapping[str, Any] | None = None,
    *,
    directory: str | Path | None = None,
    residency: Residency | None = None,
    progress: Callable[[BlockRecord], None] | None = None,
    metadata: Mapping[str, Any] | None = None,
) -> BlockwiseResult:
    """Compress embedding, head and the blocks' linear layers of a transformers network from unlabelled text.

    Args:
        net: BERT, Llama, Mistral, Qwen2, Qwen3, or what
            :func:`~sqs_pyro.networks.architectures.register_architecture` has added. It stays as it is.
        sequences: calibration text, int64 ``[n, T]``, say of :func:`~sqs_pyro.data.tokens.token_sequences` or
            :func:`~sqs_pyro.data.generation.generate_calibration`.
        recipe: what to do, a :class:`BlockwiseRecipe` or a mapping of its keys.
        directory: where finished blocks are kept: the same call goes on behind them. They belong to this network,
            these sequences and this recipe: with others they are refused.
        residency: which weights are in memory; all of them if left out.
        progress: told of each finished block.
        metadata: written into the packed file.

    Returns:
        The packed network and a record of each block.

    Raises:
        NetworkError, DataError, RecipeError, OutputError: one sentence that says what to repair.
    """
    recipe = parse(BlockwiseRecipe, recipe or {}, "blockwise")
    if recipe.streamed and residency is None:
        raise RecipeError(
            "Recipe key 'blockwise.streamed' is true, but this network is in memory: leave it out, or call "
            "compress_checkpoint with its directory."
        )
    if directory is not None:  # before hours of work: can a block's file be made there?
        check_place(Path(directory) / "block-000.pt")
    (check_network if residency is None else check_replaceable)(net)  # others may have weights elsewhere
    metadata = {
        "recipe": recipe.model_dump(mode="json", exclude_defaults=True, exclude=WITHOUT_EFFECT),
        **(metadata or {}),
    }
    architecture = architecture_of(net)
    found = blocks(net)
    vocabulary = vocabulary_of(net, recipe)
    _check_sequences(net, sequences)
    with isolated(net, seed=recipe.seed):
        return compress_blocks(
            net,
            found,
            partial(layer_groups, architecture=architecture),
            # Without a mask: sequences are cut to equal length, there is nothing to hide.
            [{"input_ids": part} for part in sequences.split(recipe.batch_size)],
            recipe,
            likelihood=_said,
            directory=None if directory is None else resolved(directory),
            residency=residency,
            progress=progress,
            metadata=metadata,
            vocabulary=vocabulary,
        )


def _said(output: Any) -> dist.TorchDistribution:
    """Logits are a categorical's; a network without a head says where its hidden states are, with unit noise."""
    return categorical_last(output) if hasattr(output, "logits") else Gaussian()(output[0])


def _check_sequences(net: nn.Module, sequences: Tensor) -> None:
    if sequences.dim() != 2 or not sequences.numel():
        raise DataError(
            f"Calibration sequences of the shape {list(sequences.shape)} were given, but [n, T] is needed: cut "
            "the text into sequences of equal length."
        )
    check_tokens(sequences, vocabulary_size(net))
    longest = longest_input(net)
    if longest is not None and sequences.shape[1] > longest:
        raise DataError(
            f"Calibration sequences have {sequences.shape[1]} tokens, but {type(net).__name__} takes at most "
            f"{longest}: cut the text into shorter ones."
        )
