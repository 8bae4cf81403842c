"""The fp32 network of a run: built, tried on its data, and given its weights."""

from hashlib import file_digest
from pathlib import Path
from typing import Any

import torch
from torch import nn

from sqs_pyro.compression.baseline import BaselineRecipe, EpochRecord
from sqs_pyro.compression.finetune.search import check_points
from sqs_pyro.data import Data, load_data
from sqs_pyro.errors import NetworkError, RecipeError, SQSError, first_line
from sqs_pyro.exporting.examples import first_rows
from sqs_pyro.fingerprint import Fingerprint, fingerprint, loader_fingerprint
from sqs_pyro.integrations.image_directory import (
    check_class_order,
    image_network,
    is_directory,
    weights_digest,
)
from sqs_pyro.loggers.logger import Log
from sqs_pyro.networks.calling import device_of, move_to, predictions, split_examples
from sqs_pyro.networks.registry import build_network, network_options
from sqs_pyro.networks.state import load_weights
from sqs_pyro.runs.bookkeeping import Progress
from sqs_pyro.runs.measured import file_metadata, trained_or_kept
from sqs_pyro.runs.recipe import RunRecipe
from sqs_pyro.tasks.metrics import data_objective
from sqs_pyro.tasks.objectives import objective
from sqs_pyro.tasks.task import judge


def untrained_network(recipe: RunRecipe, data: Data) -> nn.Module:
    """Return the untrained network; building and trying it finds what does not fit before hours are spent."""
    with torch.random.fork_rng(devices=[]):  # networks are built on the CPU: no GPU's state is drawn from
        torch.manual_seed(recipe.baseline.seed)
        net = _built(recipe, data)
    check_fit(net, data)
    data_objective(recipe.data, data)  # whether there is such a metric
    if recipe.search is not None and data.task == "classification":
        check_points(recipe.search, len(data.validation.dataset))
    if recipe.averaging is not None and data.task != "classification":
        raise RecipeError(f"Recipe key 'averaging' is for classes, but the data's task is {data.task}: remove it.")
    return net


def _built(recipe: RunRecipe, data: Data) -> nn.Module:
    """Return the network of a name, or of a Hugging Face directory, with its weights there."""
    name = recipe.network.name
    if not is_directory(name):
        return build_network(name, **_options(recipe, data))
    net = image_network(name, recipe.network.options, complete=recipe.baseline.trained)
    if recipe.baseline.trained:
        check_class_order(name, net, data.about.get("classes", ()))
    return net


def _options(recipe: RunRecipe, data: Data) -> dict[str, Any]:
    """Return the network's options; classes that the recipe does not say are counted."""
    name, options = recipe.network.name, recipe.network.options
    known = network_options(name)
    if "num_classes" in options or (known is not None and known.get("num_classes") in (None, data.num_classes)):
        return options  # what is the default anyway is not written into the file
    return {"num_classes": data.num_classes, **options}


def check_fit(net: nn.Module, data: Data) -> None:
    """Check that a network takes the data's inputs and gives what there is to learn: a logit to each class, say.

    Raises:
        NetworkError: it does not; the sentence says which shapes were met.
    """
    was_training = net.training
    # Two examples: a network that squeezes its batch away would pass with one.
    inputs = next(split_examples(first_rows(data.test)[0], 2))
    try:
        with torch.no_grad():
            output = predictions(net.eval(), move_to(inputs, device_of(net)))
    except (SQSError, MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # of anyone's network: vision transformers assert, or raise ValueError
        reason = first_line(error)
        grey = ", or repeat grey images with `data.channels: 3`" if data.input_shape[:1] == (1,) else ""
        raise NetworkError(
            f"The network does not take inputs of shape {tuple(data.input_shape)} ({reason}): correct the "
            f"network's options or the data{grey}."
        ) from None
    finally:
        net.train(was_training)
    objective(data).check(output, data)


def give_weights(
    recipe: RunRecipe, net: nn.Module, data: Data, baselines: Path, tell: Progress, log: Log
) -> list[EpochRecord]:
    """Train the network in place, or read its weights; a baseline that is kept already is not trained again.

    Returns:
        A record for every epoch of training, when ever that was; none for a checkpoint of the user's.
    """
    if recipe.baseline.trained:
        return []
    if recipe.baseline.checkpoint is not None:
        load_weights(net, recipe.baseline.checkpoint)
        return []
    section = BaselineRecipe(**recipe.baseline.model_dump(exclude={"checkpoint", "trained"}))
    kept = baselines / f"{recipe.baseline_key}{_of_directory(recipe)}.pt"  # of what is trained, whatever follows
    judged = data_objective(recipe.data, data)
    how: dict[str, Any] = {} if judged.loss is None else {"loss": judged.loss}
    how |= {"judge": judge(judged)} if how or recipe.data.metric is not None else {}
    told = file_metadata(recipe, data.about)
    parts = data.train, data.validation
    return trained_or_kept(net, *parts, section, kept, recipe.compression, told, tell, log, **how)


def made_of(recipe: RunRecipe) -> Fingerprint:
    """Return the fingerprint of data and weights that a recipe names: they are files, whose content may change.

    Raises:
        DataError: the data is not there.
    """
    data = load_data(recipe.data, recipe.seed)
    loaders = {"training": data.train, "validation": data.validation, "test": data.test}
    said = {
        f"{name} {key}": value
        for name, loader in loaders.items()
        for key, value in loader_fingerprint(loader).items()
    }
    weights = recipe.baseline.checkpoint  # without one the weights follow from recipe and data
    network = {} if weights is None else {str(weights): f"file digest {_digest(Path(weights))}"}
    if begins := _of_directory(recipe):
        network[recipe.network.name] = f"directory digest {begins[1:]}"
    return fingerprint({}, network, said)


def _of_directory(recipe: RunRecipe) -> str:
    """Return what tells networks that begin with a directory's weights from each other; empty of others."""
    name = recipe.network.name
    return f"-{weights_digest(name)}" if is_directory(name) else ""


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return file_digest(file, "sha256").hexdigest()[:16]  # against mistakes, not against forgers
