"""The whole recipe of a language model's run: which network, which text, how it is compressed and judged."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import Field, model_validator

from sqs_pyro.compression.blockwise.recipe import BlockwiseRecipe
from sqs_pyro.data.text import TextRecipe
from sqs_pyro.documents import read_yaml, shown
from sqs_pyro.errors import RecipeError
from sqs_pyro.integrations.pretrained_recipe import PretrainedRecipe
from sqs_pyro.recipes import RecipeSection, parse
from sqs_pyro.runs.recipe import RunRecipe, WholeRecipe, changed, with_seed
from sqs_pyro.runs.task_recipe import TASK, TASK_RECIPES, TaskRecipe

BLOCKWISE = "blockwise"


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
        evaluation: how it is judged.
    """

    network: PretrainedRecipe
    text: TextRecipe = Field(default_factory=TextRecipe)
    generated: int = Field(default=0, ge=0)
    blockwise: BlockwiseRecipe = Field(default_factory=BlockwiseRecipe)
    evaluation: PerplexityRecipe = Field(default_factory=PerplexityRecipe)

    @model_validator(mode="before")
    @classmethod
    def _compression_follows_the_seed(cls, values: Any) -> Any:
        return with_seed(values, BLOCKWISE)


def load_any_recipe(path: str | Path, changes: Sequence[str] = ()) -> RunRecipe | LanguageModelRecipe | TaskRecipe:
    """Read and validate a recipe of any kind.

    One with the key ``blockwise`` is a language model's, one with the key ``task`` that of a task.

    Args:
        path: YAML file.
        changes: ``"blockwise.bits=3"``: values to put in place of the file's, in YAML notation.

    Raises:
        RecipeError: the file is missing or is no YAML, or a key or value in it is wrong.
    """
    return parse_any_recipe(changed(read_yaml(Path(path)), changes))


def parse_any_recipe(values: Any) -> RunRecipe | LanguageModelRecipe | TaskRecipe:
    """Validate a recipe of any kind, from YAML or from a packed file; errors as :func:`load_any_recipe`."""
    if is_language_model(values):
        return parse(LanguageModelRecipe, values)
    if not is_task(values):
        return parse(RunRecipe, values)
    if not isinstance(values[TASK], str) or values[TASK] not in TASK_RECIPES:
        raise RecipeError(
            f"Recipe key '{TASK}' is {shown(values[TASK])}, but should be one of {', '.join(TASK_RECIPES)}."
        )
    return parse(TASK_RECIPES[values[TASK]], values)


def is_language_model(values: Any) -> bool:
    """Whether a recipe's values, as read from YAML, are those of a language model."""
    return isinstance(values, Mapping) and BLOCKWISE in values


def is_task(values: Any) -> bool:
    """Whether a recipe's values, as read from YAML, are those of a task."""
    return isinstance(values, Mapping) and TASK in values
