"""What can be said of a packed file alone: what it holds, and how well it does on its data."""

from dataclasses import asdict
from pathlib import Path
from typing import Any

from sqs_pyro import load, size_report
from sqs_pyro.data import DataRecipe, ShiftedLoader, load_data, parse_shift
from sqs_pyro.errors import PackedFileError, RecipeError
from sqs_pyro.inference.evaluate import evaluate
from sqs_pyro.packing.file import read_packed
from sqs_pyro.recipe import parse
from sqs_pyro.runs.network import check_fit
from sqs_pyro.runs.recipe import load_recipe


def inspect_file(file: str | Path) -> dict[str, Any]:
    """Describe a packed file to the byte, without building its network.

    Returns:
        ``file``, ``format_version``, ``size`` (totals, bytes by part, one entry a tensor), ``metadata``.

    Raises:
        PackedFileError: the file is missing or not an intact packed file.
    """
    path = _existing(file)
    contents = read_packed(path)
    return {
        "file": str(path),
        "format_version": contents.format_version,
        "size": size_report(path).to_dict(),
        "metadata": contents.metadata,
    }


def evaluate_file(
    file: str | Path,
    *,
    data_from: str | Path | None = None,
    root: str | Path | None = None,
    shift: str | None = None,
) -> dict[str, Any]:
    """Rebuild the network that a packed file names, and evaluate it on the test part of its data.

    Args:
        file: packed file.
        data_from: recipe whose ``data`` section to use instead of the one in the file.
        root: directory of the data set on this machine, instead of the recipe's.
        shift: what is done to the images first, see :func:`~sqs_pyro.data.shifts.parse_shift`.

    Returns:
        ``file``, ``accuracy``, ``nll``, ``ece``, ``brier``, ``entropy``, ``num_examples``, ``data``, ``shift``,
        ``size``.

    Raises:
        PackedFileError: the file is missing, not intact, or names no network.
        RecipeError: neither the file nor ``data_from`` says which data.
        DataError: the data is missing, or the shift is unknown.
        NetworkError: the data does not fit the network.
    """
    path = _existing(file)
    recipe = _data_recipe(path, data_from, root)
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


def _existing(file: str | Path) -> Path:
    path = Path(file)
    if not path.is_file():
        raise PackedFileError(f"Packed file '{path}' is not there: give the path of a file that `sqs` wrote.")
    return path


def _data_recipe(path: Path, data_from: str | Path | None, root: str | Path | None) -> DataRecipe:
    if data_from is not None:
        recipe = load_recipe(data_from).data
    else:
        section = (read_packed(path).metadata.get("recipe") or {}).get("data")
        if section is None:
            raise RecipeError(f"Packed file '{path}' does not say which data it is for: give --data RECIPE.")
        recipe = parse(DataRecipe, section, "data")
    return recipe if root is None else recipe.model_copy(update={"root": Path(root)})
