"""Where documents come from: Python itself, a file, the Hugging Face hub; each as a list of texts."""

import re
import sysconfig
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from sqs_pyro.data.rows import FILE_TYPES, content_of, rows_in_file, rows_of_hub, text_cell
from sqs_pyro.errors import DataError


def pydoc_documents() -> list[str]:
    """Return Python's help topics, ordered by name; the text is that of the Python version that runs."""
    from pydoc_data import topics  # 0.7 MB, and only needed here

    return [topics.topics[name] for name in sorted(topics.topics)]  # the dictionary's order is nobody's promise


def stdlib_documents() -> list[str]:
    """Return the modules of Python's own library that are single files, ordered by name.

    Raises:
        DataError: this Python has no source code beside it.
    """
    directory = Path(sysconfig.get_path("stdlib"))
    found = [path.read_text(encoding="utf-8", errors="replace") for path in sorted(directory.glob("*.py"))]
    if not found:
        raise DataError(f"'{directory}' has none of Python's own source code: give another text than `stdlib`.")
    return found


def documents_in_file(path: Path, column: str) -> list[str]:
    """Return the paragraphs of a .txt file, or the texts in a column of a .json, .jsonl or .csv file.

    Args:
        path: UTF-8; rows as :func:`~sqs_pyro.data.rows.rows_in_file` reads them.
        column: or key of each object.

    Raises:
        DataError: no such file, another kind of file, a file that cannot be read, no such column, no text.
    """
    if path.suffix.lower() not in FILE_TYPES:
        raise DataError(f"'{path}' is no text that can be read here: give a file in {', '.join(FILE_TYPES)}.")
    if path.suffix.lower() == ".txt":
        return [paragraph for paragraph in re.split(r"\n\s*\n", content_of(path)) if paragraph.strip()]
    return _column(rows_in_file(path), column, f"'{path}'")


def documents_of_hub(name: str, subset: str | None, split: str, column: str) -> list[str]:
    """Return the texts in a column of a data set of the Hugging Face hub, or of the local cache.

    Raises:
        MissingPackageError: the package ``datasets`` is not installed.
        DataError: the hub cannot be reached or has no such data set, or there is no such column.
    """
    return _column(rows_of_hub(name, subset, split), column, f"Data set '{name}'")


def _column(rows: Iterable[Any], column: str, what: str) -> list[str]:
    texts = [text_cell(row, column, number, what) for number, row in enumerate(rows, 1)]
    if not any(text.strip() for text in texts):
        raise DataError(f"{what} has no text in column '{column}': name another column.")
    return [text for text in texts if text.strip()]
