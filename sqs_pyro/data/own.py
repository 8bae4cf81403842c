"""Data that a function of the user's own returns: loaders, data sets or arrays."""

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Subset

from sqs_pyro.data.columns import num_classes
from sqs_pyro.data.files import Examples
from sqs_pyro.data.image_folder import EpochDataLoader
from sqs_pyro.data.prepared import load_examples
from sqs_pyro.data.recipe import DataRecipe
from sqs_pyro.data.splits import SPLIT_SEED, Data, held_out_size, stratified_split
from sqs_pyro.documents import shown
from sqs_pyro.errors import DataError, SQSError, said
from sqs_pyro.networks.calling import tensors_in
from sqs_pyro.networks.minibatches import split_minibatch
from sqs_pyro.own_code import own_function

_PARTS = ("train", "validation", "test")
_FORM = (
    "return a mapping with 'train', 'test' and, of loaders, 'validation': loaders, data sets, or pairs of arrays; "
    "or a sqs_pyro.data.Data"
)


def load_own(recipe: DataRecipe, seed: int) -> Data:
    """Call a user's function, and make of what it returns what is trained and judged on.

    The function returns a :class:`~sqs_pyro.data.splits.Data`, or a mapping with ``train``, ``test`` and, if it
    likes, ``validation`` and ``num_classes``. Each part is a loader of minibatches, which is used as it is; a data
    set of examples ``(x, y)``, of which minibatches are made; or a pair of arrays ``(x, y)``, which are treated as
    those of a file. Without ``validation`` some of the training examples are held out, of a loader none can be.

    Args:
        recipe: its ``name`` is the function's, its ``options`` are keyword arguments.
        seed: of the order of what is no loader.

    Raises:
        RecipeError: there is no such function.
        DataError: it fails, or returns something else.
    """
    function = own_function(recipe.name, "Data")
    try:
        made = function(**recipe.options)
    except SQSError:
        raise
    except Exception as error:  # of the user's code
        raise DataError(
            f"Data {recipe.name!r} fails with the options {shown(recipe.options)} ({said(error)}): correct it."
        ) from error
    if isinstance(made, Data):
        return made
    if not isinstance(made, Mapping) or not {"train", "test"} <= made.keys():
        raise DataError(f"Data {recipe.name!r} returns {shown(made)}, but should {_FORM}.")
    if all(_is_pair(made[key]) for key in _PARTS if key in made):
        parts = {key: _examples(made[key], recipe, key) for key in _PARTS if key in made}
        return load_examples(recipe, seed, parts["train"], parts["test"], parts.get("validation"))
    return _of_loaders(recipe, seed, made)


def _is_pair(part: Any) -> bool:
    return isinstance(part, tuple) and len(part) == 2 and all(hasattr(each, "shape") for each in part)


def _examples(pair: tuple[Any, Any], recipe: DataRecipe, key: str) -> Examples:
    x, y = (each.numpy(force=True) if isinstance(each, Tensor) else np.asarray(each) for each in pair)
    if len(x) != len(y):
        raise DataError(
            f"Data {recipe.name!r} has {len(x)} inputs and {len(y)} targets for '{key}': make them equal."
        )
    return Examples({"x": x}, {"y": y})


def _of_loaders(recipe: DataRecipe, seed: int, made: Mapping[str, Any]) -> Data:
    for key in _PARTS:
        if key in made and not (_is_loader(made[key]) or _is_set(made[key])):
            raise DataError(f"Data {recipe.name!r} returns {shown(made[key])} as '{key}', but should {_FORM}.")
    train, validation = made["train"], made.get("validation")
    if validation is None:
        train, validation = _held_out(recipe, train)
    loaders = {"train": train, "validation": validation, "test": made["test"]}
    ready = {key: _loader(recipe, part, key, seed) for key, part in loaders.items()}
    x, y = split_minibatch(next(iter(ready["test"])))
    tensors = tensors_in(x)
    return Data(
        **ready,
        num_classes=_counted(recipe, made, ready["train"], y),
        input_shape=tuple(tensors[0].shape[1:]) if len(tensors) == 1 else (),
        name=recipe.name,
        task=recipe.task,
    )


def _held_out(recipe: DataRecipe, train: Any) -> tuple[Any, Any]:
    if _is_loader(train):
        raise DataError(
            f"Data {recipe.name!r} returns loaders without 'validation': return one, for every choice."
        )
    size = len(train)
    kept, held_out = stratified_split(
        torch.zeros(size, dtype=torch.int64), held_out_size(recipe, size), SPLIT_SEED
    )
    return Subset(train, kept.tolist()), Subset(train, held_out.tolist())


def _is_loader(part: Any) -> bool:
    return hasattr(part, "dataset") and hasattr(part, "__iter__")


def _is_set(part: Any) -> bool:
    return hasattr(part, "__getitem__") and hasattr(part, "__len__")


def _loader(recipe: DataRecipe, part: Any, key: str, seed: int) -> Any:
    if _is_loader(part):
        return part
    options: dict[str, Any] = {"batch_size": recipe.batch_size, "num_workers": recipe.num_workers}
    if key != "train":
        return EpochDataLoader(part, **options)
    if len(part) < recipe.batch_size:
        raise DataError(
            f"Data {recipe.name!r} leaves {len(part)} examples to train on, fewer than a minibatch of "
            f"{recipe.batch_size}: lower `batch_size`."
        )
    return EpochDataLoader(part, seed=seed, shuffle=True, drop_last=True, **options)


def _counted(recipe: DataRecipe, made: Mapping[str, Any], train: Any, y: Tensor) -> int:
    """Return how many classes, labels or numbers there are: as the function or its data set says, or counted."""
    if "num_classes" in made:
        return int(made["num_classes"])
    if recipe.task in ("multilabel", "regression"):
        return 1 if y.dim() < 2 else int(y.shape[1])
    inside = train.dataset
    while isinstance(inside, Subset):
        inside = inside.dataset
    if recipe.task == "classification" and hasattr(inside, "classes"):  # torchvision's data sets have it
        return len(inside.classes)
    labels = getattr(inside, "tensors", [None])[-1]
    if not isinstance(labels, Tensor):
        labels = getattr(inside, "targets", getattr(inside, "labels", None))
    if labels is None:
        raise DataError(
            f"Data {recipe.name!r} does not say how many classes there are: return 'num_classes' beside 'train'."
        )
    return num_classes(recipe, torch.as_tensor(labels).long())
