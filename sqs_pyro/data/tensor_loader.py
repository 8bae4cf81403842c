"""Minibatches from tensors in memory: no worker processes and no work per example in Python."""

from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import TensorDataset

from sqs_pyro.errors import DataError


def epoch_generator(seed: int, epoch: int) -> torch.Generator:
    """Return the random numbers of one epoch; epochs and seeds are independent of each other."""
    # Hashed: with seed + epoch, epoch 1 of seed 0 would be epoch 0 of seed 1.
    state = np.random.SeedSequence([seed, epoch]).generate_state(1, np.uint64)[0]
    return torch.Generator().manual_seed(int(state) >> 1)  # torch's seeds are signed


class TensorLoader:
    """Iterates over tensors in memory in minibatches; every pass over them is one epoch.

    What is random in an epoch follows from `seed` and the attribute `epoch` alone, so that a run which is resumed
    with `loader.epoch` set sees the same minibatches as one that was never interrupted.

    Args:
        x: [N, ...], inputs.
        y: [N, ...], targets.
        batch_size: examples in a minibatch.
        shuffle: draw a new order every epoch.
        seed: of the order.
        drop_last: leave out a last minibatch that is smaller than the others.
        scaling: inputs are given as float32 ``x * factor + shift``, which broadcast against a minibatch; None: as
            they are.

    Yields:
        (x [B, ...], y [B, ...]).

    Raises:
        DataError: no full minibatch.
    """

    def __init__(
        self,
        x: Tensor,
        y: Tensor,
        batch_size: int,
        *,
        shuffle: bool = False,
        seed: int = 0,
        drop_last: bool = False,
        scaling: tuple[Tensor, Tensor] | None = None,
    ) -> None:
        if batch_size < 1 or (drop_last and batch_size > len(x)):
            raise DataError(
                f"A batch size of {batch_size} does not fit {len(x)} examples: give a number from 1 to {len(x)}."
            )
        self.dataset = TensorDataset(x, y)
        self.batch_size = batch_size
        self.shuffle = shuffle
        self.seed = seed
        self.drop_last = drop_last
        self.epoch = 0
        self._scaling = scaling

    def __len__(self) -> int:
        """Number of minibatches in an epoch."""
        full, rest = divmod(len(self.dataset), self.batch_size)
        return full if self.drop_last or not rest else full + 1

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        generator = epoch_generator(self.seed, self.epoch)
        self.epoch += 1  # here, not at the first minibatch: an epoch counts from when it is asked for
        return self._minibatches(generator)

    def _minibatches(self, generator: torch.Generator) -> Iterator[tuple[Tensor, Tensor]]:
        x, y = self.dataset.tensors
        size = len(x)
        order = torch.randperm(size, generator=generator) if self.shuffle else torch.arange(size)
        for index in order.split(self.batch_size)[: len(self)]:
            batch = self._changed(x.index_select(0, index), generator)
            if self._scaling is not None:
                factor, shift = self._scaling
                batch = batch.float().mul_(factor).add_(shift)  # uint8 until here: a quarter of the memory
            yield batch, y.index_select(0, index)

    def _changed(self, x: Tensor, generator: torch.Generator) -> Tensor:
        """Return a minibatch's inputs as they are; a subclass may augment them."""
        return x


def scaling(mean: Tensor, std: Tensor, dims: int, largest: float = 1.0) -> tuple[Tensor, Tensor]:
    """Return factor and shift, float32 ``[C, 1, ...]``: ``(x / largest - mean) / std`` is ``x * factor + shift``.

    Args:
        mean, std: of each channel or column, ``[C]``, float64.
        dims: of an example: 3 of images, 1 of rows.
        largest: 255 of bytes.
    """
    shape = (len(mean), *[1] * (dims - 1))
    # In float64, and rounded once.
    return (1 / (largest * std)).float().view(shape), (-mean / std).float().view(shape)
