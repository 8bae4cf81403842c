"""A folder of image files, one directory a class, with the usual ImageNet transforms."""

import math
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import DataLoader, Subset

from sqs_pyro.data.recipe import DataRecipe
from sqs_pyro.data.splits import SPLIT_SEED, Data, held_out_size, stratified_split
from sqs_pyro.data.tensor_loader import epoch_generator
from sqs_pyro.errors import DataError, first_line
from sqs_pyro.extras import needed_for

_MEAN, _STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # ImageNet's
_MOST_PIXELS = 1 << 26  # of an image: 200 MB decoded
_RESIZE = 256 / 224  # evaluation: the shorter side is resized to this times the crop


class EpochDataLoader(DataLoader[Any]):
    """torch's DataLoader, with the order of an epoch given by `seed` and the attribute `epoch` alone.

    Worker processes take their seeds from the same generator, so augmentation repeats as well. Without
    workers it draws from torch's global generator.
    """

    def __init__(self, dataset: Any, *, seed: int = 0, **options: Any) -> None:
        super().__init__(dataset, generator=torch.Generator(), **options)
        self.seed = seed
        self.epoch = 0

    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]
        # In place: samplers and the seeds of workers hold on to this generator.
        self.generator.set_state(epoch_generator(self.seed, self.epoch).get_state())
        self.epoch += 1
        return _in_one_sentence(super().__iter__())


def _in_one_sentence(minibatches: Iterator[Any]) -> Iterator[Any]:
    """Yield minibatches; a worker process's error leaves its traceback out."""
    try:
        yield from minibatches
    except DataError as error:  # that of a worker process comes with its traceback before it
        raise DataError(str(error).strip().splitlines()[-1].rpartition("DataError: ")[2]) from None


def load_image_folder(recipe: DataRecipe, seed: int) -> Data:
    """Make loaders over `root/train` and `root/val` or `root/test`, each with one directory a class.

    With both `val` and `test`, `val` is for choices and `test` for the final figures. With only one of them,
    that one is for the final figures, and the validation examples are held out of `train`.

    Raises:
        DataError: a missing directory, a class without images, classes that differ between the directories.
    """
    root = _existing_root(recipe.root)
    train_transform, plain_transform = image_transforms(recipe)
    # The same files twice: held-out images must not be augmented.
    train, train_plain = (
        _folder(root / "train", each, recipe.limit) for each in (train_transform, plain_transform)
    )
    held_out_folders = [
        _folder(root / n, plain_transform, recipe.limit) for n in ("val", "test") if (root / n).is_dir()
    ]
    if not held_out_folders:
        raise DataError(f"'{root}' has neither 'val' nor 'test': add one, with a directory for each class.")
    for folder in held_out_folders:
        _check_same_classes(train, folder)
    if len(held_out_folders) == 2:
        training, validation = train, held_out_folders[0]
    else:
        labels = torch.tensor(train.targets)
        kept, held_out = stratified_split(labels, held_out_size(recipe, len(labels)), SPLIT_SEED)
        training, validation = Subset(train, kept.tolist()), Subset(train_plain, held_out.tolist())
    # The last is `test` if both are there, else the only one.
    parts = training, validation, held_out_folders[-1]
    return data_of_images(recipe, seed, parts, len(train.classes), train.classes, f"'{root / 'train'}'")


def data_of_images(
    recipe: DataRecipe, seed: int, parts: Sequence[Any], num_classes: int, names: Sequence[str], where: str
) -> Data:
    """Return loaders over data sets of prepared images for training, choices and the final figures.

    Args:
        recipe: how they are cut into minibatches.
        seed: of their order.
        parts: the three.
        num_classes: C.
        names: of the classes; none, if they have none.
        where: the training images are from, for the sentence.

    Raises:
        DataError: there is no minibatch to train on.
    """
    training, validation, test = parts
    if len(training) < recipe.batch_size:
        raise DataError(
            f"{where} leaves {len(training)} images to train on, fewer than a minibatch of {recipe.batch_size}: "
            "lower `batch_size`."
        )
    options: dict[str, Any] = {"batch_size": recipe.batch_size, "num_workers": recipe.num_workers}
    mean, std = _normalisation(recipe)
    about = {"classes": list(names)} if names else {}
    return Data(
        train=EpochDataLoader(training, seed=seed, shuffle=True, drop_last=True, **options),
        validation=EpochDataLoader(validation, **options),
        test=EpochDataLoader(test, **options),
        num_classes=num_classes,
        input_shape=(3, recipe.image_size, recipe.image_size),
        name=recipe.name,
        about={**about, "input_mean": list(mean), "input_std": list(std)},
    )


def _normalisation(recipe: DataRecipe) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Return what is subtracted from pixels between 0 and 1, and by what they are divided, a number a channel."""
    mean, std = recipe.mean or _MEAN, recipe.std or _STD
    return mean * (3 // len(mean)), std * (3 // len(std))


def image_transforms(recipe: DataRecipe) -> tuple[Any, Any]:
    """Return those for training and for evaluation."""
    with needed_for("Image folders"):
        from torchvision import transforms  # heavy, and only needed here

    to_tensor = [transforms.ToTensor(), transforms.Normalize(*_normalisation(recipe))]
    size = recipe.image_size
    plain = transforms.Compose([transforms.Resize(round(size * _RESIZE)), transforms.CenterCrop(size), *to_tensor])
    if not recipe.augment:
        return plain, plain
    augmented = [transforms.RandomResizedCrop(size), transforms.RandomHorizontalFlip(), *to_tensor]
    return transforms.Compose(augmented), plain


def _existing_root(root: Path | None) -> Path:
    if root is None:
        raise DataError("An image folder needs `root`: the directory that holds 'train' and 'val' or 'test'.")
    for directory in (root, root / "train"):
        if not directory.is_dir():
            raise DataError(
                f"'{directory}' is no directory: an image folder holds 'train' and 'val' or 'test', each "
                f"with one directory a class; correct `root`."
            )
    return root


def _folder(directory: Path, transform: Any, limit: int | None) -> Any:
    """Return the images of a directory, or so many of them, from its first class to its last."""
    with needed_for("Image folders"):
        from torchvision.datasets import ImageFolder  # heavy, and only needed here
        from torchvision.datasets.folder import IMG_EXTENSIONS

    classes = sorted(entry for entry in directory.iterdir() if entry.is_dir())
    if not classes:
        raise DataError(f"'{directory}' holds no classes: put each class's images in a directory of its own.")
    for entry in classes:
        if not any(file.suffix.lower() in IMG_EXTENSIONS for file in entry.rglob("*")):
            raise DataError(
                f"Class '{entry.name}' in '{directory}' has no images ({', '.join(IMG_EXTENSIONS)}): add "
                f"some or remove the directory."
            )
    folder = ImageFolder(directory, transform, loader=read_image)
    count = len(folder.samples)
    if limit is not None and limit < count:
        folder.samples = folder.imgs = [folder.samples[i * count // limit] for i in range(limit)]
        folder.targets = [label for _, label in folder.samples]
    return folder


def read_image(path: str) -> Any:
    """Decode an image file, RGB, as PIL's.

    Raises:
        DataError: it is damaged, no image, or larger than 67 million pixels.
    """
    return decoded(path, f"Image '{path}'")


def decoded(source: Any, what: str) -> Any:
    """Decode an image, RGB, as PIL's.

    Args:
        source: path, or an open file of bytes.
        what: it is, for the sentence.

    Raises:
        DataError: as :func:`read_image`.
    """
    with needed_for("Images"):
        from PIL import Image  # heavy, and only needed here

    try:
        with warnings.catch_warnings(), Image.open(source) as image:
            warnings.simplefilter("ignore")  # PIL warns of large images, which are refused below
            if math.prod(image.size) > _MOST_PIXELS:  # of the header: nothing is decoded yet
                size = "x".join(map(str, image.size))
                raise DataError(f"{what} has {size} pixels, more than {_MOST_PIXELS}: make it smaller.")
            return image.convert("RGB")
    except DataError:
        raise
    except Exception as error:  # each format has errors of its own
        reason = first_line(error)
        raise DataError(f"{what} cannot be read ({reason}): remove or replace it.") from None


def _check_same_classes(train: Any, other: Any) -> None:
    if train.classes != other.classes:
        odd = sorted(set(train.classes) ^ set(other.classes))
        raise DataError(
            f"'{train.root}' and '{other.root}' have different classes: {', '.join(odd)} in only one of "
            f"them; make them the same."
        )
