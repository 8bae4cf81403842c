"""From a recipe to three loaders."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor

from sqs_pyro.data.array_loader import ArrayLoader
from sqs_pyro.data.arrays import ImageArrays
from sqs_pyro.data.cifar import load_cifar
from sqs_pyro.data.digits import load_digits
from sqs_pyro.data.fashion_mnist import load_fashion_mnist
from sqs_pyro.data.recipe import DataRecipe
from sqs_pyro.data.split import stratified_split

EVALUATION_BATCH = 500
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
        num_classes: labels are below it.
        input_shape: (C, H, W) of one example.
        name: of the data set.
    """

    train: Loader
    validation: Loader
    test: Loader
    num_classes: int
    input_shape: tuple[int, ...]
    name: str


def load_data(recipe: DataRecipe, seed: int = 0) -> Data:
    """Read the data set that `recipe` names, hold out its validation examples, and make the loaders.

    Args:
        recipe: which data, and minibatches of which size.
        seed: of the order and the augmentation of the training examples. The split does not depend on it.

    Raises:
        DataError: one sentence that says what is missing or wrong, and how to repair it.
    """
    if recipe.name == "image_folder":
        from sqs_pyro.data.image_folder import load_image_folder  # torchvision, which is heavy

        return load_image_folder(recipe, seed)
    return _in_memory(_SOURCES[recipe.name](recipe), recipe, seed)


_SOURCES: dict[str, Callable[[DataRecipe], ImageArrays]] = {
    "digits": lambda recipe: load_digits(),
    "fashion_mnist": lambda recipe: load_fashion_mnist(recipe.root, recipe.download),
    "cifar10": lambda recipe: load_cifar(10, recipe.root, recipe.download),
    "cifar100": lambda recipe: load_cifar(100, recipe.root, recipe.download),
}


def held_out_size(recipe: DataRecipe, num_examples: int) -> int:
    """Validation examples: what the recipe says, or a tenth up to `MOST_HELD_OUT`."""
    return recipe.validation or max(1, min(num_examples // 10, MOST_HELD_OUT))


def _in_memory(arrays: ImageArrays, recipe: DataRecipe, seed: int) -> Data:
    images, labels = arrays.train_images, arrays.train_labels
    kept, held_out = stratified_split(labels, held_out_size(recipe, len(labels)), SPLIT_SEED)

    def evaluation(images: Tensor, labels: Tensor) -> ArrayLoader:
        return ArrayLoader(
            images, labels, EVALUATION_BATCH, arrays.mean, arrays.std, num_classes=arrays.num_classes
        )

    train = ArrayLoader(
        images[kept],
        labels[kept],
        recipe.batch_size,
        arrays.mean,
        arrays.std,
        shuffle=True,
        augment=arrays.augmentation if recipe.augment else None,
        seed=seed,
        drop_last=True,
        num_classes=arrays.num_classes,
    )
    return Data(
        train=train,
        validation=evaluation(images[held_out], labels[held_out]),
        test=evaluation(arrays.test_images, arrays.test_labels),
        num_classes=arrays.num_classes,
        input_shape=tuple(images.shape[1:]),
        name=recipe.name,
    )
