"""Compression of a transformer in one call, block after block, without fine-tuning it as a whole."""

from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pyro.distributions as dist
import torch
from torch import Tensor, nn

from sqs_pyro.atomic import check_place, resolved
from sqs_pyro.compression.blockwise.blocks import BlockwiseResult, compress_blocks
from sqs_pyro.compression.blockwise.recipe import WITHOUT_EFFECT, BlockwiseRecipe
from sqs_pyro.compression.blockwise.store import BlockRecord
from sqs_pyro.compression.blockwise.vocabulary import vocabulary_of
from sqs_pyro.compression.precision import warn_of_slow_precision
from sqs_pyro.errors import DataError, NetworkError, RecipeError
from sqs_pyro.inference.findings import Finding, finding
from sqs_pyro.isolation import isolated
from sqs_pyro.models.likelihoods import Gaussian, categorical_last
from sqs_pyro.networks.architecture import Architecture
from sqs_pyro.networks.architectures import architecture_of, is_known, layer_groups, stack_paths
from sqs_pyro.networks.calling import device_of
from sqs_pyro.networks.checks import check_network, check_replaceable
from sqs_pyro.networks.linear_form import LinearForm, Reached, every_token_to_every_expert, in_linear_form
from sqs_pyro.networks.residency import Residency
from sqs_pyro.networks.structure import found_by_structure
from sqs_pyro.networks.tokens import check_tokens, longest_input, vocabulary_size
from sqs_pyro.ranks import ranks
from sqs_pyro.recipes import parse
from sqs_pyro.resources import enough_resources


@enough_resources("Compression", "give fewer sequences, or lower batch_size, or raise the limit")
def compress_transformer(
    net: nn.Module,
    sequences: Tensor | Mapping[str, Tensor],
    recipe: BlockwiseRecipe | Mapping[str, Any] | None = None,
    *,
    directory: str | Path | None = None,
    plan_directory: str | Path | None = None,
    residency: Residency | None = None,
    progress: Callable[[BlockRecord], None] | None = None,
    finishing: Callable[[int, int, float], None] | None = None,
    metadata: Mapping[str, Any] | None = None,
) -> BlockwiseResult:
    """Compress embedding, head and the blocks' linear layers of a transformers network from unlabelled text.

    Where torch.distributed has been started all ranks call this with the same arguments and share the work; the
    file is the same, byte for byte, as that of one.

    Args:
        net: of an architecture that :mod:`~sqs_pyro.networks.architectures` knows or
            :func:`~sqs_pyro.networks.architectures.register_architecture` has added; of any other the blocks are
            :func:`found by structure <sqs_pyro.networks.structure.found_by_structure>`. It stays as it is.
        sequences: calibration text, int64 ``[n, T]``, say of :func:`~sqs_pyro.data.tokens.token_sequences` or
            :func:`~sqs_pyro.data.generation.generate_calibration`. Of a network of images or sound what it takes
            in their place, ``[n, ...]``. Of one with several inputs, such as an encoder and a decoder, a mapping
            ``name -> [n, ...]`` of all of them.
        recipe: what to do, a :class:`BlockwiseRecipe` or a mapping of its keys.
        directory: where finished blocks are kept: the same call goes on behind them. They belong to this network,
            these sequences and this recipe: with others they are refused.
        plan_directory: where gradients are kept, which calls share that differ in `bits` or `megabytes` alone; as
            blocks if left out.
        residency: which weights are in memory; all of them if left out.
        progress: told of each finished block.
        finishing: told of each of `finish_steps`: done, all of them, and nats an example between the networks.
        metadata: written into the packed file.

    Returns:
        The packed network and a record of each block, on each rank.

    Raises:
        NetworkError, DataError, RecipeError, OutputError: one sentence that says what to repair.
        RankError: another rank has ended.
    """
    recipe = parse(BlockwiseRecipe, recipe or {}, "blockwise")
    if recipe.moving_steps or recipe.settle_steps or recipe.finish_steps:
        warn_of_slow_precision(recipe.precision, device_of(net))
    if recipe.streamed and residency is None:
        raise RecipeError(
            "Recipe key 'blockwise.streamed' is true, but this network is in memory: leave it out, or call "
            "compress_checkpoint with its directory."
        )
    # Before hours of work: can a block's file be made there?
    for place, name in ((directory, "block-000.pt"), (plan_directory, "plan.pt")):
        if place is not None and ranks().leads:  # others keep nothing
            check_place(Path(place) / name)
    (check_network if residency is None else check_replaceable)(net)  # others may have weights elsewhere
    metadata = {
        "recipe": recipe.model_dump(mode="json", exclude_defaults=True, exclude=WITHOUT_EFFECT),
        **(metadata or {}),
    }
    inputs = _checked_inputs(net, sequences)
    parts = zip(*(value.split(recipe.batch_size) for value in inputs.values()), strict=True)
    # Without a mask: sequences are cut to equal length, there is nothing to hide.
    minibatches = [dict(zip(inputs, part, strict=True)) for part in parts]
    with isolated(net, seed=recipe.seed), in_linear_form(net), every_token_to_every_expert() as reached:
        architecture, said = _architecture(net, minibatches[0])
        stacks = stack_paths(net, architecture)
        _check_residency(net, architecture, stacks, residency)
        _check_stacks(net, stacks, inputs)
        vocabulary = vocabulary_of(net, recipe, architecture)
        result = compress_blocks(
            net,
            [net.get_submodule(path) for stack in stacks for path in stack],
            partial(layer_groups, architecture=architecture),
            minibatches,
            recipe,
            likelihood=_said,
            stacks=list(map(len, stacks)),
            stepped_over=architecture.bare,
            directory=None if directory is None else resolved(directory),
            plan_directory=None if plan_directory is None else resolved(plan_directory),
            residency=residency,
            progress=progress,
            finishing=finishing,
            metadata=metadata,
            vocabulary=vocabulary,
            preceding=architecture.preceded,
        )
    return replace(result, findings=[*said, *result.findings, *_unreached(_of_all_ranks(reached))])


def _architecture(net: nn.Module, inputs: Mapping[str, Tensor]) -> tuple[Architecture, list[Finding]]:
    """Return the architecture of a network, and what is to be said of it."""
    if is_known(net):
        return architecture_of(net), []
    found = found_by_structure(net, inputs)
    return found.architecture, [finding("by_structure", None, 0.0, listed=str(found))]


def _of_all_ranks(reached: Reached) -> Reached:
    every = ranks().gathered(reached)
    paths = dict.fromkeys(path for each in every for path in each)
    return {path: sum((each[path] for each in every if path in each), torch.zeros(())) for path in paths}


def _unreached(reached: Reached) -> list[Finding]:
    """Return a finding of each mixture of which some experts were chosen for no token."""
    return [
        finding("unreached_experts", path, float((counts > 0).float().mean()), experts=", ".join(map(str, missed)))
        for path, counts in reached.items()
        if (missed := (counts == 0).nonzero().flatten().tolist())
    ]


def _said(output: Any) -> dist.TorchDistribution:
    """Logits are a categorical's; a network without a head says where its hidden states are, with unit noise."""
    if hasattr(output, "logits"):
        return categorical_last(output)
    # Of a pair of towers where each text and image is, not how the pairs of a minibatch compare.
    embeddings = [
        output[name] for name in ("text_embeds", "image_embeds") if getattr(output, name, None) is not None
    ]
    return Gaussian()(torch.cat(embeddings, -1) if embeddings else output[0])


def _checked_inputs(net: nn.Module, given: Tensor | Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return calibration inputs by their names."""
    name: str = getattr(net, "main_input_name", "input_ids")
    inputs = dict(given) if isinstance(given, Mapping) else {name: given}
    counts = {key: len(value) for key, value in inputs.items() if isinstance(value, Tensor) and value.dim()}
    if len(counts) < len(inputs) or not counts or len({*counts.values()}) > 1:
        raise DataError(
            f"Calibration inputs have {', '.join(f'{n} {key}' for key, n in counts.items()) or 'no'} examples: "
            "give as many of each."
        )
    for key, value in inputs.items():
        if key.endswith("input_ids"):
            _check_sequences(net, value)
        elif not value.numel() or not bool(value.isfinite().all()):
            raise DataError(f"Calibration input '{key}' is empty, or holds NaN or infinity: correct it.")
    return inputs


def _check_stacks(net: nn.Module, stacks: list[list[str]], inputs: Mapping[str, Tensor]) -> None:
    if len(stacks) > 1 and len(inputs) < 2:
        raise DataError(
            f"{type(net).__name__} has {len(stacks)} stacks of blocks, but calibration has only "
            f"{', '.join(inputs)}: give a mapping with the inputs of all, such as input_ids and decoder_input_ids."
        )


def _check_residency(
    net: nn.Module, architecture: Architecture, stacks: list[list[str]], residency: Residency | None
) -> None:
    """Check that a streamed network can be called block by block without the weights of other blocks."""
    plain = architecture.bare and len(stacks) == 1 and not any(isinstance(m, LinearForm) for m in net.modules())
    if residency is not None and not residency.whole and not plain:
        raise NetworkError(
            f"{type(net).__name__} cannot be streamed, as its blocks hand on more than a hidden state, stand in "
            "several stacks, or store linear layers in another form: set blockwise.streamed to false."
        )


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
