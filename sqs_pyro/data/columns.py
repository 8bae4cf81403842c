"""Arrays and columns as tensors that a network takes, and that a task has as its targets."""

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sqs_pyro.data.files import Array, Examples, listed
from sqs_pyro.data.recipe import DataRecipe
from sqs_pyro.documents import shown
from sqs_pyro.errors import DataError

_EXAMPLES_A_CLASS = 3  # fewer on average are numbers, or a column that tells examples apart


def inputs_of(examples: Examples, where: str) -> Tensor:
    """Return inputs as the network takes them, but not yet standardised.

    One array stays as it is: bytes are images, ``[N, H, W]`` or with channels first or last, and get channels
    first; whole numbers are tokens. Columns are put beside each other, float32 ``[N, columns]``.

    Raises:
        DataError: a value is no finite number.
    """
    if len(examples.inputs) == 1:
        (array,) = examples.inputs.values()
        if array.ndim > 1:
            return _array(array, where)
    columns = [_numbers(array, name, where) for name, array in examples.inputs.items()]
    return torch.stack(columns, 1)


def _array(array: Array, where: str) -> Tensor:
    if array.dtype == np.uint8:
        if array.ndim == 3:
            array = array[:, None]
        elif array.ndim == 4 and array.shape[3] in (1, 3, 4) and array.shape[1] not in (1, 3, 4):
            array = array.transpose(0, 3, 1, 2)
        return torch.from_numpy(np.ascontiguousarray(array))
    if array.dtype.kind in "iu":
        return torch.from_numpy(array.astype(np.int64))
    if array.dtype.kind not in "fb":
        raise DataError(f"Inputs of {where} are {array.dtype}, but should be numbers: convert them.")
    return _finite(torch.from_numpy(np.ascontiguousarray(array)).float(), f"Inputs of {where}")


def _numbers(array: Array, name: str, where: str) -> Tensor:
    try:
        values = array.astype(np.float64)
    except (ValueError, TypeError):
        wrong = next((value for value in array.tolist() if not _is_number(value)), array[0])
        raise DataError(
            f"Column '{name}' of {where} holds {shown(wrong)}, which is no number: leave it out of "
            "`inputs`, or make numbers of it."
        ) from None
    if values.ndim != 1:
        raise DataError(f"Column '{name}' of {where} holds lists: make a column of each number.")
    return _finite(torch.from_numpy(values).float(), f"Column '{name}' of {where}")  # inf where it is too large


def _is_number(value: Any) -> bool:
    try:
        return math.isfinite(float(value))
    except (TypeError, ValueError):
        return False


def _finite(values: Tensor, what: str) -> Tensor:
    wrong = ~values.isfinite().flatten(1).all(1) if values.dim() > 1 else ~values.isfinite()
    if wrong.any():
        raise DataError(
            f"{what}: {int(wrong.sum())} of {len(wrong)} examples have values that are NaN or infinite, the first "
            f"is example {int(wrong.nonzero()[0])}: remove or repair them."
        )
    return values


def targets_of(recipe: DataRecipe, parts: Sequence[Examples], where: str) -> tuple[list[Tensor], tuple[str, ...]]:
    """Return targets as the task has them, of the training examples and of others, and the names of classes.

    Classes are whole numbers from 0, or names, which are numbered in alphabetical order; several labels are zeros
    and ones; numbers are float32 ``[N, targets]``; labels of pixels or tokens are whole numbers from 0, or the one
    to ignore.

    Raises:
        DataError: they are not what the task has.
    """
    return _TARGETS[recipe.task](recipe, parts, where)


def _classes(recipe: DataRecipe, parts: Sequence[Examples], where: str) -> tuple[list[Tensor], tuple[str, ...]]:
    found = [_only(part.targets, where, "classification") for part in parts]
    if any(array.ndim != 1 for array in found):
        if all(array.ndim == 2 and array.shape[1] == 1 for array in found):
            found = [array[:, 0] for array in found]
        else:
            raise DataError(
                f"Targets of {where} have the shape {list(found[0].shape)}, but a class is one number or name an "
                "example: give `task: multilabel`, `regression` or `segmentation`."
            )
    numbers = [_whole(array) for array in found]
    if all(number is not None for number in numbers):
        labels = [number for number in numbers if number is not None]
        lowest = min(int(each.min()) for each in labels)
        if lowest < 0:
            raise DataError(f"Classes of {where} begin at {lowest}, but are numbered from 0: renumber them.")
        _check_classes(found[0], where)
        _check_known(labels, int(labels[0].max()) + 1, where)
        return labels, ()
    names = _check_classes(found[0], where)
    index = {name: number for number, name in enumerate(names)}
    for array in found[1:]:
        strange = {str(value) for value in array.tolist()} - index.keys()
        if strange:
            raise DataError(
                f"Other examples of {where} have classes that training has not: {listed(sorted(strange))}."
            )
    return [torch.tensor([index[str(value)] for value in array.tolist()]) for array in found], tuple(names)


def _check_classes(array: Array, where: str) -> list[str]:
    """Check that training targets are classes, each met again and again; return their names, sorted."""
    names = sorted({str(value) for value in array.tolist()})
    if _EXAMPLES_A_CLASS * len(names) > len(array):
        raise DataError(
            f"Targets of {where} have {len(names)} different values in {len(array)} examples, the first "
            f"{shown(array.tolist()[0])}, which are no classes: give `task: regression`, or another column."
        )
    return names


def _check_known(labels: Sequence[Tensor], classes: int, where: str) -> None:
    for each in labels[1:]:
        if len(each) and int(each.max()) >= classes:
            raise DataError(
                f"Other examples of {where} have the class {int(each.max())}, but those of training end at "
                f"{classes - 1}: a class that is only met later cannot have been learned."
            )


def _several(recipe: DataRecipe, parts: Sequence[Examples], where: str) -> tuple[list[Tensor], tuple[str, ...]]:
    found = [_matrix(part.targets, where) for part in parts]
    for each in found:
        if not bool(((each == 0) | (each == 1)).all()):
            odd = float(each[(each != 0) & (each != 1)][0])
            raise DataError(f"Targets of {where} hold {odd:g}, but several labels at once are zeros and ones.")
    return found, tuple(parts[0].targets) if len(parts[0].targets) > 1 else ()


def _real(recipe: DataRecipe, parts: Sequence[Examples], where: str) -> tuple[list[Tensor], tuple[str, ...]]:
    return [_matrix(part.targets, where) for part in parts], tuple(parts[0].targets)


def _dense(recipe: DataRecipe, parts: Sequence[Examples], where: str) -> tuple[list[Tensor], tuple[str, ...]]:
    found = []
    for part in parts:
        labels = _whole(_only(part.targets, where, "segmentation"))
        if labels is None or labels.dim() < 2:
            raise DataError(
                f"Targets of {where} should be a class for each pixel or token, whole numbers [N, H, W] or [N, "
                f"T], but are {shown(_only(part.targets, where, 'segmentation'))}."
            )
        odd = labels[(labels < 0) & (labels != recipe.ignore_index)]
        if len(odd):
            raise DataError(
                f"Targets of {where} hold {int(odd[0])}, which is no class: if it counts for nothing, give "
                f"`ignore_index: {int(odd[0])}`."
            )
        found.append(labels)
    _check_known([each[each != recipe.ignore_index] for each in found], num_classes(recipe, found[0]), where)
    return found, ()


_TARGETS: dict[str, Callable[[DataRecipe, Sequence[Examples], str], tuple[list[Tensor], tuple[str, ...]]]] = {
    "classification": _classes,
    "multilabel": _several,
    "regression": _real,
    "segmentation": _dense,
}


def num_classes(recipe: DataRecipe, targets: Tensor) -> int:
    """Return how many classes, labels or numbers the training targets have: what a network puts out."""
    if recipe.task in ("multilabel", "regression"):
        return targets.shape[1]
    counted = targets[targets != recipe.ignore_index] if recipe.task == "segmentation" else targets
    return int(counted.max()) + 1 if len(counted) else 0


def _only(targets: dict[str, Array], where: str, task: str) -> Array:
    if len(targets) > 1:
        raise DataError(
            f"`targets` of {where} names {listed(targets)}, but {task} has one target: name one, or give `task: "
            "multilabel` or `regression`."
        )
    return next(iter(targets.values()))


def _matrix(targets: dict[str, Array], where: str) -> Tensor:
    arrays = list(targets.items())
    if len(arrays) == 1 and arrays[0][1].ndim == 2:
        name, array = arrays[0]
        return torch.stack([_numbers(array[:, i], name, where) for i in range(array.shape[1])], 1)
    return torch.stack([_numbers(array, name, where) for name, array in arrays], 1)


def _whole(array: Array) -> Tensor | None:
    """Return whole numbers, be they written as text; None: they are none."""
    try:
        values = array.astype(np.float64)
    except (ValueError, TypeError):
        return None
    if not np.isfinite(values).all() or (values != np.floor(values)).any():
        return None
    return torch.from_numpy(values.astype(np.int64))
