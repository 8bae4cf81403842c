"""Minibatches of token sequences of different lengths, padded to the longest in each."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from sqs_pyro.data.tensor_loader import epoch_generator
from sqs_pyro.errors import DataError
from sqs_pyro.networks.tokens import check_tokens

MASK, TOKENS = "attention_mask", "input_ids"


class TokenDataset:
    """Token sequences and what is to be predicted of each.

    Args:
        inputs: of each example, ``input_ids`` and whatever else the network takes a number a token of
            (``token_type_ids``); int64 ``[T]`` each, T of the example. A mask is made when they are padded.
        targets: ``[N, ...]``.
        source: what the examples were made of, for figures that need more than targets.

    Raises:
        DataError: there is no example.
    """

    def __init__(self, inputs: Sequence[Mapping[str, Tensor]], targets: Tensor, source: Any = None) -> None:
        if not inputs:
            raise DataError("There is no example: the data is empty.")
        self.inputs, self.targets, self.source = inputs, targets, source

    def __len__(self) -> int:
        return len(self.inputs)


class TokenLoader:
    """Iterates over token sequences in minibatches; every pass over it is one epoch.

    The order of an epoch follows from ``seed`` and the attribute ``epoch`` alone, as with
    :class:`~sqs_pyro.data.ArrayLoader`. Sequences are padded on the right, which decoders, too, can bear: no token
    sees what stands behind it.

    Args:
        dataset: the examples.
        batch_size: examples in a minibatch.
        pad_token: its id, behind the shorter sequences.
        vocab_size: tokens that the network knows; None checks nothing.
        shuffle: draw a new order every epoch, and leave out a last minibatch that is smaller than the others.
        seed: of the order.

    Yields:
        A mapping of int64 ``[B, T]``, with ``attention_mask`` (1 for tokens, 0 for padding), and targets
        ``[B, ...]``.

    Raises:
        DataError: no full minibatch, or the network does not know a token.
    """

    def __init__(
        self,
        dataset: TokenDataset,
        batch_size: int,
        pad_token: int,
        *,
        vocab_size: int | None = None,
        shuffle: bool = False,
        seed: int = 0,
    ) -> None:
        if batch_size < 1 or (shuffle and batch_size > len(dataset)):
            raise DataError(
                f"A batch size of {batch_size} does not fit {len(dataset)} examples: give a number from 1 to "
                f"{len(dataset)}."
            )
        # Here, for all of them at once: within an embedding an unknown token is an error without a name.
        check_tokens(torch.cat([example[TOKENS] for example in dataset.inputs]), vocab_size)
        self.dataset, self.batch_size, self.pad_token = dataset, batch_size, pad_token
        self.shuffle, self.seed, self.epoch = shuffle, seed, 0

    def __len__(self) -> int:
        """Number of minibatches in an epoch."""
        full, rest = divmod(len(self.dataset), self.batch_size)
        return full if self.shuffle or not rest else full + 1

    def __iter__(self) -> Iterator[tuple[dict[str, Tensor], Tensor]]:
        generator = epoch_generator(self.seed, self.epoch)
        self.epoch += 1  # here, not at the first minibatch: an epoch counts from when it is asked for
        size = len(self.dataset)
        order = torch.randperm(size, generator=generator) if self.shuffle else torch.arange(size)
        return (self._minibatch(index) for index in order.split(self.batch_size)[: len(self)])

    def _minibatch(self, index: Tensor) -> tuple[dict[str, Tensor], Tensor]:
        examples = [self.dataset.inputs[i] for i in index.tolist()]
        padded = {name: self._padded([e[name] for e in examples], name) for name in examples[0]}
        # Of lengths, not of values: a text may hold the padding token itself.
        mask = self._padded([torch.ones_like(e[TOKENS]) for e in examples], MASK)
        return {**padded, MASK: mask}, self.dataset.targets[index]

    def _padded(self, rows: list[Tensor], name: str) -> Tensor:
        value = self.pad_token if name == TOKENS else 0
        return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=value)
