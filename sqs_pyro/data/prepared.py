"""Loaders over the examples of a file: split, standardised, and described so that a packed file can be used."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from sqs_pyro.data.columns import inputs_of, num_classes, targets_of
from sqs_pyro.data.files import Examples, read_examples
from sqs_pyro.data.recipe import DataRecipe
from sqs_pyro.data.splits import SPLIT_SEED, Data, held_out_size, stratified_split, with_channels
from sqs_pyro.data.tensor_loader import TensorLoader, scaling
from sqs_pyro.errors import DataError

_EVALUATION_BATCH = 500
_TEST_SHARE = 5  # a fifth
_AT_ONCE = 1_000  # examples


def load_file(recipe: DataRecipe, seed: int) -> Data:
    """Make loaders over a file's examples; see :class:`~sqs_pyro.data.recipe.DataRecipe` for what is read.

    Raises:
        DataError: the file, or something in it, is missing or not what the task has.
    """
    train, test = read_examples(recipe)
    return load_examples(recipe, seed, train, test)


def load_examples(
    recipe: DataRecipe,
    seed: int,
    train: Examples,
    test: Examples | None = None,
    validation: Examples | None = None,
) -> Data:
    """Make loaders over arrays or columns; what is not there is held out of the training examples.

    Raises:
        DataError: something in them is not what the task has.
    """
    where = f"'{recipe.name}'"
    parts = {"train": train, "test": test, "validation": validation}
    given = {key: part for key, part in parts.items() if part is not None}
    x = {key: with_channels(inputs_of(part, where), recipe.channels) for key, part in given.items()}
    targets, names = targets_of(recipe, list(given.values()), where)
    y = dict(zip(given, targets, strict=True))
    for key, values in x.items():
        if values.shape[1:] != x["train"].shape[1:]:
            raise DataError(
                f"Examples of {where} for {key} have the shape {list(values.shape[1:])}, but those for training "
                f"{list(x['train'].shape[1:])}: make them the same."
            )
    # The test examples first: they must not depend on how many are held out for choices.
    for key in ("test", "validation"):
        if key not in given:
            size = len(y["train"])
            count = size // _TEST_SHARE if key == "test" else held_out_size(recipe, size)
            kept, held_out = _split(recipe, y["train"], count, where)
            x[key], y[key] = x["train"][held_out], y["train"][held_out]
            x["train"], y["train"] = x["train"][kept], y["train"][kept]
    return _loaders(recipe, seed, x, y, names, train)


def _split(recipe: DataRecipe, y: Tensor, held_out: int, where: str) -> tuple[Tensor, Tensor]:
    """Hold examples out: of classes some of each, of others at random."""
    if len(y) < 3:
        raise DataError(f"{where} has {len(y)} examples, too few for training, validation and test: give more.")
    labels = y if recipe.task == "classification" else torch.zeros(len(y), dtype=torch.int64)
    return stratified_split(labels, max(held_out, 1), SPLIT_SEED)


def _loaders(
    recipe: DataRecipe,
    seed: int,
    x: Mapping[str, Tensor],
    y: dict[str, Tensor],
    names: tuple[str, ...],
    columns: Examples,
) -> Data:
    about: dict[str, Any] = {"inputs": list(columns.inputs), "targets": list(columns.targets)}
    if names and recipe.task != "regression":
        about["classes"] = list(names)
    inputs, factors = x["train"], None
    if inputs.dtype != torch.int64:  # tokens are no quantities
        mean, std = _moments(inputs) if recipe.standardise else _as_they_are(inputs)
        factors = scaling(mean, std, inputs.dim() - 1, 255.0 if inputs.dtype == torch.uint8 else 1.0)
        about["input_mean"], about["input_std"] = mean.tolist(), std.tolist()
    if recipe.task == "regression":
        mean, std = _moments(y["train"]) if recipe.standardise else _as_they_are(y["train"])
        factor, shift = scaling(mean, std, 1)
        y = {key: values * factor + shift for key, values in y.items()}
        about["target_mean"], about["target_std"] = mean.tolist(), std.tolist()
    if recipe.batch_size > len(inputs):
        raise DataError(
            f"'{recipe.name}' leaves {len(inputs)} examples to train on, fewer than a minibatch of "
            f"{recipe.batch_size}: lower `batch_size`."
        )
    held_out = {
        key: TensorLoader(x[key], y[key], _EVALUATION_BATCH, scaling=factors) for key in ("validation", "test")
    }
    return Data(
        train=TensorLoader(
            inputs, y["train"], recipe.batch_size, shuffle=True, seed=seed, drop_last=True, scaling=factors
        ),
        **held_out,
        num_classes=num_classes(recipe, y["train"]),
        input_shape=tuple(inputs.shape[1:]),
        name=recipe.name,
        task=recipe.task,
        about=about,
    )


def _moments(values: Tensor) -> tuple[Tensor, Tensor]:
    """Return mean and standard deviation of each channel or column, ``[C]``, float64; of constants 1."""
    largest = 255.0 if values.dtype == torch.uint8 else 1.0

    def mean(function: Callable[[Tensor], Tensor]) -> Tensor:
        """Return a function's mean; some examples at a time, as float64 is eight times as large as bytes."""
        sums = [
            function(part.double().transpose(0, 1).flatten(1) / largest).sum(1)  # [C, B...] -> [C]
            for part in values.split(_AT_ONCE)
        ]
        return torch.stack(sums).sum(0) / (values.numel() / values.shape[1])

    centre = mean(lambda columns: columns)
    std = mean(lambda columns: (columns - centre[:, None]).square()).sqrt()
    return centre, torch.where(std > 1e-12 * centre.abs(), std, 1.0)


def _as_they_are(values: Tensor) -> tuple[Tensor, Tensor]:
    width = values.shape[1]
    return torch.zeros(width, dtype=torch.float64), torch.ones(width, dtype=torch.float64)
