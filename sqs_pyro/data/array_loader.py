"""Minibatches from images that fit in memory, normalised and augmented."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from sqs_pyro.data.checks import check_images_and_labels
from sqs_pyro.data.tensor_loader import TensorLoader, scaling
from sqs_pyro.errors import DataError


@dataclass(frozen=True)
class Augmentation:
    """Random crops of the images, padded by `padding` pixels of value 0, and random left-right flips."""

    padding: int = 4
    flip: bool = True

    def __call__(self, images: Tensor, generator: torch.Generator) -> Tensor:
        """Augment a batch: [B, C, H, W] to [B, C, H, W], every image with its own crop and flip."""
        batch, channels, height, width = images.shape
        padded = F.pad(images, [self.padding] * 4)
        top, left = torch.randint(0, 2 * self.padding + 1, (2, batch, 1), generator=generator)
        # Crops as indices into the padded batch: one gather for all images, with no loop over them.
        rows = top + torch.arange(height)  # [B, H]
        columns = torch.arange(width).expand(batch, width)  # [B, W]
        if self.flip:
            flipped = torch.rand(batch, 1, generator=generator) < 0.5
            columns = torch.where(flipped, columns.flip(1), columns)
        columns = left + columns  # flipped within the crop, then moved
        return padded[  # all four broadcast to [B, C, H, W]
            torch.arange(batch)[:, None, None, None],
            torch.arange(channels)[None, :, None, None],
            rows[:, None, :, None],
            columns[:, None, None, :],
        ]


class ArrayLoader(TensorLoader):
    """Iterates over an in-memory set of images in minibatches; every pass over it is one epoch.

    Order and augmentation of an epoch follow from `seed` and the attribute `epoch` alone, so that a run which
    is resumed with `loader.epoch` set sees the same minibatches as one that was never interrupted.

    Args:
        images: [N, C, H, W], uint8 (divided by 255) or floating point (taken as it is).
        labels: [N], integers from 0.
        batch_size: examples in a minibatch.
        mean: subtracted from each channel, in units of the divided image. One number per channel.
        std: divides each channel thereafter. One number per channel.
        shuffle: draw a new order every epoch.
        augment: applied to every minibatch before it is normalised, or None.
        seed: of order and augmentation.
        drop_last: leave out a last minibatch that is smaller than the others.
        num_classes: labels must be below it; None asks only that they are not negative.

    Yields:
        (float32 [B, C, H, W], int64 [B]).

    Raises:
        DataError: shapes that do not fit, pixels that are not finite, labels out of range, no full minibatch.
    """

    def __init__(
        self,
        images: Tensor,
        labels: Tensor,
        batch_size: int,
        mean: Sequence[float] = (0.0,),
        std: Sequence[float] = (1.0,),
        *,
        shuffle: bool = False,
        augment: Augmentation | None = None,
        seed: int = 0,
        drop_last: bool = False,
        num_classes: int | None = None,
    ) -> None:
        check_images_and_labels(images, labels, num_classes)
        super().__init__(
            images,
            labels.to(torch.int64),
            batch_size,
            shuffle=shuffle,
            seed=seed,
            drop_last=drop_last,
            scaling=_normalisation(images, mean, std),
        )
        self.augment = augment

    def _changed(self, x: Tensor, generator: torch.Generator) -> Tensor:
        return x if self.augment is None else self.augment(x, generator)


def _normalisation(images: Tensor, mean: Sequence[float], std: Sequence[float]) -> tuple[Tensor, Tensor]:
    """Return factor and shift, [C, 1, 1] each: `(x / scale - mean) / std` is `x * factor + shift`."""
    channels = images.shape[1]
    if len(mean) not in (1, channels) or len(std) not in (1, channels) or min(std) <= 0:
        raise DataError(
            f"Normalisation of images with {channels} channels needs {channels} means and positive standard "
            f"deviations, but mean={list(mean)} and std={list(std)} were given."
        )
    centre, spread = (torch.tensor(each, dtype=torch.float64).expand(channels) for each in (mean, std))
    return scaling(centre, spread, 3, 1.0 if images.is_floating_point() else 255.0)
