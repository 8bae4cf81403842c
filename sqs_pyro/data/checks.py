"""What images and labels must satisfy before anything is trained on them."""

import torch
from torch import Tensor

from sqs_pyro.errors import DataError


def check_images_and_labels(images: Tensor, labels: Tensor, num_classes: int | None = None) -> None:
    """Check images [N, C, H, W] and labels [N].

    Raises:
        DataError: for shapes or types that do not fit, pixels that are not finite, labels out of range.
    """
    if images.ndim != 4 or images.numel() == 0:
        raise DataError(f"Images must have the shape [N, C, H, W], none of it 0, but have {list(images.shape)}.")
    if images.dtype != torch.uint8 and not images.is_floating_point():
        raise DataError(f"Images must be uint8 or floating point, but are {images.dtype}: convert them.")
    if labels.shape != images.shape[:1]:
        raise DataError(
            f"{len(images)} images need labels of the shape [{len(images)}], but the labels have the shape "
            f"{list(labels.shape)}."
        )
    if images.is_floating_point():
        _check_finite(images)
    check_labels(labels, num_classes)


def check_labels(labels: Tensor, num_classes: int | None = None) -> None:
    """Check that labels are integers from 0 to `num_classes` - 1.

    Raises:
        DataError: naming the first label that is not.
    """
    if labels.is_floating_point() or labels.is_complex() or labels.dtype == torch.bool:
        raise DataError(f"Labels must be integers from 0, but are {labels.dtype}: convert them.")
    wide = labels.to(torch.int64)  # uint8 has no negative numbers to compare with
    wrong = wide < 0 if num_classes is None else (wide < 0) | (wide >= num_classes)
    if wrong.any():
        example = int(wrong.nonzero()[0])
        allowed = "0 or more" if num_classes is None else f"from 0 to {num_classes - 1}"
        raise DataError(
            f"Label {int(wide[example])} of example {example} is out of range: labels must be {allowed}; "
            f"renumber them or correct the number of classes."
        )


def _check_finite(images: Tensor) -> None:
    finite = torch.isfinite(images).flatten(1).all(dim=1)
    if not finite.all():
        count, first = int((~finite).sum()), int((~finite).nonzero()[0])
        raise DataError(
            f"{count} of {len(images)} images have pixels that are NaN or infinite, the first is image "
            f"{first}: remove or repair them."
        )
