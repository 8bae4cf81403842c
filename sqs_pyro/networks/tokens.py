"""What a language model says about the tokens that it takes, and what tokens must satisfy."""

import inspect
from typing import Any

import torch
from torch import Tensor, nn

from sqs_pyro.errors import DataError

_CACHE_NAMES = ("cache", "past_key_values")  # transformers from 5.24 on, and before


def longest_input(net: Any) -> int | None:
    """Return how many tokens a network (or its config's owner) takes at once, or None where it does not say."""
    return _number(net, "max_position_embeddings")


def vocabulary_size(net: Any) -> int | None:
    """Return tokens that a network (or its ``.config``'s owner) knows: ``vocab_size`` or None."""
    return _number(net, "vocab_size")


def cache_name(net: nn.Module) -> str | None:
    """Return the argument of a language model's call that is its key-value cache, or None where there is none."""
    parameters = inspect.signature(net.forward).parameters
    names = (name for name in _CACHE_NAMES if name in parameters and "use_cache" in parameters)
    return next(names, None)


def _number(net: Any, name: str) -> int | None:
    value = getattr(getattr(net, "config", None), name, None)
    return value if isinstance(value, int) and value > 0 else None  # some configurations say -1 for no limit


def check_tokens(tokens: Tensor, vocab_size: int | None) -> None:
    """Check that tokens, at least one, are integers from 0 to ``vocab_size - 1``; None is no upper limit.

    Raises:
        DataError: naming the range that was found.
    """
    if tokens.is_floating_point() or tokens.is_complex() or tokens.dtype == torch.bool:
        raise DataError(
            f"Tokens must be integers, but are {tokens.dtype}: give the ids that the tokenizer returns."
        )
    lowest, highest = int(tokens.min()), int(tokens.max())
    if lowest < 0 or (vocab_size is not None and highest >= vocab_size):
        known = "0 or more" if vocab_size is None else f"0 to {vocab_size - 1}"
        raise DataError(
            f"Tokens run from {lowest} to {highest}, but the network knows {known}: use the tokenizer that "
            "belongs to the network."
        )
