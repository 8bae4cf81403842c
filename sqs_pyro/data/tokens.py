"""Text as sequences of tokens of equal length."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from sqs_pyro.errors import DataError
from sqs_pyro.networks.tokens import check_tokens


def token_stream(tokenizer: Any, text: str, vocab_size: int | None = None) -> Tensor:
    """Return the tokens of a text, int64 ``[n]``, without special ones.

    Args:
        tokenizer: of transformers, or of the package ``tokenizers``.
        text: any.
        vocab_size: tokens that the network knows; None checks nothing.

    Raises:
        DataError: the text has no token, or one that the network does not know.
    """
    if callable(tokenizer):
        # verbose=False: a text longer than the network's longest input is cut up later, no need to warn
        ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    else:
        # The package `tokenizers` has objects that are no functions, with a result of its own.
        ids = tokenizer.encode(text, add_special_tokens=False).ids
    stream = torch.tensor(ids, dtype=torch.int64)
    if not len(stream):
        raise DataError("The text has no tokens: it is empty, or of a kind that the tokenizer leaves out.")
    check_tokens(stream, vocab_size)
    return stream


def token_sequences(
    tokenizer: Any,
    text: str,
    length: int,
    count: int | None = None,
    *,
    seed: int = 0,
    vocab_size: int | None = None,
    prefix: Sequence[int] = (),
    suffix: Sequence[int] = (),
) -> Tensor:
    """Return sequences of a text, int64 ``[n, length]``, that do not overlap, in the order of the text.

    Args:
        tokenizer: of transformers, or of the package ``tokenizers``.
        text: what is left behind the last whole sequence is not used.
        length: tokens in a sequence, ``prefix`` and ``suffix`` included.
        count: how many sequences, drawn from the whole text; None takes all.
        seed: of the draw.
        vocab_size: tokens that the network knows (``net.config.vocab_size``); None checks nothing.
        prefix, suffix: tokens that begin and end each sequence, such as BERT's ``[CLS]`` and ``[SEP]``.

    Raises:
        DataError: the text is shorter than one sequence or gives fewer than ``count``, no room is left between
            ``prefix`` and ``suffix``, or the network does not know one of the tokens.
    """
    own = length - len(prefix) - len(suffix)
    if own < 1:
        raise DataError(
            f"A sequence of {length} tokens leaves no room for text beside {len(prefix)} + {len(suffix)} given "
            "ones: give a greater length."
        )
    stream = token_stream(tokenizer, text, vocab_size)
    available = len(stream) // own
    if not available:
        raise DataError(
            f"The text has {len(stream)} tokens, fewer than one sequence of {length}: give more text or a smaller "
            "length."
        )
    if count is not None and not 1 <= count <= available:
        raise DataError(
            f"The text gives {available} sequences of {length} tokens, but {count} were asked for: give more text "
            f"or a count from 1 to {available}."
        )
    sequences = stream[: available * own].view(available, own)
    if count is not None:
        # Drawn without replacement, then in the order of the text: which ones is random, nothing else.
        drawn = torch.randperm(available, generator=torch.Generator().manual_seed(seed))[:count]
        sequences = sequences[drawn.sort().values]
    around = [torch.tensor(tokens, dtype=torch.int64).expand(len(sequences), -1) for tokens in (prefix, suffix)]
    result = torch.cat([around[0], sequences, around[1]], dim=1)
    check_tokens(result, vocab_size)  # again: prefix and suffix are the caller's
    return result
