"""Calibration without data: sequences that the network itself says."""

from typing import Any

import torch
from torch import Tensor, nn

from sqs_pyro.errors import DataError, NetworkError
from sqs_pyro.networks.calling import device_of, output_tensor
from sqs_pyro.networks.modes import evaluating
from sqs_pyro.networks.tokens import cache_name, longest_input


@torch.no_grad()
def generate_calibration(
    model: nn.Module,
    tokenizer_or_vocab: Any,
    count: int,
    length: int,
    seed: int = 0,
    temperature: float = 1.0,
    *,
    batch_size: int = 16,
) -> Tensor:
    """Sample sequences from a causal language model: int64 ``[count, length]`` on the CPU.

    The first token of each is drawn uniformly from all but the special ones (Liu et al. 2023, LLM-QAT), so that
    sequences differ in what they are about; all others come from the network, one at a time with a key-value
    cache. Nothing stops a sequence early: behind an end-of-text token the network begins another text.

    Every choice is a function of ``seed`` and the network's probabilities: minibatch size and device change
    nothing but the rounding of these.

    Args:
        model: a causal language model of transformers, packed or not. Its mode is left as it was.
        tokenizer_or_vocab: the tokenizer, or the number of tokens that may be drawn.
        count: sequences.
        length: tokens in a sequence.
        seed: of all draws.
        temperature: divides the logits.
        batch_size: sequences that run at once.

    Raises:
        DataError: a count, length, batch size, temperature or vocabulary that is impossible with this network.
        NetworkError: the network has no key-value cache, or gives logits that are NaN.
    """
    starts, vocab_size = _vocabulary(tokenizer_or_vocab)
    _check_numbers(model, count, length, temperature, batch_size)
    generator = torch.Generator().manual_seed(seed)
    first = starts[torch.randint(len(starts), (count, 1), generator=generator)]
    # All uniform numbers before the network is asked anything: how it is batched cannot change who gets which.
    draws = torch.rand(count, length - 1, generator=generator, dtype=torch.float64)
    with evaluating(model):
        parts = [
            _continue(model, tokens, u, vocab_size, temperature)
            for tokens, u in zip(first.split(batch_size), draws.split(batch_size), strict=True)
        ]
    return torch.cat(parts)


def _continue(model: nn.Module, tokens: Tensor, draws: Tensor, vocab_size: int, temperature: float) -> Tensor:
    """Add a token ``[B, 1]`` for each column of ``draws`` ``[B, T]``, uniform numbers from 0 to 1."""
    name, device = cache_name(model), device_of(model)
    if name is None:
        raise NetworkError(_no_cache(model))
    cache, sequence = None, [tokens]
    for u in draws.T:
        output = model(input_ids=sequence[-1].to(device), use_cache=True, **{name: cache})
        cache = getattr(output, name, None)
        if cache is None:
            raise NetworkError(_no_cache(model))
        # On the CPU in float64: the token at a given u hardly depends on the device's rounding.
        logits = output_tensor(output)[:, -1].double().cpu()  # [B, V]
        sequence.append(_draw(logits, u, vocab_size, temperature)[:, None])
    return torch.cat(sequence, dim=1)


def _draw(logits: Tensor, u: Tensor, vocab_size: int, temperature: float) -> Tensor:
    """Return the token at which the cumulated probabilities ``[B, V]`` exceed u ``[B]``."""
    if vocab_size > logits.shape[-1]:
        raise DataError(
            f"{vocab_size} tokens may be drawn, but the network knows {logits.shape[-1]}: use the tokenizer that "
            "belongs to the network, or a smaller number."
        )
    # A network may have more logits than its tokenizer has tokens: padding, never to be drawn.
    cumulated = (logits[:, :vocab_size] / temperature).softmax(-1).cumsum(-1)
    if not torch.isfinite(cumulated).all():
        raise NetworkError("The network's logits are NaN or infinite: no sequence can be drawn from it.")
    # Inversion; the last sum is 1 but for rounding, and u is scaled to it.
    drawn = torch.searchsorted(cumulated, u[:, None] * cumulated[:, -1:], right=True).squeeze(1)
    return drawn.clamp(max=vocab_size - 1)


def _vocabulary(tokenizer_or_vocab: Any) -> tuple[Tensor, int]:
    """Return tokens that may begin a sequence, and the number of tokens that may be in one."""
    if isinstance(tokenizer_or_vocab, int):
        if tokenizer_or_vocab < 1:
            raise DataError(f"A vocabulary of {tokenizer_or_vocab} tokens is none: give at least 1.")
        return torch.arange(tokenizer_or_vocab), tokenizer_or_vocab
    size = len(tokenizer_or_vocab)
    special = set(tokenizer_or_vocab.all_special_ids)
    starts = [token for token in range(size) if token not in special]
    if not starts:
        raise DataError("The tokenizer has no tokens but special ones: give the tokenizer of the network.")
    return torch.tensor(starts), size


def _check_numbers(model: nn.Module, count: int, length: int, temperature: float, batch_size: int) -> None:
    if min(count, length, batch_size) < 1:
        raise DataError(
            f"count={count}, length={length} and batch_size={batch_size} were given, but each must be at least 1."
        )
    if not 0 < temperature < float("inf"):
        raise DataError(
            f"temperature={temperature} was given, but it must be positive and finite; 1 changes nothing."
        )
    longest = longest_input(model)
    if longest is not None and length > longest:
        raise DataError(
            f"Sequences of {length} tokens were asked for, but {type(model).__name__} takes at most {longest}: "
            "give a smaller length."
        )


def _no_cache(model: nn.Module) -> str:
    return (
        f"{type(model).__name__} has no key-value cache: give a causal language model of transformers, or "
        "calibrate on a text."
    )
