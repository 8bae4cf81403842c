"""From a recipe to three loaders."""

from collections.abc import Callable

from torch import Tensor

from sqs_pyro.data.array_loader import ArrayLoader
from sqs_pyro.data.arrays import ImageArrays
from sqs_pyro.data.cifar import load_cifar
from sqs_pyro.data.digits import load_digits
from sqs_pyro.data.fashion_mnist import load_fashion_mnist
from sqs_pyro.data.recipe import DataRecipe
from sqs_pyro.data.splits import SPLIT_SEED, Data, held_out_size, stratified_split, with_channels
from sqs_pyro.own_code import is_own

_EVALUATION_BATCH = 500


def load_data(recipe: DataRecipe, seed: int = 0) -> Data:
    """Read the data set that `recipe` names, hold out its validation examples, and make the loaders.

    Args:
        recipe: which data, and minibatches of which size.
        seed: of the order and the augmentation of the training examples. The split does not depend on it.

    Raises:
        DataError: one sentence that says what is missing or wrong, and how to repair it.
    """
    if recipe.is_file:
        from sqs_pyro.data.prepared import load_file

        return load_file(recipe, seed)
    if recipe.is_table:
        from sqs_pyro.data.hub import load_table

        return load_table(recipe, seed)
    if is_own(recipe.name):
        from sqs_pyro.data.own import load_own

        return load_own(recipe, seed)
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


def _in_memory(arrays: ImageArrays, recipe: DataRecipe, seed: int) -> Data:
    # These sets are in no order of classes: their first examples are of all of them.
    few = slice(recipe.limit)
    images, labels = with_channels(arrays.train_images[few], recipe.channels), arrays.train_labels[few]
    kept, held_out = stratified_split(labels, held_out_size(recipe, len(labels)), SPLIT_SEED)

    def evaluation(images: Tensor, labels: Tensor) -> ArrayLoader:
        return ArrayLoader(
            images, labels, _EVALUATION_BATCH, arrays.mean, arrays.std, num_classes=arrays.num_classes
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
        drop_last=True,  # minibatches of equal size: each step is the same share of the data
        num_classes=arrays.num_classes,
    )
    return Data(
        train=train,
        validation=evaluation(images[held_out], labels[held_out]),
        test=evaluation(with_channels(arrays.test_images[few], recipe.channels), arrays.test_labels[few]),
        num_classes=arrays.num_classes,
        input_shape=tuple(images.shape[1:]),
        name=recipe.name,
    )
