"""Inputs that a network was not trained for: its own ones shifted, and those of other data sets."""

from collections.abc import Sequence
from pathlib import Path

from sqs_pyro.data import Data, DataRecipe, Loader, ShiftedLoader, load_data, parse_shift
from sqs_pyro.data.recipe import IMAGE_SETS
from sqs_pyro.data.shifts import Resized, Shift, UniformNoise
from sqs_pyro.documents import read_yaml
from sqs_pyro.errors import DataError
from sqs_pyro.recipes import parse


def parse_shifts(shifts: Sequence[str]) -> dict[str, Shift]:
    """Return shifts by their texts, see :func:`~sqs_pyro.data.shifts.parse_shift`."""
    return {text: parse_shift(text) for text in shifts}


def has_labels(shift: Shift) -> bool:
    """Return whether shifted inputs are still of their classes."""
    return not isinstance(shift, UniformNoise)


def shifted_inputs(data: Data, shifts: dict[str, Shift]) -> dict[str, Loader]:
    """Return the test data under each shift."""
    return {text: ShiftedLoader(data.test, shift) for text, shift in shifts.items()}


def foreign_recipe(source: str, data: DataRecipe) -> DataRecipe:
    """Return the data that a text of the command line means.

    Args:
        source: the name of a data set, the directory of an image folder, or a YAML recipe with a section ``data``.
        data: the network's own.

    Raises:
        DataError: it is none of them, or the network's own data.
        RecipeError: the recipe is wrong.
    """
    path = Path(source)
    if source in IMAGE_SETS:
        foreign = parse(DataRecipe, {"name": source}, "data")
    elif path.is_dir():
        foreign = DataRecipe(name="image_folder", root=path)
    elif path.is_file():
        document = read_yaml(path)
        section = document.get("data") if isinstance(document, dict) else None
        foreign = parse(DataRecipe, section or {}, "data")
    else:
        raise DataError(
            f"--foreign {source} is neither a data set ({', '.join(IMAGE_SETS)}) nor an image folder nor a recipe "
            "with a section 'data': correct it."
        )
    if (foreign.name, foreign.root) == (data.name, data.root):
        raise DataError(f"--foreign {source} is the data of the file itself: give another, or --shift.")
    return foreign


def foreign_inputs(recipes: dict[str, DataRecipe], data: Data) -> dict[str, Loader]:
    """Return the test images of other data sets, in the shape of the network's own.

    Raises:
        DataError: a data set is missing.
    """
    shape = Resized(data.input_shape)
    return {source: ShiftedLoader(load_data(recipe).test, shape) for source, recipe in recipes.items()}
