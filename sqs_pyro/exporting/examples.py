"""Inputs to trace a network with, and where they come from: rows of data, or random ones."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from sqs_pyro.errors import RecipeError
from sqs_pyro.networks.calling import split_examples, tensors_in
from sqs_pyro.networks.tokens import longest_input, vocabulary_size

_ROWS, _TOKENS = 4, 16  # of an example: what a tracer needs to see, no more


def first_rows(loader: Any) -> tuple[Any, str]:
    """Return the first test examples, two at least: torch takes a batch of one for a constant."""
    rows = next(split_examples(next(iter(loader))[0], _ROWS))
    return rows if len(tensors_in(rows)[0]) > 1 else _twice(rows), "first test examples"


def _twice(inputs: Any) -> Any:
    if isinstance(inputs, Mapping):
        return {name: torch.cat([value, value]) for name, value in inputs.items()}
    doubled = tuple(torch.cat([value, value]) for value in tensors_in(inputs))
    return doubled[0] if isinstance(inputs, Tensor) else doubled


def random_inputs(net: nn.Module, shape: Sequence[int]) -> tuple[Any, str]:
    """Return random examples: tokens of a network with a vocabulary, else numbers.

    Args:
        net: the network.
        shape: of one example without batch, say ``(1, 28, 28)``; of a text the number of tokens.

    Raises:
        RecipeError: the shape is none.
    """
    if not shape or min(shape) < 1:
        raise RecipeError(
            f"The input shape is {list(shape)}, but should be whole numbers above zero, without the batch."
        )
    # Its own generator: an export draws nothing from the caller's random state, and repeats.
    words, generator = vocabulary_size(net), torch.Generator().manual_seed(0)
    if words is None:
        return torch.randn(_ROWS, *shape, generator=generator), f"random numbers {[_ROWS, *shape]}"
    tokens = torch.randint(words, (_ROWS, *shape), generator=generator)
    inputs = {"input_ids": tokens, "attention_mask": torch.ones_like(tokens)}
    if getattr(net.config, "is_encoder_decoder", False):
        # Any tokens do: the graph does not depend on which.
        inputs["decoder_input_ids"] = tokens
    return inputs, f"random tokens {[*tokens.shape]}"


def random_text(net: nn.Module, source: object) -> tuple[Any, str]:
    """Return a few random tokens, of a network that came from ``source``.

    Raises:
        RecipeError: the network does not say that it takes tokens.
    """
    if vocabulary_size(net) is None:
        raise RecipeError(f"'{source}' does not say which inputs its network takes.")
    # Positions end where the network's embedding of them does.
    return random_inputs(net, [min(_TOKENS, longest_input(net) or _TOKENS)])
