"""Inputs that a network was not trained on: rotated, noisy, or none of its classes at all.

Shifts act on a minibatch as the network sees it: normalised, so that noise of scale 1 is as strong as the data.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from sqs_pyro.data.splits import Loader
from sqs_pyro.errors import DataError

#: From images [B, C, H, W] to images, with the random numbers of a generator.
Shift = Callable[[Tensor, torch.Generator], Tensor]


@dataclass(frozen=True)
class Rotation:
    """Counterclockwise rotation about the centre, bilinear; what comes in from outside repeats the border."""

    degrees: float

    def __call__(self, images: Tensor, generator: torch.Generator) -> Tensor:
        """Rotate [B, C, H, W]."""
        angle, (height, width) = math.radians(self.degrees), images.shape[-2:]
        cos, sin = math.cos(angle), math.sin(angle)
        # affine_grid counts in half sides: a shear on images that are not square, but for their ratio.
        matrix = images.new_tensor([[cos, -sin * height / width, 0], [sin * width / height, cos, 0]])
        grid = F.affine_grid(matrix.expand(len(images), 2, 3), list(images.shape), align_corners=False)
        return F.grid_sample(images, grid, padding_mode="border", align_corners=False)


@dataclass(frozen=True)
class GaussianNoise:
    """Normal noise on every pixel, in standard deviations of the data."""

    scale: float

    def __call__(self, images: Tensor, generator: torch.Generator) -> Tensor:
        """Add noise to [B, C, H, W]."""
        return images + self.scale * torch.randn(images.shape, generator=generator, dtype=images.dtype)


@dataclass(frozen=True)
class UniformNoise:
    """Nothing but noise: pixels uniform between the smallest and the largest of the minibatch."""

    def __call__(self, images: Tensor, generator: torch.Generator) -> Tensor:
        """Replace [B, C, H, W]."""
        low, high = images.min(), images.max()
        uniform = torch.rand(images.shape, generator=generator, dtype=images.dtype)
        return low + (high - low) * uniform


@dataclass(frozen=True)
class Resized:
    """Another data set's images in the shape [C, H, W] that a network takes, bilinear; grey from the mean."""

    shape: tuple[int, ...]

    def __call__(self, images: Tensor, generator: torch.Generator) -> Tensor:
        """Resize [B, C', H', W'] to [B, C, H, W]."""
        # antialias: without it a smaller image is every n-th pixel of the larger one.
        sized = F.interpolate(images, self.shape[1:], mode="bilinear", antialias=True)
        return (
            sized
            if sized.shape[1] == self.shape[0]
            else sized.mean(1, keepdim=True).expand(-1, self.shape[0], -1, -1)
        )


_MEASURED: dict[str, Callable[[float], Shift]] = {"rotation": Rotation, "noise": GaussianNoise}


def parse_shift(text: str) -> Shift:
    """Read a shift as it is written on a command line: ``rotation:30``, ``noise:0.5`` or ``uniform``.

    Raises:
        DataError: an unknown name, or what follows is no finite number.
    """
    if text == "uniform":
        return UniformNoise()
    name, _, number = text.partition(":")
    try:
        value = float(number)
    except ValueError:
        value = math.nan  # is refused with the infinite ones
    if name not in _MEASURED or not math.isfinite(value):
        raise DataError(
            f"Shift {text!r} is unknown: give rotation:DEGREES, noise:SCALE (in standard deviations of the data) "
            "or uniform, as in rotation:30."
        )
    return _MEASURED[name](value)


class ShiftedLoader:
    """A loader whose inputs are shifted; the same random numbers in every pass, so that predictors compare.

    Args:
        loader: minibatches (images [B, C, H, W], labels).
        shift: applied to each minibatch.
        seed: of the shift's random numbers.
    """

    def __init__(self, loader: Loader, shift: Shift, seed: int = 0) -> None:
        self.loader, self.shift, self.seed = loader, shift, seed

    @property
    def dataset(self) -> Any:
        """The examples, as they are before the shift."""
        return self.loader.dataset

    def __len__(self) -> int:
        """Number of minibatches."""
        return len(self.loader)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        generator = torch.Generator().manual_seed(self.seed)  # anew at each pass
        for images, labels in self.loader:
            yield self.shift(images, generator), labels
