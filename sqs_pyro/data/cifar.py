"""CIFAR-10 and CIFAR-100: 50,000 and 10,000 colour images of 32x32 pixels."""

from pathlib import Path
from typing import Any

import torch

from sqs_pyro.data.array_loader import Augmentation
from sqs_pyro.data.arrays import ImageArrays
from sqs_pyro.errors import DataError
from sqs_pyro.extras import needed_for

_STATISTICS = {  # per channel, of the training images
    10: ((0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)),
    100: ((0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762)),
}


def load_cifar(num_classes: int, root: str | Path | None = None, download: bool = False) -> ImageArrays:
    """Read torchvision's layout (the original python batches, checked by their MD5) below `root`.

    Args:
        num_classes: 10 or 100.
        root: directory that holds `cifar-10-batches-py` or `cifar-100-python`; None is `data`.
        download: let torchvision fetch what is not there.

    Raises:
        DataError: no such directory, a missing or altered file.
    """
    with needed_for("The CIFAR data sets"):
        from torchvision import datasets  # heavy, and only needed here

    kind = {10: datasets.CIFAR10, 100: datasets.CIFAR100}[num_classes]
    root = Path(root or "data")
    if not download:  # torchvision's own check says neither which file nor what to do
        _check_files(kind, root)
    try:
        train, test = kind(root, train=True, download=download), kind(root, train=False)
    except (OSError, RuntimeError) as error:
        raise DataError(
            f"{kind.__name__} in '{root}' cannot be read ({error}): delete '{root / kind.base_folder}' "
            f"and fetch it again."
        ) from None
    mean, std = _STATISTICS[num_classes]
    return ImageArrays(
        torch.from_numpy(train.data).permute(0, 3, 1, 2).contiguous(),  # [N, H, W, C] to [N, C, H, W]
        torch.tensor(train.targets),
        torch.from_numpy(test.data).permute(0, 3, 1, 2).contiguous(),
        torch.tensor(test.targets),
        num_classes,
        mean,
        std,
        Augmentation(padding=4, flip=True),
    )


def _check_files(kind: Any, root: Path) -> None:
    directory = root / kind.base_folder
    if not directory.is_dir():
        raise DataError(
            f"{kind.__name__} was not found: '{directory}' is no directory; give `root`, the directory "
            f"that holds '{kind.base_folder}', or set `download: true`."
        )
    names = [name for name, _ in [*kind.train_list, *kind.test_list]] + [kind.meta["filename"]]
    missing = [name for name in names if not (directory / name).is_file()]
    if missing:
        raise DataError(
            f"{kind.__name__} in '{directory}' is incomplete: {', '.join(missing)} missing; fetch it again "
            f"or set `download: true`."
        )
