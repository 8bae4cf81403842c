"""Minibatches from sequences of tokens: every token foretells the next one."""

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.utils.data import TensorDataset

from sqs_pyro.data.tensor_loader import epoch_generator
from sqs_pyro.errors import DataError


class NextTokenLoader:
    """Iterates over sequences of equal length in minibatches; every pass over it is one epoch.

    Its minibatches fit :class:`~sqs_pyro.models.BayesianNetwork` with the likelihood ``"categorical"`` over a
    causal language model, a sequence as one example. The order of an epoch follows from ``seed`` and the attribute
    ``epoch`` alone, as :class:`~sqs_pyro.data.array_loader.ArrayLoader`'s does.

    Args:
        sequences: int64 ``[n, T]``, T at least 2, say of :func:`~sqs_pyro.data.tokens.token_sequences`.
        batch_size: sequences in a minibatch; the last one of an epoch may be smaller.
        shuffle: draw a new order every epoch.
        seed: of the order.

    Yields:
        ``({"input_ids": int64 [B, T - 1]}, int64 [B, T - 1])``: tokens, and what follows each of them.

    Raises:
        DataError: no sequence, sequences of fewer than two tokens, or an impossible batch size.
    """

    def __init__(self, sequences: Tensor, batch_size: int, *, shuffle: bool = False, seed: int = 0) -> None:
        if sequences.dim() != 2 or len(sequences) < 1 or sequences.shape[1] < 2:
            raise DataError(
                f"Sequences of the shape {list(sequences.shape)} were given, but [n, T] with T of 2 or more is "
                "needed: the first token foretells the second."
            )
        if batch_size < 1:
            raise DataError(f"A batch size of {batch_size} was given, but it must be at least 1 sequence.")
        self.dataset = TensorDataset(sequences)
        self.batch_size, self.shuffle, self.seed = batch_size, shuffle, seed
        self.epoch = 0

    def __len__(self) -> int:
        """Number of minibatches in an epoch."""
        return -(-len(self.dataset) // self.batch_size)

    def __iter__(self) -> Iterator[tuple[dict[str, Tensor], Tensor]]:
        generator = epoch_generator(self.seed, self.epoch)
        self.epoch += 1  # here, not at the first minibatch: an epoch counts from when it is asked for
        return self._minibatches(generator)

    def _minibatches(self, generator: torch.Generator) -> Iterator[tuple[dict[str, Tensor], Tensor]]:
        (sequences,) = self.dataset.tensors
        count = len(sequences)
        order = torch.randperm(count, generator=generator) if self.shuffle else torch.arange(count)
        for index in order.split(self.batch_size):
            batch = sequences.index_select(0, index)  # [B, T], of which T - 1 tokens have a next one
            yield {"input_ids": batch[:, :-1]}, batch[:, 1:]
