"""Where the network of a run comes from: its constructor, its data, its fp32 weights."""

import copy
from pathlib import Path
from typing import Any

import torch
from torch import nn

from sqs_pyro.compression.baseline import BaselineRecipe, EpochRecord, train_baseline
from sqs_pyro.compression.finetune.recipe import CompressionRecipe
from sqs_pyro.data import Data
from sqs_pyro.errors import NetworkError
from sqs_pyro.inference.site_guide import check_codebooks
from sqs_pyro.models.bayesian import BayesianNetwork
from sqs_pyro.networks.calling import device_of, predictions
from sqs_pyro.networks.registry import build_network
from sqs_pyro.networks.state import load_weights
from sqs_pyro.runs.directory import in_turn
from sqs_pyro.runs.progress import Progress
from sqs_pyro.runs.recipe import RunRecipe


def untrained_network(recipe: RunRecipe, data: Data) -> nn.Module:
    """The untrained network; building and trying it finds what does not fit before hours are spent."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(recipe.baseline.seed)
        net = build_network(recipe.network.name, **recipe.network.options)
    check_fit(net, data)
    return net


def check_compressible(net: nn.Module, recipe: CompressionRecipe) -> None:
    """Check that a network has layers to compress, and weights enough in each for its codebook.

    Raises:
        NetworkError, RecipeError: it has not; the sentence names the layer.
    """
    model = BayesianNetwork(copy.deepcopy(net), include=recipe.include, exclude=recipe.exclude)
    for name, weight in model.site_values().items():
        check_codebooks(name, weight.shape, recipe.num_components, recipe.groups)


def check_fit(net: nn.Module, data: Data) -> None:
    """Check that a network takes the data's inputs and gives a logit to each of its classes.

    Raises:
        NetworkError: it does not; the sentence says which shapes were met.
    """
    was_training = net.training
    try:
        with torch.no_grad():
            logits = predictions(net.eval(), torch.zeros(2, *data.input_shape, device=device_of(net)))
    except RuntimeError as error:
        reason = str(error).splitlines()[0]
        raise NetworkError(
            f"The network does not take inputs of shape {tuple(data.input_shape)} ({reason}): correct the "
            "network's options or the data."
        ) from None
    finally:
        net.train(was_training)
    if tuple(logits.shape) != (2, data.num_classes):
        raise NetworkError(
            f"The network gives outputs of shape {tuple(logits.shape[1:])}, but the data has "
            f"{data.num_classes} classes: correct the network's options, such as num_classes."
        )


def give_weights(
    recipe: RunRecipe, net: nn.Module, data: Data, baselines: Path, tell: Progress
) -> list[EpochRecord]:
    """Train the network in place, or read its weights; a baseline that is kept already is not trained again.

    Returns:
        A record for every epoch of training, when ever that was; none for a checkpoint of the user's.
    """
    if recipe.baseline.checkpoint is not None:
        load_weights(net, recipe.baseline.checkpoint)
        return []
    section = BaselineRecipe(**recipe.baseline.model_dump(exclude={"checkpoint"}))
    kept = baselines / f"{recipe.baseline_key}.pt"
    return trained_or_kept(net, data.train, data.validation, section, kept, recipe.compression, tell)


def trained_or_kept(
    net: nn.Module,
    train: Any,
    validation: Any,
    section: BaselineRecipe,
    kept: Path,
    compression: CompressionRecipe,
    tell: Progress,
    **options: Any,
) -> list[EpochRecord]:
    """Train a network in place, or take the weights that an earlier call has kept.

    Args:
        net: to train.
        train, validation: minibatches.
        section: how to train.
        kept: file of the trained weights, or of an interrupted training's.
        compression: what follows; whether the network can be compressed is checked first.
        tell: told of epochs.
        options: ``loss`` and ``judge`` of :func:`~sqs_pyro.compression.baseline.train_baseline`.

    Returns:
        A record for every epoch of training, when ever that was.
    """

    def progress(record: EpochRecord) -> None:
        judged = "" if record.validation_accuracy is None else f"validation {record.validation_accuracy:.2%}, "
        tell("baseline", record.epoch, section.epochs, f"{judged}loss {record.loss:.3f}")

    if not kept.exists():
        check_compressible(net, compression)  # compression checks this too, but after hours of training
    with in_turn(kept.with_suffix(".lock")):  # runs side by side share one baseline: the first trains it
        return train_baseline(net, train, validation, section, checkpoint=kept, progress=progress, **options)
