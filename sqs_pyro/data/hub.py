"""Data sets of the Hugging Face hub, and copies of them that ``save_to_disk`` has made: images, or a table."""

import importlib
import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sqs_pyro.data.columns import targets_of
from sqs_pyro.data.files import Examples, listed
from sqs_pyro.data.image_folder import data_of_images, decoded, image_transforms
from sqs_pyro.data.prepared import load_examples
from sqs_pyro.data.recipe import HUB, DataRecipe
from sqs_pyro.data.splits import SPLIT_SEED, Data, held_out_size, stratified_split
from sqs_pyro.errors import DataError, first_line
from sqs_pyro.extras import needed_for

_VALIDATION = ("validation", "valid", "val", "dev")
_LABELS = ("label", "labels", "target", "class")
_MADE = ("dataset_dict.json", "state.json")
_TEST_SHARE = 5  # a fifth


def is_saved(directory: str | Path) -> bool:
    """Whether a directory is a data set that ``save_to_disk`` has made."""
    return any((Path(directory) / name).is_file() for name in _MADE)


def load_table(recipe: DataRecipe, seed: int) -> Data:
    """Make loaders over a data set: of its images and their classes, or of its columns as of a file.

    The split ``train`` is trained on. With ``validation`` and ``test``, the former is for choices; with one of
    them, that one is for the final figures. What is missing is held out, as of a file.

    Raises:
        DataError: there is no such data set, split or column, or a value is not what the task has.
        MissingPackageError: ``datasets`` is not installed.
    """
    parts = _parts(recipe, _splits(recipe))
    columns = parts["train"].features
    targets = recipe.targets or (_labels(columns),)
    images = [name for name, feature in columns.items() if type(feature).__name__ == "Image"]
    inputs = recipe.inputs or tuple(images[:1]) or tuple(name for name in columns if name not in targets)
    for key, names in (("inputs", inputs), ("targets", targets)):
        for name in names:
            if name not in columns:
                raise DataError(
                    f"'{recipe.name}' has no '{name}', which `{key}` asks for: it has {listed(columns)}."
                )
    if not set(inputs) & set(images):
        examples = {key: _examples(part, inputs, targets) for key, part in parts.items()}
        return load_examples(recipe, seed, **examples)
    return _of_images(recipe, seed, parts, inputs, targets)


class HubImages(torch.utils.data.Dataset[tuple[Any, int]]):
    """Images of a data set, prepared when they are asked for, and their classes.

    Args:
        rows: with the undecoded images.
        column: that has them.
        labels: ``[N]``.
        prepare: from an image to a tensor.
        where: they are from, for sentences.
    """

    def __init__(self, rows: Any, column: str, labels: Tensor, prepare: Any, where: str) -> None:
        self.rows, self.column, self.labels, self.prepare, self.where = rows, column, labels, prepare, where

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Any, int]:
        kept = self.rows[int(index)][self.column] or {}
        what = f"Image {index} of {self.where}"
        source = io.BytesIO(kept["bytes"]) if kept.get("bytes") is not None else kept.get("path")
        if source is None:
            raise DataError(f"{what} is missing: remove the row.")
        return self.prepare(decoded(source, what)), int(self.labels[index])


def _of_images(
    recipe: DataRecipe, seed: int, parts: Mapping[str, Any], inputs: Sequence[str], targets: Sequence[str]
) -> Data:
    where = f"'{recipe.name}'"
    if recipe.task != "classification" or len(inputs) > 1 or len(targets) > 1:
        raise DataError(
            f"{where} has images, of which a class each is learned: name one column as `inputs` and one as "
            "`targets`, without `task`."
        )
    with needed_for("Data sets of images"):
        datasets = importlib.import_module("datasets")
    given = [Examples({}, {targets[0]: np.asarray(part[targets[0]][:])}) for part in parts.values()]
    found, names = targets_of(recipe, given, where)
    labels = dict(zip(parts, found, strict=True))
    feature = parts["train"].features[targets[0]]
    classes = list(getattr(feature, "names", None) or names)
    train_as, plain = image_transforms(recipe)

    def images(key: str, prepare: Any, chosen: Tensor | None = None) -> HubImages:
        rows = parts[key].cast_column(inputs[0], datasets.Image(decode=False))
        if chosen is not None:
            rows = rows.select(chosen.tolist())
        return HubImages(rows, inputs[0], labels[key] if chosen is None else labels[key][chosen], prepare, where)

    kept, held = torch.arange(len(labels["train"])), {}
    for key in ("test", "validation"):  # the test first: it must not depend on how many are held out for choices
        if key not in parts:
            count = len(kept) // _TEST_SHARE if key == "test" else held_out_size(recipe, len(kept))
            left, out = stratified_split(labels["train"][kept], max(count, 1), SPLIT_SEED)
            kept, held[key] = kept[left], kept[out]
    others = [
        images("train", plain, held[key]) if key in held else images(key, plain) for key in ("validation", "test")
    ]
    sets = images("train", train_as, kept), *others
    count = len(classes) or int(labels["train"].max()) + 1
    return data_of_images(recipe, seed, sets, count, classes, where)


def _splits(recipe: DataRecipe) -> Mapping[str, Any]:
    """Return the splits of the data set, by name; one without splits is all ``train``."""
    with needed_for(f"Data sets such as '{recipe.name}'", otherwise="give a file or a directory of images"):
        datasets = importlib.import_module("datasets")  # heavy, and only needed here
    if recipe.name.startswith(HUB):
        name = recipe.name.removeprefix(HUB)
        try:
            found = datasets.load_dataset(name, **recipe.options)
        except Exception as error:  # whatever its transport raises
            raise DataError(
                f"Data set '{name}' could not be loaded from the Hugging Face hub ({first_line(error)}): check "
                "its name, data.options and the connection, or give the directory of a copy."
            ) from error
    else:
        path = Path(recipe.name) if recipe.root is None else recipe.root / recipe.name
        if not is_saved(path):
            raise DataError(
                f"'{path}' is no directory of a data set that save_to_disk made: correct the path, write hub/NAME "
                "for one of the hub, or give a directory of images as `root` of image_folder."
            )
        try:
            found = datasets.load_from_disk(str(path))
        except Exception as error:  # pyarrow's, and the system's own
            raise DataError(f"'{path}' cannot be read ({first_line(error)}): save it anew.") from error
    return found if isinstance(found, Mapping) else {"train": found}


def _parts(recipe: DataRecipe, splits: Mapping[str, Any]) -> dict[str, Any]:
    """Return what there is for training and, if it is there, for choices and for the final figures."""
    where, train = f"'{recipe.name}'", splits.get("train")
    if train is None and len(splits) == 1:
        train = next(iter(splits.values()))
    if train is None:
        raise DataError(f"{where} has no split 'train': it has {listed(splits)}.")
    asked = None if recipe.test is None else str(recipe.test)
    if asked is not None and asked not in splits:
        raise DataError(f"{where} has no split '{asked}', which `test` asks for: it has {listed(splits)}.")
    test = asked or ("test" if "test" in splits else None)
    validation = next((name for name in _VALIDATION if name in splits and name != test), None)
    if test is None:
        test, validation = validation, None
    found = {"train": train, "validation": splits.get(validation or ""), "test": splits.get(test or "")}
    return {key: part for key, part in found.items() if part is not None}


def _labels(columns: Mapping[str, Any]) -> str:
    """Return the column that has classes, or is called so; otherwise the last."""
    classes = [name for name, feature in columns.items() if type(feature).__name__ == "ClassLabel"]
    called = [name for name in _LABELS if name in columns]
    return [*classes[:1], *called, *reversed(list(columns))][0]


def _examples(part: Any, inputs: Sequence[str], targets: Sequence[str]) -> Examples:
    def read(names: Sequence[str]) -> dict[str, Any]:
        return {name: np.asarray(part[name][:]) for name in names}

    return Examples(read(inputs), read(targets))
