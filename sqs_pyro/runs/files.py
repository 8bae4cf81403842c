"""What can be said of a packed file alone: what it holds, and how well it does on its data."""

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from torch import nn

from sqs_pyro import load, size_report
from sqs_pyro.bench.machine import machine
from sqs_pyro.data import DataRecipe, ShiftedLoader, load_data, parse_shift
from sqs_pyro.documents import shown
from sqs_pyro.errors import DataError, PackedFileError, RecipeError
from sqs_pyro.evaluation.classification import evaluate
from sqs_pyro.integrations.pretrained import check_lengths, find_pretrained
from sqs_pyro.kernels.runtime import runtime_weights
from sqs_pyro.networks.tokens import vocabulary_size
from sqs_pyro.packing.file import read_packed
from sqs_pyro.recipes import parse
from sqs_pyro.runs.directory import PACKED
from sqs_pyro.runs.language_model_recipe import (
    LanguageModelRecipe,
    is_language_model,
    is_task,
    load_any_recipe,
    parse_any_recipe,
)
from sqs_pyro.runs.language_texts import judged, judging_streams, load_texts
from sqs_pyro.runs.network import check_fit
from sqs_pyro.runs.recipe import RunRecipe
from sqs_pyro.runs.task import task_text
from sqs_pyro.runs.task_recipe import TaskRecipe


def inspect_file(file: str | Path, *, runtime: bool = False) -> dict[str, Any]:
    """Describe a packed file to the byte, without building its network.

    Args:
        file: packed file.
        runtime: build it all the same, and say what its weights are on this machine's CPU.

    Returns:
        ``file``, ``format_version``, ``size`` (totals, bytes by part, one entry a tensor), ``metadata``; with
        ``runtime`` that, too: ``machine`` and ``weights``, see :class:`~sqs_pyro.kernels.runtime.RuntimeWeight`.

    Raises:
        PackedFileError: the file is missing, not an intact packed file, or does not say how to build its network.
        NetworkError: the network's checkpoint is missing.
    """
    path = existing_file(file)
    contents = read_packed(path)
    inspection: dict[str, Any] = {
        "file": str(path),
        "format_version": contents.format_version,
        "size": size_report(path).to_dict(),
        "metadata": contents.metadata,
    }
    if runtime:
        weights = [asdict(weight) for weight in runtime_weights(file_network(path))]
        inspection["runtime"] = {"machine": machine(), "weights": weights}
    return inspection


def file_network(file: str | Path) -> nn.Module:
    """The packed network of a file, built as its metadata says.

    Raises:
        PackedFileError: the file is missing, not intact, or does not say how to build its network.
        NetworkError: the network's checkpoint is missing.
    """
    path = existing_file(file)
    metadata = read_packed(path).metadata
    recipe = _stored_recipe(path, metadata)
    if metadata.get("network") is not None:
        return load(path)
    if is_language_model(recipe):
        whole = parse_any_recipe(recipe)
        assert isinstance(whole, LanguageModelRecipe)
        return load(path, find_pretrained(whole.network).unloaded_network())
    raise PackedFileError(
        f"Packed file '{path}' does not say how to build its network: in Python, load it with the network's "
        "constructor."
    )


def evaluate_file(
    file: str | Path,
    *,
    data_from: str | Path | None = None,
    root: str | Path | None = None,
    shift: str | None = None,
) -> dict[str, Any]:
    """Rebuild the network that a packed file names, and evaluate it on the test part of its data.

    A language model's file is judged by its perplexity, see :mod:`~sqs_pyro.runs.language_texts`, a task's by its
    figures.

    Args:
        file: packed file.
        data_from: recipe whose ``data`` section to use instead of the one in the file; of a language model,
            ``network``, ``text`` and ``evaluation``; of a task, ``network`` and ``data``.
        root: directory of the data set on this machine, instead of the recipe's.
        shift: what is done to the images first, see :func:`~sqs_pyro.data.shifts.parse_shift`.

    Returns:
        ``file``, ``accuracy``, ``nll``, ``ece``, ``brier``, ``entropy``, ``num_examples``, ``data``, ``shift``,
        ``size``. Of a language model ``file``, ``perplexity`` (by text), ``network``, ``size``. Of a task
        ``file``, its figures, ``task``, ``network``, ``data``, ``size``.

    Raises:
        PackedFileError: the file is missing, not intact, names no network, or belongs to another one.
        RecipeError: neither the file nor ``data_from`` says which data.
        DataError: the data is missing, the shift is unknown, or the file's network takes no images.
        NetworkError: the data does not fit the network, or the network's checkpoint is missing.
    """
    path = existing_file(file)
    whole = whole_recipe(path, data_from)
    if isinstance(whole, LanguageModelRecipe):
        _check_no_images(path, root, shift)
        return _evaluate_language_model(path, whole)
    if isinstance(whole, TaskRecipe):
        _check_no_images(path, root, shift)
        return _evaluate_task(path, whole)
    if root is not None and whole.name == "digits":
        raise DataError(
            f"--root {root} is for data in a directory, but '{path}' is judged by digits: leave it out."
        )
    recipe = whole if root is None else whole.model_copy(update={"root": Path(root)})
    move = None if shift is None else parse_shift(shift)
    net = load(path)
    data = load_data(recipe)
    check_fit(net, data)
    test = data.test if move is None else ShiftedLoader(data.test, move)
    return {
        "file": str(path),
        **asdict(evaluate(net, test)),
        "data": recipe.model_dump(mode="json"),
        "shift": shift,
        "size": size_report(path).to_dict(),
    }


def existing_file(file: str | Path) -> Path:
    """The path of a packed file that is there.

    Raises:
        PackedFileError: it is not.
    """
    path = Path(file)
    if path.is_dir():
        inside = path / PACKED
        hint = f"'{inside}'" if inside.is_file() else "the path of a file that `sqs` wrote"
        raise PackedFileError(f"'{path}' is a directory, not a packed file: give {hint}.")
    if not path.is_file():
        raise PackedFileError(f"Packed file '{path}' is not there: give the path of a file that `sqs` wrote.")
    return path


def whole_recipe(path: Path, data_from: str | Path | None) -> DataRecipe | LanguageModelRecipe | TaskRecipe:
    """Return which data a file is for: a section of a recipe, or all of one that names a checkpoint.

    Raises:
        RecipeError: neither the file nor ``data_from`` says so.
    """
    if data_from is not None:
        recipe = load_any_recipe(data_from)
        return recipe.data if isinstance(recipe, RunRecipe) else recipe
    stored = _stored_recipe(path, read_packed(path).metadata)
    if is_language_model(stored) or is_task(stored):
        whole = parse_any_recipe(stored)
        assert not isinstance(whole, RunRecipe)
        return whole
    if stored.get("data") is None:
        raise RecipeError(f"Packed file '{path}' does not say which data it is for: give --data RECIPE.")
    return parse(DataRecipe, stored["data"], "data")


def _stored_recipe(path: Path, metadata: Mapping[str, Any]) -> Mapping[str, Any]:
    """The recipe that a file holds, as it was written there; programs may write anything."""
    recipe = metadata.get("recipe") or {}
    if not isinstance(recipe, Mapping):
        raise PackedFileError(
            f"Packed file '{path}' holds {shown(recipe)} as its recipe, which is none: load it in Python with the "
            "network's constructor."
        )
    return recipe


def _check_no_images(path: Path, root: str | Path | None, shift: str | None) -> None:
    for option, value in (("--root", root), ("--shift", shift)):
        if value is not None:
            raise DataError(f"{option} {value} is for images, but '{path}' is judged by text: leave it out.")


def _evaluate_task(path: Path, recipe: TaskRecipe) -> dict[str, Any]:
    text = task_text(recipe)
    net = load(path)
    if recipe.task == "embedding":  # judged by the fp32 network
        text = text.observed(text.network())
    return {
        "file": str(path),
        **text.task.measure(net, text.loaders().test),
        "task": recipe.task,
        "network": recipe.network.model_dump(mode="json"),
        "data": recipe.data.model_dump(mode="json"),
        "size": size_report(path).to_dict(),
    }


def _evaluate_language_model(path: Path, recipe: LanguageModelRecipe) -> dict[str, Any]:
    found = find_pretrained(recipe.network)
    text, foreign = load_texts(recipe)
    net = load(path, found.unloaded_network())
    check_lengths(net, recipe)
    streams = judging_streams(recipe, text, foreign, found.tokenizer, vocabulary_size(net))
    return {
        "file": str(path),
        "perplexity": judged(net, streams, recipe.evaluation),
        "network": recipe.network.model_dump(mode="json"),
        "size": size_report(path).to_dict(),
    }
