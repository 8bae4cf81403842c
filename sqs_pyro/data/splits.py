"""What a data set is split into: loaders for training, for every choice, and for the final figures."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor

from sqs_pyro.data.recipe import DataRecipe, Task
from sqs_pyro.errors import DataError

MOST_HELD_OUT = 5_000
SPLIT_SEED = 0  # the same examples are held out in every run, so no network can have been trained on them


class Loader(Protocol):
    """Minibatches (x, y): what everything here trains and evaluates on; torch's DataLoader is one."""

    @property
    def dataset(self) -> Any:
        """The examples; `len(loader.dataset)` is their number."""

    def __len__(self) -> int:
        """Number of minibatches."""

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]: ...


@dataclass(frozen=True)
class Data:
    """Loaders for training, for every choice, and for the final figures.

    Attributes:
        train: shuffled and augmented; minibatches of equal size.
        validation: held out of the training examples; neither shuffled nor augmented.
        test: never used for a choice.
        num_classes: labels are below it; of several labels at once, or of numbers to learn, how many there are.
        input_shape: (C, H, W) of one image, or whatever else one example has.
        name: of the data set.
        task: what is learned.
        about: what has to be known of inputs and targets to use a network elsewhere, as plain JSON: names of
            columns and classes, what was subtracted and divided by.
    """

    train: Loader
    validation: Loader
    test: Loader
    num_classes: int
    input_shape: tuple[int, ...]
    name: str
    task: Task = "classification"
    about: dict[str, Any] = field(default_factory=dict)


def with_channels(images: Tensor, channels: int | None) -> Tensor:
    """Return images ``[N, C, H, W]`` with their one channel repeated; others, and what is no image, stay."""
    if channels is None or images.dim() != 4 or images.shape[1] != 1:
        return images
    return images.expand(-1, channels, -1, -1)


def held_out_size(recipe: DataRecipe, num_examples: int) -> int:
    """Return how many are held out: what the recipe says, or a tenth up to `MOST_HELD_OUT`."""
    return recipe.validation or max(1, min(num_examples // 10, MOST_HELD_OUT))


def stratified_split(labels: Tensor, held_out: int, seed: int) -> tuple[Tensor, Tensor]:
    """Hold out exactly `held_out` examples, in proportion from each class (within one example).

    Args:
        labels: [N], integers.
        held_out: examples to hold out, from 1 to N - 1.
        seed: chooses which.

    Returns:
        Indices of the kept [N - held_out] and of the held out [held_out] examples, each ascending.

    Raises:
        DataError: where `held_out` leaves nothing to train on.
    """
    size = len(labels)
    if not 0 < held_out < size:
        raise DataError(
            f"{held_out} of {size} training examples cannot be held out for validation: give a number from "
            f"1 to {size - 1}."
        )
    shuffled = torch.randperm(size, generator=torch.Generator().manual_seed(seed))
    order = shuffled[torch.sort(labels[shuffled], stable=True).indices]  # by class, random within a class
    _, counts = torch.unique_consecutive(labels[order], return_counts=True)
    rank = torch.cat([(torch.arange(n, dtype=torch.float64) + 0.5) / n for n in counts.tolist()])
    chosen = order[torch.sort(rank, stable=True).indices]  # every class evenly spread over the whole
    return chosen[held_out:].sort().values, chosen[:held_out].sort().values
