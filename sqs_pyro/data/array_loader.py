"""Minibatches from images that fit in memory: no worker processes and no work per image in Python."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import TensorDataset

from sqs_pyro.data.checks import check_images_and_labels
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


def epoch_generator(seed: int, epoch: int) -> torch.Generator:
    """Return the random numbers of one epoch; epochs and seeds are independent of each other."""
    # Hashed: with seed + epoch, epoch 1 of seed 0 would be epoch 0 of seed 1.
    state = np.random.SeedSequence([seed, epoch]).generate_state(1, np.uint64)[0]
    return torch.Generator().manual_seed(int(state) >> 1)  # torch's seeds are signed


class ArrayLoader:
    """Iterates over an in-memory data set in minibatches; every pass over it is one epoch.

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
        if batch_size < 1 or (drop_last and batch_size > len(images)):
            raise DataError(
                f"A batch size of {batch_size} does not fit {len(images)} examples: give a number from 1 to "
                f"{len(images)}."
            )
        self.dataset = TensorDataset(images, labels.to(torch.int64))
        self.batch_size = batch_size
        self.shuffle = shuffle
        self.augment = augment
        self.seed = seed
        self.drop_last = drop_last
        self.epoch = 0
        self._shift, self._factor = _normalisation(images, mean, std)

    def __len__(self) -> int:
        """Number of minibatches in an epoch."""
        full, rest = divmod(len(self.dataset), self.batch_size)
        return full if self.drop_last or not rest else full + 1

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        generator = epoch_generator(self.seed, self.epoch)
        self.epoch += 1  # here, not at the first minibatch: an epoch counts from when it is asked for
        return self._minibatches(generator)

    def _minibatches(self, generator: torch.Generator) -> Iterator[tuple[Tensor, Tensor]]:
        images, labels = self.dataset.tensors
        size = len(labels)
        order = torch.randperm(size, generator=generator) if self.shuffle else torch.arange(size)
        for index in order.split(self.batch_size)[: len(self)]:
            batch = images.index_select(0, index)  # uint8 until here: a quarter of the memory
            if self.augment is not None:
                batch = self.augment(batch, generator)
            yield batch.float().mul_(self._factor).add_(self._shift), labels.index_select(0, index)


def _normalisation(images: Tensor, mean: Sequence[float], std: Sequence[float]) -> tuple[Tensor, Tensor]:
    """Return shift and factor, [C, 1, 1] each: `(x / scale - mean) / std` is `x * factor + shift`."""
    channels = images.shape[1]
    if len(mean) not in (1, channels) or len(std) not in (1, channels) or min(std) <= 0:
        raise DataError(
            f"Normalisation of images with {channels} channels needs {channels} means and positive standard "
            f"deviations, but mean={list(mean)} and std={list(std)} were given."
        )
    scale = 1.0 if images.is_floating_point() else 255.0
    # In float64, and rounded once.
    centre = torch.tensor(mean, dtype=torch.float64).expand(channels)
    spread = torch.tensor(std, dtype=torch.float64).expand(channels)
    shape = (channels, 1, 1)
    return (-centre / spread).float().view(shape), (1 / (scale * spread)).float().view(shape)
