"""Text for language models: what a compression is calibrated on, and what it is judged by."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

from pydantic import Field, model_validator

from sqs_pyro.data.rows import is_file
from sqs_pyro.data.text_sources import documents_in_file, documents_of_hub, pydoc_documents, stdlib_documents
from sqs_pyro.errors import DataError
from sqs_pyro.recipes import RecipeSection

PYDOC, STDLIB = "pydoc", "stdlib"
_OF_PYTHON = {PYDOC: pydoc_documents, STDLIB: stdlib_documents}
ONE_IN = 4  # a quarter of the text is held out where nothing else is said
_BETWEEN_DOCUMENTS = "\n\n"


class TextRecipe(RecipeSection):
    """Which text, and how it is cut into sequences of tokens.

    Attributes:
        source: `pydoc` (the topics of Python's own help, 0.7 MB of technical English), `stdlib` (the code of its
            library), a file (.txt; .json, .jsonl or .csv with a column of texts), or the name of a data set on the
            Hugging Face hub.
        further: sources that are calibrated on, too, and never judged by: what text of many kinds has calibrated
            loses less on text of yet another. Data sets of the hub are their default configuration.
        held_out: where the held-out text is: a file, or another split of the hub's data set; None holds out the
            last quarter of the documents (rows; paragraphs of a .txt; modules), of `pydoc` every fourth topic.
        column: in which the texts are; `pydoc`, `stdlib` and .txt need none.
        subset: configuration of the hub's data set, such as `wikitext-2-raw-v1`.
        split: of the hub's data set, to calibrate on.
        length: tokens in a calibration sequence.
        count: calibration sequences, drawn from the whole text, of each source; None takes all.
    """

    source: str = Field(default=PYDOC, min_length=1)
    further: tuple[Annotated[str, Field(min_length=1)], ...] = ()
    held_out: str | None = Field(default=None, min_length=1)
    column: str = Field(default="text", min_length=1)
    subset: str | None = None
    split: str = Field(default="train", min_length=1)
    length: int = Field(default=256, ge=2)
    count: int | None = Field(default=128, ge=1)

    @model_validator(mode="after")
    def _each_text_has_one_purpose(self) -> "TextRecipe":
        named = [self.source, *self.further, *([] if self.held_out is None else [self.held_out])]
        if self.further and len(set(named)) < len(named):
            twice = next(each for each in named if named.count(each) > 1)
            raise ValueError(f"sources of which none is given twice, as source, held_out or in further: '{twice}'")
        return self


@dataclass(frozen=True)
class Text:
    """Two texts of the same kind that share no document.

    Attributes:
        calibration: to compress with.
        held_out: never seen by the compression: to measure its perplexity.
        name: of the source.
        further: texts of other sources to compress with, by source.
    """

    calibration: str
    held_out: str
    name: str
    further: Mapping[str, str] = field(default_factory=dict)


def load_text(recipe: TextRecipe) -> Text:
    """Read the text that a recipe names, and hold out a part of its documents; no randomness anywhere.

    Raises:
        DataError: a missing or unreadable file, a missing column, no text, or a hub that cannot be reached.
    """
    documents = _documents(recipe, recipe.source)
    if recipe.held_out is not None:
        return _text(documents, _other_documents(recipe, recipe.held_out), recipe)
    if recipe.source == PYDOC:  # whose topics are whole documents: every fourth is a fair sample
        kept = [text for i, text in enumerate(documents) if i % ONE_IN != ONE_IN - 1]
        return _text(kept, documents[ONE_IN - 1 :: ONE_IN], recipe)
    # The end, not every fourth: neighbouring rows and paragraphs may be parts of one document.
    last = -(-len(documents) // ONE_IN)
    return _text(documents[:-last], documents[-last:], recipe)


def text_of_file(path: str | Path, column: str = "text") -> str:
    """Return all of a text file, or of a column of a .json, .jsonl or .csv file.

    Raises:
        DataError: as :func:`~sqs_pyro.data.text_sources.documents_in_file`.
    """
    return _BETWEEN_DOCUMENTS.join(documents_in_file(Path(path), column))


def _documents(recipe: TextRecipe, source: str) -> list[str]:
    if source in _OF_PYTHON:
        return _OF_PYTHON[source]()
    if is_file(source):
        return documents_in_file(Path(source), recipe.column)
    subset = recipe.subset if source == recipe.source else None
    return documents_of_hub(source, subset, recipe.split, recipe.column)


def _other_documents(recipe: TextRecipe, held_out: str) -> list[str]:
    """Return a file beside any source, or another split beside a data set of the hub."""
    of_hub = recipe.source not in _OF_PYTHON and not is_file(recipe.source)
    if of_hub and not is_file(held_out):
        return documents_of_hub(recipe.source, recipe.subset, held_out, recipe.column)
    return documents_in_file(Path(held_out), recipe.column)


def _text(calibration: Sequence[str], held_out: Sequence[str], recipe: TextRecipe) -> Text:
    joined = [_BETWEEN_DOCUMENTS.join(documents) for documents in (calibration, held_out)]
    for text, what in zip(joined, ("to calibrate on", "to hold out"), strict=True):
        if not text.strip():
            raise DataError(
                f"'{recipe.source}' leaves no text {what}: give more text, or another file or split as `held_out`."
            )
    further = {source: _BETWEEN_DOCUMENTS.join(_documents(recipe, source)) for source in recipe.further}
    name = Path(recipe.source).name if is_file(recipe.source) else recipe.source
    return Text(joined[0], joined[1], name, further)
