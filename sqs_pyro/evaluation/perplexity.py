"""Perplexity of a language model on a text, with a stated window and stride."""

import inspect
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sqs_pyro.errors import DataError, NetworkError
from sqs_pyro.isolation import isolating
from sqs_pyro.networks.calling import device_of, output_tensor
from sqs_pyro.networks.modes import evaluating
from sqs_pyro.networks.tokens import check_tokens, longest_input, vocabulary_size

_ROWS_AT_ONCE = 64  # positions whose log-probabilities are held at a time, 12 MB with 49k tokens


@dataclass(frozen=True)
class PerplexityResult:
    """How well a language model foretells a text.

    Attributes:
        perplexity: ``exp(nll)``; infinite where a token was held impossible.
        nll: mean negative log-likelihood, nats a token.
        tokens: how many were scored: all but the first of each sequence.
        window: tokens that the network saw at once, at most.
        stride: tokens by which the window moved: each token was foretold from ``window - stride + 1`` others at
            least, or from all before it where the sequence has fewer.
    """

    perplexity: float
    nll: float
    tokens: int
    window: int
    stride: int


@isolating("model", sees_parameters=True, sees_autocast=True)
@torch.no_grad()
def perplexity(
    model: nn.Module,
    sequences: Tensor,
    *,
    window: int = 512,
    stride: int = 256,
    batch_size: int = 1,
) -> PerplexityResult:
    """Measure perplexity on sequences of tokens, each token but a sequence's first scored exactly once.

    Window k feeds the tokens ``[k * stride, k * stride + window)`` to the network, which foretells from each the
    next one; the last ``stride`` of these predictions are scored, of the first window all. The last window of a
    sequence may be shorter; a sequence of at most ``window + 1`` tokens is one window.

    Logits of ``batch_size * window`` positions are held at once, in the network's dtype (those of the scored
    positions only, if its ``forward`` knows ``logits_to_keep``); what follows goes a few positions at a time.

    Args:
        model: any module that takes ``input_ids`` ``[B, T]`` and gives logits ``[B, T, V]``, packed or not; in
            evaluation mode here, afterwards as it was.
        sequences: integers ``[n, T]``, independent of each other, or one stream ``[T]``.
        window: tokens in a call of the network.
        stride: from 1 to ``window``; a smaller one gives every token more context, and takes longer.
        batch_size: windows in a call of the network.

    Raises:
        DataError: sequences that cannot be scored, tokens that the network does not know, or an impossible window,
            stride or batch size.
        NetworkError: logits of another shape, or NaN.
    """
    streams = sequences[None] if sequences.dim() == 1 else sequences
    _check_sequences(streams, vocabulary_size(model))
    _check_stride(window, stride, batch_size)
    # A text shorter than the window is one window; what was done is what the result says.
    window = min(window, streams.shape[1] - 1)
    stride = min(stride, window)
    _check_window(model, window)
    device = device_of(model)
    total, count = 0.0, 0
    with evaluating(model):
        for inputs, targets in _minibatches(streams.long(), window, stride, batch_size):
            total += _nll(model, inputs.to(device), targets.to(device))
            count += targets.numel()
    nll = total / count
    return PerplexityResult(float(torch.tensor(nll, dtype=torch.float64).exp()), nll, count, window, stride)


def _pieces(predictions: int, window: int, stride: int) -> list[tuple[int, int, int]]:
    """Return of each window its first input, the end of its inputs, and how many last predictions are scored."""
    pieces, start, done = [], 0, 0
    while done < predictions:
        end = min(start + window, predictions)
        pieces.append((start, end, end - done))  # of the first window all, of others what is new
        start, done = start + stride, end
    return pieces


def _minibatches(streams: Tensor, window: int, stride: int, batch_size: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield inputs ``[B, L]`` and the tokens to score ``[B, S]``, which follow the last S inputs."""
    alike: dict[tuple[int, int], list[tuple[int, int]]] = {}  # only windows of one shape make a minibatch
    for start, end, scored in _pieces(streams.shape[1] - 1, window, stride):
        places = alike.setdefault((end - start, scored), [])
        places.extend((row, start) for row in range(len(streams)))
    for (length, scored), places in alike.items():
        for i in range(0, len(places), batch_size):
            some = [streams[row, start : start + length + 1] for row, start in places[i : i + batch_size]]
            tokens = torch.stack(some)
            yield tokens[:, :-1], tokens[:, -scored:]


def _options(model: nn.Module, scored: int) -> dict[str, Any]:
    """Return arguments that spare work, where the network's forward has them by name."""
    known = inspect.signature(model.forward).parameters
    return {name: value for name, value in (("logits_to_keep", scored), ("use_cache", False)) if name in known}


def _nll(model: nn.Module, inputs: Tensor, targets: Tensor) -> float:
    """Return the sum over the targets ``[B, S]``; log-probabilities of a few positions at a time."""
    batch, scored = targets.shape
    logits = output_tensor(model(input_ids=inputs, **_options(model, scored)))
    if logits.dim() != 3 or len(logits) != batch or logits.shape[1] not in (inputs.shape[1], scored):
        raise NetworkError(
            f"{type(model).__name__} gives logits of the shape {list(logits.shape)} for tokens of the shape "
            f"{list(inputs.shape)}, but must give [B, T, V]: perplexity needs a causal language model."
        )
    check_tokens(targets, logits.shape[-1])
    rows = logits[:, -scored:].flatten(0, 1)  # [B S, V]
    total = torch.zeros((), dtype=torch.float64, device=logits.device)
    for some, wanted in zip(rows.split(_ROWS_AT_ONCE), targets.flatten().split(_ROWS_AT_ONCE), strict=True):
        # float32 of a few rows, summed in float64: the whole in float32 would double the memory.
        total += F.cross_entropy(some.float(), wanted, reduction="none").double().sum()
    if total.isnan():
        raise NetworkError(f"{type(model).__name__} gives logits that are NaN: it has no perplexity.")
    return float(total)


def _check_sequences(streams: Tensor, vocab_size: int | None) -> None:
    if streams.dim() != 2 or not len(streams) or streams.shape[1] < 2:
        raise DataError(
            f"Sequences of the shape {list(streams.shape)} were given, but perplexity needs [n, T] or [T] with T "
            "of at least 2: a first token and one that follows it."
        )
    check_tokens(streams, vocab_size)


def _check_stride(window: int, stride: int, batch_size: int) -> None:
    if not 1 <= stride <= window or batch_size < 1:
        raise DataError(
            f"window={window}, stride={stride} and batch_size={batch_size} were given, but each must be at least "
            "1, and the stride at most the window, or tokens would be left out."
        )


def _check_window(model: nn.Module, window: int) -> None:
    longest = longest_input(model)
    if longest is not None and window > longest:
        raise DataError(
            f"A window of {window} tokens was asked for, but {type(model).__name__} takes at most {longest}: give "
            "a smaller window."
        )
