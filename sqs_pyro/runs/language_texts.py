"""The tokens of a language model's run: what it is calibrated on, what it is judged by, and how well it does."""

import math
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor, nn

from sqs_pyro.data.generation import generate_calibration
from sqs_pyro.data.text import Text, load_text, text_of_file
from sqs_pyro.data.tokens import token_sequences, token_stream
from sqs_pyro.errors import DataError
from sqs_pyro.evaluation.perplexity import perplexity
from sqs_pyro.runs.language_model_recipe import LanguageModelRecipe, PerplexityRecipe
from sqs_pyro.runs.progress import Progress, silent

HELD_OUT, FOREIGN = "held_out", "foreign"


def load_texts(recipe: LanguageModelRecipe) -> tuple[Text, str | None]:
    """The text to calibrate on with what is held out of it, and the foreign text if there is one.

    Raises:
        DataError: a file is missing, unreadable or empty.
    """
    foreign = recipe.evaluation.foreign
    return load_text(recipe.text), None if foreign is None else text_of_file(foreign, recipe.text.column)


def judging_streams(
    recipe: LanguageModelRecipe, text: Text, foreign: str | None, tokenizer: Any, vocab_size: int | None
) -> dict[str, Tensor]:
    """Tokens ``[T]`` to judge by: ``held_out`` and, if there is one, ``foreign``.

    Raises:
        DataError: a text has fewer than two tokens, or some that the network does not know.
    """
    texts = {HELD_OUT: text.held_out} | ({} if foreign is None else {FOREIGN: foreign})
    streams = {
        name: token_stream(tokenizer, each, vocab_size)[: recipe.evaluation.tokens] for name, each in texts.items()
    }
    for name, stream in streams.items():
        if len(stream) < 2:
            raise DataError(f"The text '{name}' has one token, but at least two are needed: give more text.")
    return streams


def read_sequences(recipe: LanguageModelRecipe, text: Text, tokenizer: Any, vocab_size: int | None) -> Tensor:
    """Calibration sequences of the text, ``[n, length]``; errors as :func:`token_sequences`."""
    asked = recipe.text
    return token_sequences(
        tokenizer, text.calibration, asked.length, asked.count, seed=recipe.seed, vocab_size=vocab_size
    )


def with_generated(
    recipe: LanguageModelRecipe, net: nn.Module, tokenizer: Any, read: Tensor, progress: Progress = silent
) -> Tensor:
    """Sequences of the text ``[n, T]`` and those that the network says, mixed: ``[n + generated, T]``."""
    if not recipe.generated:
        return read
    progress("calibration", 0, recipe.generated, "the network says its own sequences")
    said = generate_calibration(net, tokenizer, recipe.generated, read.shape[1], seed=recipe.seed)
    progress("calibration", recipe.generated, recipe.generated, "")
    return mixed(read, said)


def mixed(first: Tensor, second: Tensor) -> Tensor:
    """The rows of two tensors, each in its order, both spread evenly, so that every first part has its share."""
    places = torch.cat([(torch.arange(len(each)) + 0.5) / len(each) for each in (first, second)])
    return torch.cat([first, second])[places.argsort(stable=True)]


def judged(
    net: nn.Module, streams: Mapping[str, Tensor], recipe: PerplexityRecipe, tell: Progress = silent
) -> dict[str, dict[str, Any]]:
    """Perplexity on each text, as plain JSON: None stands for an infinite one."""
    found = {}
    for done, (name, stream) in enumerate(streams.items()):
        tell("perplexity", done, len(streams), name)
        result = perplexity(net, stream, window=recipe.window, stride=recipe.stride, batch_size=recipe.batch_size)
        found[name] = {**asdict(result), "perplexity": finite(result.perplexity), "nll": finite(result.nll)}
    tell("perplexity", len(streams), len(streams), "")
    return found


def finite(value: float) -> float | None:
    """The value, or None where JSON has no number for it."""
    return value if math.isfinite(value) else None
