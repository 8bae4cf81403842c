"""Text for language models: what a compression is calibrated on, and what it is judged by."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from pydantic import Field

from sqs_pyro.data.rows import is_file
from sqs_pyro.data.text_sources import documents_in_file, documents_of_hub, pydoc_documents
from sqs_pyro.errors import DataError
from sqs_pyro.recipes import RecipeSection

PYDOC = "pydoc"
ONE_IN = 4  # a quarter of the text is held out where nothing else is said
_BETWEEN_DOCUMENTS = "\n\n"


class TextRecipe(RecipeSection):
    """Which text, and how it is cut into sequences of tokens.

    Attributes:
        source: `pydoc` (the topics of Python's own help, 0.7 MB of technical English), a file (.txt; .json, .jsonl
            or .csv with a column of texts), or the name of a data set on the Hugging Face hub.
        held_out: where the held-out text is: a file, or another split of the hub's data set; None holds out the
            last quarter of the documents (rows; paragraphs of a .txt), of `pydoc` every fourth topic.
        column: in which the texts are; `pydoc` and .txt need none.
        subset: configuration of the hub's data set, such as `wikitext-2-raw-v1`.
        split: of the hub's data set, to calibrate on.
        length: tokens in a calibration sequence.
        count: calibration sequences, drawn from the whole text; None takes all.
    """

    source: str = Field(default=PYDOC, min_length=1)
    held_out: str | None = Field(default=None, min_length=1)
    column: str = Field(default="text", min_length=1)
    subset: str | None = None
    split: str = Field(default="train", min_length=1)
    length: int = Field(default=256, ge=2)
    count: int | None = Field(default=128, ge=1)


@dataclass(frozen=True)
class Text:
    """Two texts of the same kind that share no document.

    Attributes:
        calibration: to compress with.
        held_out: never seen by the compression: to measure its perplexity.
        name: of the source.
    """

    calibration: str
    held_out: str
    name: str


def load_text(recipe: TextRecipe) -> Text:
    """Read the text that a recipe names, and hold out a part of its documents; no randomness anywhere.

    Raises:
        DataError: a missing or unreadable file, a missing column, no text, or a hub that cannot be reached.
    """
    documents = pydoc_documents() if recipe.source == PYDOC else _documents(recipe, recipe.source, recipe.split)
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


def _documents(recipe: TextRecipe, source: str, split: str) -> list[str]:
    if is_file(source):
        return documents_in_file(Path(source), recipe.column)
    return documents_of_hub(source, recipe.subset, split, recipe.column)


def _other_documents(recipe: TextRecipe, held_out: str) -> list[str]:
    """Return a file beside any source, or another split beside a data set of the hub."""
    of_hub = recipe.source != PYDOC and not is_file(recipe.source)
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
    return Text(joined[0], joined[1], Path(recipe.source).name if is_file(recipe.source) else recipe.source)
