"""The whole recipe of a language model's run, and the texts that it names: to calibrate on, and to judge by."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from sqs_pyro.compression.blockwise.recipe import ROUNDING, BlockwiseRecipe
from sqs_pyro.compression.blockwise.search import BitsSearchRecipe
from sqs_pyro.data.generation import generate_calibration
from sqs_pyro.data.text import Text, TextRecipe, load_text, text_of_file
from sqs_pyro.data.tokens import token_sequences, token_stream
from sqs_pyro.errors import DataError, NetworkError, RecipeError
from sqs_pyro.evaluation.perplexity import perplexity
from sqs_pyro.integrations.pretrained_recipe import PretrainedRecipe
from sqs_pyro.networks.tokens import longest_input
from sqs_pyro.recipes import RecipeSection, parse
from sqs_pyro.runs.bookkeeping import Progress, silent
from sqs_pyro.runs.recipe import WholeRecipe, changed, with_seed

HELD_OUT, FOREIGN, VALIDATION = "held_out", "foreign", "validation"


class PerplexityRecipe(RecipeSection):
    """How fp32 network and packed file are judged: perplexity on held-out text, and on text of another kind.

    Attributes:
        window: tokens in a call of the network.
        stride: tokens by which the window moves, at most `window`; a smaller one gives every token more context.
        tokens: of each text, its first; None takes all.
        foreign: a file of text of another kind than that of the calibration (.txt; .json, .jsonl or .csv with the
            column `text.column`).
        batch_size: windows in a call of the network.
    """

    window: int = Field(default=512, ge=1)
    stride: int = Field(default=256, ge=1)
    tokens: int | None = Field(default=16384, ge=2)
    foreign: Path | None = None
    batch_size: int = Field(default=1, ge=1)

    @model_validator(mode="after")
    def _stride_leaves_no_gap(self) -> "PerplexityRecipe":
        if self.stride > self.window:
            raise ValueError(f"a window of at least the stride, {self.stride}: tokens would be left out")
        return self


class LanguageModelRecipe(WholeRecipe):
    """A run of `sqs compress` on a language model.

    Attributes:
        seed: of everything random: which text is read, what the network says, compression.
        network: which network.
        text: on which text it is calibrated, and which is held out.
        generated: calibration sequences that the network says itself, beside those of the text; 0 for none.
        blockwise: how it is compressed. This key tells a language model's recipe from others. Its `seed` is the
            run's unless it is given.
        search: for the fewest bits at which so much is lost on validation text, which is as many tokens of the
            held-out text as `evaluation.tokens`, those that follow on them.
        evaluation: how it is judged.
    """

    network: PretrainedRecipe
    text: TextRecipe = Field(default_factory=TextRecipe)
    generated: int = Field(default=0, ge=0)
    blockwise: BlockwiseRecipe = Field(default_factory=BlockwiseRecipe)
    search: BitsSearchRecipe | None = None
    evaluation: PerplexityRecipe = Field(default_factory=PerplexityRecipe)

    @model_validator(mode="before")
    @classmethod
    def _compression_follows_the_seed(cls, values: Any) -> Any:
        return with_seed(values, "blockwise")

    @model_validator(mode="after")
    def _streamed_weights_are_read_block_by_block(self) -> "LanguageModelRecipe":
        if self.blockwise.streamed and self.generated:
            raise ValueError(
                f"generated: 0 beside blockwise.streamed, but is {self.generated}: every token that the network "
                "said would read the whole checkpoint"
            )
        if self.blockwise.streamed and self.network.gguf_file is not None:
            raise ValueError(
                f"a checkpoint of safetensors files beside blockwise.streamed: '{self.network.gguf_file}' is none"
            )
        return self

    @model_validator(mode="after")
    def _a_foreign_text_is_foreign(self) -> "LanguageModelRecipe":
        foreign = self.evaluation.foreign
        if foreign is not None and str(foreign) in (self.text.source, *self.text.further):
            raise ValueError(
                f"another file as evaluation.foreign than the texts that are calibrated on, but '{foreign}' is one"
            )
        return self

    @model_validator(mode="after")
    def _a_search_has_bits_and_text(self) -> "LanguageModelRecipe":
        if self.search is not None and self.blockwise.method in ROUNDING:
            raise ValueError(
                f"no search beside blockwise.method: {self.blockwise.method}, whose codes have a fixed width: "
                "leave out one of them"
            )
        if self.search is not None and self.blockwise.bits is None:
            raise ValueError(
                f"blockwise.bits, to begin with, beside search, not megabytes ({self.blockwise.megabytes:g}), "
                "which would decide the size"
            )
        if self.search is not None and self.evaluation.tokens is None:
            raise ValueError(
                "a number as evaluation.tokens beside search, whose validation text is what the held-out text has "
                "beyond them"
            )
        return self


def checkpoint_recipe(
    checkpoint: Path, sequences: int, length: int, changes: Sequence[str] = (), *, whole: bool = False
) -> LanguageModelRecipe:
    """Return the recipe that a plan of a checkpoint is for: one block at a time, unless it says otherwise.

    Args:
        checkpoint: directory with ``config.json``.
        sequences, length: n and T of the calibration.
        changes: ``"bits=3"``: keys of ``blockwise``, in YAML notation.
        whole: the network is in memory as a whole.

    Raises:
        NetworkError, RecipeError: one sentence.
    """
    # Who asks what fits into memory wants to know the least; these two belong together.
    start = {} if whole else {"streamed": True, "allocation": "even"}
    blockwise = changed(start, changes)
    if blockwise.get("streamed") is True and blockwise.get("allocation") == "importance":
        raise NetworkError(
            "Allocation 'importance' needs gradients through the whole network: add --whole, or take "
            "allocation=even."
        )
    parse(BlockwiseRecipe, blockwise, "blockwise")  # by itself, so that sentences name the key as it was given
    text = {"count": sequences, "length": length}
    return parse(LanguageModelRecipe, {"network": {"path": str(checkpoint)}, "text": text, "blockwise": blockwise})


# ---- what it names ----


def load_texts(recipe: LanguageModelRecipe) -> tuple[Text, str | None]:
    """Return the text to calibrate on with what is held out of it, and the foreign text if there is one.

    Raises:
        DataError: a file is missing, unreadable or empty.
    """
    foreign = recipe.evaluation.foreign
    return load_text(recipe.text), None if foreign is None else text_of_file(foreign, recipe.text.column)


def check_lengths(net: nn.Module, recipe: LanguageModelRecipe) -> None:
    """Check that a network takes sequences as long as a recipe's.

    Raises:
        RecipeError: naming the key that is too large.
    """
    longest = longest_input(net)
    asked = {"text.length": recipe.text.length, "evaluation.window": recipe.evaluation.window}
    for key, tokens in asked.items():
        if longest is not None and tokens > longest:
            raise RecipeError(
                f"Recipe key '{key}' is {tokens}, but {type(net).__name__} takes at most {longest} tokens: give a "
                "smaller number."
            )


def judging_streams(
    recipe: LanguageModelRecipe, text: Text, foreign: str | None, tokenizer: Any, vocab_size: int | None
) -> dict[str, Tensor]:
    """Return tokens ``[T]`` to judge by: ``held_out``, and ``foreign`` and ``validation`` where there are such.

    Raises:
        DataError: a text has fewer than two tokens, or some that the network does not know.
    """
    texts = {HELD_OUT: text.held_out} | ({} if foreign is None else {FOREIGN: foreign})
    tokens = recipe.evaluation.tokens
    whole = {name: token_stream(tokenizer, each, vocab_size) for name, each in texts.items()}
    streams = {name: stream[:tokens] for name, stream in whole.items()}
    if recipe.search is not None and tokens is not None:
        held_out = whole[HELD_OUT]
        if len(held_out) < 2 * tokens:
            raise DataError(
                f"The held-out text has {len(held_out):,} tokens, but a search chooses by as many as it is judged "
                f"by: lower evaluation.tokens from {tokens:,} to {len(held_out) // 2:,}, or give more text."
            )
        streams[VALIDATION] = held_out[tokens : 2 * tokens]
    for name, stream in streams.items():
        if len(stream) < 2:  # the first token is foretold from nothing, and does not count
            raise DataError(f"The text '{name}' has one token, but at least two are needed: give more text.")
    return streams


def read_sequences(recipe: LanguageModelRecipe, text: Text, tokenizer: Any, vocab_size: int | None) -> Tensor:
    """Return calibration sequences of the texts, mixed, ``[n, length]``.

    Raises:
        DataError: naming the text that is too short, or has tokens that the network does not know.
    """
    asked, found = recipe.text, []
    # Pairs: a further file may have the name of the first, whose directory is not told.
    for name, each in [(text.name, text.calibration), *text.further.items()]:
        try:
            found.append(
                token_sequences(
                    tokenizer, each, asked.length, asked.count, seed=recipe.seed, vocab_size=vocab_size
                )
            )
        except DataError as error:
            raise DataError(f"Text '{name}': {error}") from error
    return mixed(*found)


def with_generated(
    recipe: LanguageModelRecipe, net: nn.Module, tokenizer: Any, read: Tensor, progress: Progress = silent
) -> Tensor:
    """Return sequences of the text ``[n, T]`` and those that the network says, mixed: ``[n + generated, T]``."""
    if not recipe.generated:
        return read
    progress("calibration", 0, recipe.generated, "the network says its own sequences")
    said = generate_calibration(net, tokenizer, recipe.generated, read.shape[1], seed=recipe.seed)
    progress("calibration", recipe.generated, recipe.generated, "")
    return mixed(read, said)


def mixed(*parts: Tensor) -> Tensor:
    """Mix the rows of tensors, each in its order, spread evenly: every first part has its share of each."""
    # Positions in (0, 1), half a step from either end; batches and `importance_sequences` take the first rows.
    places = torch.cat([(torch.arange(len(each)) + 0.5) / len(each) for each in parts])
    return torch.cat(parts)[places.argsort(stable=True)]


def judged(
    net: nn.Module, streams: Mapping[str, Tensor], recipe: PerplexityRecipe, tell: Progress = silent
) -> dict[str, dict[str, Any]]:
    """Return the perplexity on each text, as plain JSON: None stands for an infinite one."""
    found = {}
    for done, (name, stream) in enumerate(streams.items()):
        tell("perplexity", done, len(streams), name)
        result = perplexity(net, stream, window=recipe.window, stride=recipe.stride, batch_size=recipe.batch_size)
        found[name] = {**asdict(result), "perplexity": finite(result.perplexity), "nll": finite(result.nll)}
    tell("perplexity", len(streams), len(streams), "")
    return found


def finite(value: float) -> float | None:
    """Return the value, or None where JSON has no number for it."""
    return value if math.isfinite(value) else None
