"""Runs on images: a trained network in, a packed file that runs out, and what was measured on the way."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from hashlib import file_digest
from pathlib import Path
from typing import Any

import torch
from torch import nn

from sqs_pyro.atomic import check_place, resolved
from sqs_pyro.compression.baseline import BaselineRecipe, EpochRecord
from sqs_pyro.compression.finetune.search import check_points
from sqs_pyro.data import Data, DataRecipe, ShiftedLoader, load_data, parse_shift
from sqs_pyro.data.recipe import HUB
from sqs_pyro.documents import shown
from sqs_pyro.errors import DataError, NetworkError, RecipeError, SQSError, first_line
from sqs_pyro.exporting.examples import first_rows
from sqs_pyro.fingerprint import Fingerprint, fingerprint, loader_fingerprint
from sqs_pyro.inference.diagnostics import inert_averaging
from sqs_pyro.integrations.image_directory import (
    check_class_order,
    image_network,
    is_directory,
    weights_digest,
)
from sqs_pyro.networks.calling import device_of, move_to, predictions, split_examples
from sqs_pyro.networks.registry import build_network, network_options
from sqs_pyro.networks.state import fp32_bytes, load_weights
from sqs_pyro.networks.tokens import vocabulary_size
from sqs_pyro.own_code import is_own
from sqs_pyro.recipes import parse
from sqs_pyro.reporting.uncertainty import Curves
from sqs_pyro.runs.bookkeeping import Clock, Progress, chosen_device, silent
from sqs_pyro.runs.directory import HISTORY, MADE_OF, METRICS, PACKED, check_output, run_directory, write_json
from sqs_pyro.runs.kinds import InputForm, OpenedFile, RunKind
from sqs_pyro.runs.measured import compress_and_measure, trained_or_kept
from sqs_pyro.runs.posterior import run_averaging, write_bounds
from sqs_pyro.runs.recipe import Goal, RunRecipe, load_recipe
from sqs_pyro.runs.report.pages import write_run_page
from sqs_pyro.runs.uncertainty.inputs import (
    foreign_inputs,
    foreign_recipe,
    has_labels,
    parse_shifts,
    shifted_inputs,
)
from sqs_pyro.runs.uncertainty.measured import averaging, measure_uncertainty
from sqs_pyro.tasks.metrics import data_objective
from sqs_pyro.tasks.objectives import objective
from sqs_pyro.tasks.task import judge, lost

__all__ = ["HISTORY", "PACKED", "RunRecipe", "load_recipe", "run"]


def run(
    recipe: RunRecipe,
    out_dir: str | Path,
    *,
    overwrite: bool = False,
    baselines_dir: str | Path | None = None,
    progress: Progress = silent,
) -> dict[str, Any]:
    """Train or find the baseline, compress it, write the packed file, and evaluate that file from disk.

    Everything that can be checked is checked before anything is trained. The finished directory holds
    ``packed.safetensors``, ``metrics.json``, ``bounds.json``, ``recipe.yaml`` with all defaults filled in,
    ``history.csv``, ``layers.json``, the pictures and ``report.html``. An interrupted run is taken up where
    it was by the same call.

    Args:
        recipe: what to do.
        out_dir: directory to make.
        overwrite: replace a finished run that is there.
        baselines_dir: where trained baselines are kept; ``baselines`` beside ``out_dir`` by default.
        progress: called often, for a progress bar.

    Returns:
        What ``metrics.json`` holds. Accuracies and calibration errors are fractions, NLL is in nats.

    Raises:
        SQSError: one sentence that says what is wrong with recipe, data, network or output directory.
    """
    out_dir = resolved(out_dir)
    baselines = resolved(baselines_dir) if baselines_dir is not None else out_dir.parent / "baselines"
    check_output(out_dir, recipe.as_yaml(), overwrite=overwrite)
    check_place(baselines / "kept.pt")  # any name will do: it is the place that is tried
    # The baseline's seed orders its data: runs of several seeds may share one baseline.
    data = load_data(recipe.data, recipe.baseline.seed)
    device = chosen_device(recipe.device)
    net = untrained_network(recipe, data).to(device)
    with run_directory(out_dir, recipe.as_yaml(), overwrite=overwrite) as directory:
        # Inside, so that one process at a time trains for this run, but kept outside: a failed run leaves it.
        epochs = give_weights(recipe, net, data, baselines, progress)
        data = load_data(recipe.data, recipe.seed)  # afresh: the same order whether a baseline was kept or not
        clock = Clock()
        metrics = _compress_and_measure(recipe, net, data, directory, clock, progress)
        baseline = sum(epoch.seconds for epoch in epochs)
        metrics["stage_seconds"] = {**clock.seconds, "baseline": baseline, "compression": metrics["seconds"]}
        write_json(directory / MADE_OF, made_of(recipe))
        write_json(directory / METRICS, metrics)
        write_run_page(directory)
    return metrics


def _compress_and_measure(
    recipe: RunRecipe, net: nn.Module, data: Data, directory: Path, clock: Clock, progress: Progress
) -> dict[str, Any]:
    judged = data_objective(recipe.data, data)
    result, metrics = compress_and_measure(
        recipe,
        recipe.compression,
        judged,
        net,
        data,
        directory,
        clock,
        progress,
        about=data.about,
        search=recipe.search,
    )
    if recipe.data.metric is not None:  # the task's own figure is compared by studies
        own = objective(data, recipe.data.ignore_index)
        metrics[f"{own.headline}_drop"] = lost(own, metrics["baseline"], metrics["compressed"])
    if recipe.averaging is not None:
        metrics |= run_averaging(recipe.averaging, result, data, recipe.seed, directory)
        at = metrics["averaged"]["temperature"], recipe.averaging.gate_temperature
        metrics["findings"] += [asdict(finding) for finding in inert_averaging(result.guide, *at)]
    clock.lap("evaluation")
    write_bounds(recipe.bounds, result, data.train, recipe.seed, directory, progress)
    clock.lap("bounds")
    return metrics


# ---- the fp32 network ----


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
    recipe: RunRecipe, net: nn.Module, data: Data, baselines: Path, tell: Progress
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
    return trained_or_kept(net, data.train, data.validation, section, kept, recipe.compression, tell, **how)


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


# ---- the kind ----


class Images(RunKind[RunRecipe]):
    """Networks of anyone's on images and other data; files may hold nothing of their recipe but its ``data``."""

    recipe = RunRecipe
    said = "a recipe of images"
    in_studies = True

    def run(
        self,
        recipe: RunRecipe,
        out_dir: str | Path,
        *,
        overwrite: bool = False,
        baselines_dir: str | Path | None = None,
        progress: Progress = silent,
    ) -> dict[str, Any]:
        """See :func:`run`."""
        return run(recipe, out_dir, overwrite=overwrite, baselines_dir=baselines_dir, progress=progress)

    def evaluate(
        self, file: OpenedFile, *, root: str | Path | None = None, shift: str | None = None
    ) -> dict[str, Any]:
        """Return accuracy and its like on the test images, as they are or shifted."""
        recipe = _data_at(file, root)
        if recipe.metric is not None and is_own(recipe.metric) and not file.given:  # a file never makes code run
            raise RecipeError(
                f"Packed file '{file.path}' is judged by code of its user, {shown(recipe.metric)}: give --data "
                "with a recipe that names it, such as the recipe.yaml of its run."
            )
        move = None if shift is None else parse_shift(shift)  # before anything is loaded
        net = file.load()
        data = load_data(recipe)
        check_fit(net, data)
        test = data.test if move is None else ShiftedLoader(data.test, move)
        return {
            "file": str(file.path),
            **data_objective(recipe, data).measure(net, test),
            "data": recipe.model_dump(mode="json"),
            "shift": shift,
            "size": file.size().to_dict(),
        }

    def uncertainty(
        self,
        file: OpenedFile,
        *,
        root: str | Path | None = None,
        foreign: Sequence[str] = (),
        shifts: Sequence[str] = (),
        draws: int | None = None,
    ) -> tuple[dict[str, Any], Mapping[str, Curves]]:
        """Return accuracy and its like, risk over coverage, and AUROCs against other inputs; and their curves."""
        recipe = _data_at(file, root)
        moves = parse_shifts(shifts)  # this and what follows before anything is loaded
        recipes = {source: foreign_recipe(source, recipe) for source in foreign}
        if recipe.task != "classification":
            raise DataError(
                f"'{file.path}' is of {recipe.task}, but uncertainty is told of classifiers: call "
                "sqs_pyro.evaluation.predictive in Python."
            )
        packed = file.load()
        net = averaging(packed, draws, file.path)
        data = load_data(recipe)
        check_fit(net, data)
        others = foreign_inputs(recipes, data)
        shifted = shifted_inputs(data, moves)
        labelled = {text: loader for text, loader in shifted.items() if has_labels(moves[text])}
        others |= {text: loader for text, loader in shifted.items() if text not in labelled}
        document, curves = measure_uncertainty(
            net, data, labelled, others, greedy=None if net is packed else packed
        )
        about = {"data": recipe.model_dump(mode="json"), "size": file.size().to_dict()}
        return {"file": str(file.path), **document, **about}, curves

    def example(self, net: nn.Module, file: OpenedFile) -> tuple[Any, str]:
        """Return the first test images."""
        return first_rows(load_data(_data(file)).test)

    def input_form(
        self,
        net: nn.Module,
        file: OpenedFile,
        image_shape: tuple[int, ...] | None,
        lengths: Sequence[int],
    ) -> InputForm:
        """Return the form of images as large as the data's."""
        if image_shape is not None:
            return InputForm((image_shape,))
        if file.document.get("data") is None:
            if (words := vocabulary_size(net)) is not None:  # a Hugging Face directory's, which says nothing more
                return InputForm(tuple((length,) for length in lengths), words, masked=True)
            raise RecipeError(
                f"Packed file '{file.path}' does not say which data it is for: give --input-shape CxHxW."
            )
        try:
            return InputForm((load_data(_data(file)).input_shape,))
        except DataError as error:
            raise DataError(f"{error} Or give --input-shape CxHxW: no data is needed then.") from None

    def sized(self, recipe: RunRecipe, goal: Goal) -> dict[str, Any]:
        """Return the ratio of the file, or the search for it."""

        def size() -> int:
            return fp32_bytes(untrained_network(recipe, load_data(recipe.data, recipe.seed)))

        return goal.keys(size)

    def made_of(self, recipe: RunRecipe) -> Fingerprint:
        """See :func:`made_of`."""
        return made_of(recipe)

    def check_comparable(self, recipe: RunRecipe) -> None:
        """Check that classes are learned, whose accuracy studies compare."""
        if recipe.data.task != "classification":
            raise RecipeError(
                f"Recipe key 'base.data.task' is {recipe.data.task}, but studies compare accuracies: run each "
                "variant with `sqs compress`."
            )

    def baseline_key(self, recipe: RunRecipe) -> str:
        """Return the key of what is trained: network, data and training."""
        return recipe.baseline_key


def _data_at(file: OpenedFile, root: str | Path | None) -> DataRecipe:
    """Return the data of a file, in a directory of this machine."""
    recipe = _data(file)
    if root is None:
        return recipe
    if recipe.name == "digits" or recipe.name.startswith(HUB) or is_own(recipe.name):
        raise DataError(
            f"--root {root} is for data in a directory, but '{file.path}' is judged by {recipe.name}: leave it "
            "out."
        )
    return recipe.model_copy(update={"root": Path(root)})


def _data(file: OpenedFile) -> DataRecipe:
    if file.document.get("data") is None:
        raise RecipeError(f"Packed file '{file.path}' does not say which data it is for: give --data RECIPE.")
    # This section alone: a file made in Python may say no more, and the rest may be of an older version.
    recipe = parse(DataRecipe, file.document["data"], "data")
    if is_own(recipe.name) and not file.given:  # a file alone never makes code run
        raise RecipeError(
            f"Packed file '{file.path}' is judged by code of its user, {shown(recipe.name)}: give --data with "
            "that name."
        )
    return recipe
