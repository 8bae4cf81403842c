"""Examples of a task from files or from the hub, and which of them are held out."""

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, ClassVar, TypeVar

from pydantic import Field

from sqs_pyro.data.rows import is_file, rows_in_file, rows_of_hub
from sqs_pyro.data.splits import MOST_HELD_OUT
from sqs_pyro.data.text import PYDOC
from sqs_pyro.errors import DataError
from sqs_pyro.recipes import RecipeSection
from sqs_pyro.tasks.task import Parts

Example = TypeVar("Example")

#: From rows and the name of their source, for messages, to examples; raises DataError.
Reader = Callable[[Iterable[Any], str], list[Example]]
#: From examples and a number to what is kept and the number that is held out.
HoldOut = Callable[[Sequence[Example], int], tuple[list[Example], list[Example]]]


class TextData(RecipeSection):
    """Which text, and how it is cut into minibatches.

    Attributes:
        source: a file (.json, .jsonl, .csv), or the name of a data set on the Hugging Face hub.
        subset: configuration of the hub's data set.
        split: of the hub's data set, to train on.
        validation: a file, or another split, for every choice; None holds out a tenth of the training examples, at
            most 5,000.
        test: a file, or another split, for the final figures; None holds out as many again.
        max_length: tokens of an example that the network sees at most; what is longer is cut off.
        batch_size: examples in a training minibatch.
        evaluation_batch_size: examples in a minibatch of validation and test.
        limit: the first so many examples of each file or split, to try a recipe with.
    """

    later_keys: ClassVar[frozenset[str]] = frozenset({"limit"})

    source: str = Field(min_length=1)
    subset: str | None = None
    split: str = Field(default="train", min_length=1)
    validation: str | None = Field(default=None, min_length=1)
    test: str | None = Field(default=None, min_length=1)
    max_length: int = Field(default=128, ge=8)
    batch_size: int = Field(default=32, ge=1)
    evaluation_batch_size: int = Field(default=64, ge=1)
    limit: int | None = Field(default=None, ge=20)


def read_parts(
    data: TextData, read: Reader[Example], hold_out: HoldOut[Example] | None = None
) -> Parts[list[Example]]:
    """Return all examples that a recipe names, made of rows; errors as :func:`split_parts`."""
    return split_parts(data, lambda where: read(*_rows(data, where)), hold_out)


def split_parts(
    data: TextData, part: Callable[[str], list[Example]], hold_out: HoldOut[Example] | None = None
) -> Parts[list[Example]]:
    """Return all examples that a recipe names, some of them held out where it names none for a part.

    Args:
        data: the recipe.
        part: the examples of a file, or of a split of the data set.
        hold_out: by default the end: neighbours may be of one document, which then stays on one side.

    Raises:
        DataError: as ``part``; there is no example, or there are too few to hold some out.
    """
    keep = hold_out or _last
    if data.limit is not None:
        whole, few = part, slice(data.limit)

        def part(where: str) -> list[Example]:
            return whole(where)[few]

    train = _not_empty(part, data.source if is_file(data.source) or data.source == PYDOC else data.split)
    test, validation = (
        None if where is None else _not_empty(part, where) for where in (data.test, data.validation)
    )
    # A number for both, taken before either: the one that is held out second is not smaller.
    held_out = max(1, min(len(train) // 10, MOST_HELD_OUT))
    missing = [test, validation].count(None)
    if len(train) <= missing * held_out:
        raise DataError(
            f"'{data.source}' has {len(train)} examples, too few to hold some out for validation and test: give "
            "more, or files or splits as `validation` and `test`."
        )
    # The test part first: whether validation is a file of its own does not change which examples it has.
    if test is None:
        train, test = keep(train, held_out)
    if validation is None:
        train, validation = keep(train, held_out)
    return Parts(train, validation, test)


def _not_empty(part: Callable[[str], list[Example]], where: str) -> list[Example]:
    found = part(where)
    if not found:
        raise DataError(f"'{where}' has no example: give a file or split that is not empty.")
    return found


def _last(examples: Sequence[Example], held_out: int) -> tuple[list[Example], list[Example]]:
    return list(examples[:-held_out]), list(examples[-held_out:])


def _rows(data: TextData, where: str) -> tuple[Iterable[Any], str]:
    """Return the rows of a file or of a split of the data set, and what to call them."""
    if is_file(where):
        return rows_in_file(Path(where)), f"'{where}'"
    if is_file(data.source):
        raise DataError(
            f"'{where}' is no file that can be read here, and '{data.source}' has no splits: give a file "
            "(.json, .jsonl, .csv)."
        )
    return rows_of_hub(data.source, data.subset, where), f"Split '{where}' of data set '{data.source}'"
