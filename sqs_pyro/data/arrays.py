"""What a data set that fits in memory consists of."""

from dataclasses import dataclass

from torch import Tensor

from sqs_pyro.data.array_loader import Augmentation


@dataclass(frozen=True)
class ImageArrays:
    """Images [N, C, H, W] (uint8, or floats as they are), labels [N], and how the field treats them."""

    train_images: Tensor
    train_labels: Tensor
    test_images: Tensor
    test_labels: Tensor
    num_classes: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    augmentation: Augmentation
