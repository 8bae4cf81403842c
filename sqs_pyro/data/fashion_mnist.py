"""Fashion-MNIST: 60,000 and 10,000 images of 28x28 grey pixels in ten classes of clothing."""

from pathlib import Path

from torch import Tensor

from sqs_pyro.data.array_loader import Augmentation
from sqs_pyro.data.arrays import ImageArrays
from sqs_pyro.data.checks import check_images_and_labels
from sqs_pyro.data.idx import read_idx
from sqs_pyro.errors import DataError
from sqs_pyro.extras import needed_for

# Where it is looked for: `make fashion-mnist`, Debian's dataset-fashion-mnist, torchvision's download.
PLACES = (
    Path("data/fashion-mnist"),
    Path("/usr/share/datasets/fashion-mnist"),
    Path("data/FashionMNIST/raw"),
)
_FILES = (
    "train-images-idx3-ubyte",
    "train-labels-idx1-ubyte",
    "t10k-images-idx3-ubyte",
    "t10k-labels-idx1-ubyte",
)


def load_fashion_mnist(root: str | Path | None = None, download: bool = False) -> ImageArrays:
    """Read the four original idx files, compressed or not, from `root` or from one of `PLACES`.

    Raises:
        DataError: no such directory, a missing, truncated or altered file, counts that do not fit.
    """
    directory = _directory(None if root is None else Path(root), download)
    paths = [_file(directory, name) for name in _FILES]
    train_images, train_labels = _pair(paths[0], paths[1])
    test_images, test_labels = _pair(paths[2], paths[3])
    return ImageArrays(
        train_images,
        train_labels,
        test_images,
        test_labels,
        num_classes=10,
        mean=(0.2860,),
        std=(0.3530,),
        augmentation=Augmentation(padding=4, flip=True),
    )


def _pair(images_path: Path, labels_path: Path) -> tuple[Tensor, Tensor]:
    images = read_idx(images_path, ndim=3).unsqueeze(1)  # [N, 1, H, W]
    labels = read_idx(labels_path, ndim=1)
    try:
        check_images_and_labels(images, labels, num_classes=10)
    except DataError as error:
        raise DataError(f"'{images_path}' and '{labels_path.name}' do not fit: {error}") from None
    return images, labels


def _directory(root: Path | None, download: bool) -> Path:
    # torchvision's layout below `root` first: `download: true` has put the files there.
    places = PLACES if root is None else (root / "FashionMNIST" / "raw", root)
    found = next((place for place in places if place.is_dir()), None)
    if found is not None:
        return found
    if download:
        return _download(root or Path("data"))
    looked = ", ".join(f"'{place}'" for place in places)
    raise DataError(
        f"Fashion-MNIST was not found (looked in {looked}): run `make fashion-mnist`, install Debian's "
        f"package dataset-fashion-mnist, give `root`, or set `download: true`."
    )


def _file(directory: Path, name: str) -> Path:
    for path in (directory / name, directory / f"{name}.gz"):
        if path.is_file():
            return path
    raise DataError(
        f"Fashion-MNIST in '{directory}' is incomplete: '{name}' (or '{name}.gz') is missing; fetch it again."
    )


def _download(root: Path) -> Path:
    with needed_for("Downloads of Fashion-MNIST"):
        from torchvision.datasets import FashionMNIST  # heavy, and only needed here

    try:
        FashionMNIST(root, download=True)
    except (OSError, RuntimeError) as error:
        raise DataError(f"Fashion-MNIST could not be downloaded to '{root}': {error}.") from None
    return root / "FashionMNIST" / "raw"
