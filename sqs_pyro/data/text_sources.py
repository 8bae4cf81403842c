"""Where documents come from: Python's own help, a file, the Hugging Face hub; each as a list of texts."""

import csv
import importlib
import io
import json
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from sqs_pyro.errors import DataError

FILE_TYPES = (".txt", ".json", ".jsonl", ".csv")


def pydoc_documents() -> list[str]:
    """Python's help topics, ordered by name; the text is that of the Python version that runs."""
    from pydoc_data import topics  # 0.7 MB, and only needed here

    return [topics.topics[name] for name in sorted(topics.topics)]


def documents_in_file(path: Path, column: str) -> list[str]:
    """The paragraphs of a .txt file, or the texts in a column of a .json, .jsonl or .csv file.

    Args:
        path: UTF-8. A .json file holds a list of objects, a .jsonl file an object a line, a .csv file its columns'
            names in the first line.
        column: or key of each object.

    Raises:
        DataError: no such file, another kind of file, a file that cannot be read, no such column, no text.
    """
    kind = path.suffix.lower()
    if kind not in FILE_TYPES:
        raise DataError(f"'{path}' is no text that can be read here: give a file in {', '.join(FILE_TYPES)}.")
    if not path.is_file():
        raise DataError(f"Text file '{path}' was not found: correct the path.")
    try:
        content = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(f"Text file '{path}' is not UTF-8 (byte {error.start}): convert it.") from None
    if not content.strip():
        raise DataError(f"Text file '{path}' is empty: give one with text in it.")
    if kind == ".txt":
        return [paragraph for paragraph in re.split(r"\n\s*\n", content) if paragraph.strip()]
    return _column(_ROWS[kind](content, path), column, f"'{path}'")


def documents_of_hub(name: str, subset: str | None, split: str, column: str) -> list[str]:
    """The texts in a column of a data set of the Hugging Face hub, or of the local cache.

    Raises:
        DataError: the package ``datasets`` is missing, the hub cannot be reached or has no such data set, or there
            is no such column.
    """
    try:
        datasets = importlib.import_module("datasets")  # heavy, optional, and only needed here
    except ImportError:
        raise DataError(
            f"Data set '{name}' of the Hugging Face hub needs the package 'datasets': install it "
            f"(pip install datasets), or give a file ({', '.join(FILE_TYPES)}) or 'pydoc' as `source`."
        ) from None
    try:
        rows = datasets.load_dataset(name, subset, split=split)
    except Exception as error:  # whatever its transport raises; the sentence hands it on
        raise DataError(
            f"Split '{split}' of data set '{name}' could not be loaded from the Hugging Face hub ({error}): check "
            f"the name and the connection, or give a file ({', '.join(FILE_TYPES)}) or 'pydoc' as `source`."
        ) from error
    return _column(rows, column, f"Data set '{name}'")


def _json_rows(content: str, path: Path) -> list[Any]:
    try:
        rows = json.loads(content)
    except json.JSONDecodeError as error:
        raise DataError(f"'{path}' is not JSON: {error}; one object a line is a .jsonl file.") from None
    if not isinstance(rows, list):
        raise DataError(f"'{path}' holds a {type(rows).__name__}, but must hold a list of objects.")
    return rows


def _jsonl_rows(content: str, path: Path) -> list[Any]:
    rows = []
    for number, line in enumerate(content.split("\n"), 1):  # not splitlines(): JSON may hold U+2028 as it is
        if line.strip():
            try:
                rows.append(json.loads(line))
            except json.JSONDecodeError as error:
                raise DataError(
                    f"Line {number} of '{path}' is not JSON: {error}; give an object a line."
                ) from None
    return rows


def _csv_rows(content: str, path: Path) -> list[Any]:
    try:
        return list(csv.DictReader(io.StringIO(content, newline=""), strict=True))
    except csv.Error as error:
        raise DataError(f"'{path}' cannot be read as CSV: {error}; a .jsonl file has no such limits.") from None


_ROWS = {".json": _json_rows, ".jsonl": _jsonl_rows, ".csv": _csv_rows}


def _column(rows: Iterable[Any], column: str, what: str) -> list[str]:
    texts = []
    for number, row in enumerate(rows, 1):
        if not isinstance(row, Mapping) or column not in row:
            there = ", ".join(map(str, row)) if isinstance(row, Mapping) else f"none (a {type(row).__name__})"
            raise DataError(f"{what} has no column '{column}' in row {number}: its columns are {there}.")
        if not isinstance(row[column], str):
            raise DataError(
                f"{what} has {row[column]!r} in column '{column}' of row {number}, which is no text: remove the "
                "row or name another column."
            )
        texts.append(row[column])
    if not any(text.strip() for text in texts):
        raise DataError(f"{what} has no text in column '{column}': name another column.")
    return [text for text in texts if text.strip()]
