"""Recipes, and packed files, of networks on images and other data that is no text."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import nn

from sqs_pyro.data import DataRecipe, ShiftedLoader, load_data, parse_shift
from sqs_pyro.data.recipe import HUB
from sqs_pyro.documents import shown
from sqs_pyro.errors import DataError, RecipeError
from sqs_pyro.exporting.examples import first_rows
from sqs_pyro.fingerprint import Fingerprint
from sqs_pyro.networks.state import fp32_bytes
from sqs_pyro.networks.tokens import vocabulary_size
from sqs_pyro.own_code import is_own
from sqs_pyro.recipes import parse
from sqs_pyro.reporting.uncertainty import Curves
from sqs_pyro.runs.bookkeeping import Progress, silent
from sqs_pyro.runs.images.network import check_fit, made_of, untrained_network
from sqs_pyro.runs.images.pipeline import run
from sqs_pyro.runs.kinds import InputForm, OpenedFile, RunKind
from sqs_pyro.runs.recipe import Goal, RunRecipe
from sqs_pyro.runs.uncertainty.inputs import (
    foreign_inputs,
    foreign_recipe,
    has_labels,
    parse_shifts,
    shifted_inputs,
)
from sqs_pyro.runs.uncertainty.measured import averaging, measure_uncertainty
from sqs_pyro.tasks.metrics import data_objective


class Images(RunKind[RunRecipe]):
    """Networks of anyone's on images and other data; files may hold nothing of their recipe but its ``data``."""

    recipe = RunRecipe
    said = "a recipe of images"
    in_studies = True
    on_ranks = True

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
