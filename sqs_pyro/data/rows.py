"""Rows of named columns, from a file or from the Hugging Face hub."""

import csv
import importlib
import io
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from sqs_pyro.documents import parse_json, shown
from sqs_pyro.errors import DataError
from sqs_pyro.extras import needed_for

ROW_TYPES = (".json", ".jsonl", ".csv")
FILE_TYPES = (".txt", *ROW_TYPES)


def is_file(source: str) -> bool:
    """Return whether a source is a file's path, there or not, rather than the name of a data set."""
    return Path(source).suffix.lower() in FILE_TYPES or Path(source).is_file()


def rows_in_file(path: Path) -> list[Any]:
    """Return the rows of a .json, .jsonl or .csv file, as they stand there: mappings, if the file is right.

    Args:
        path: UTF-8. A .json file holds a list of objects, or an object with such a list as ``data``; a .jsonl file
            an object a line; a .csv file its columns' names in the first line.

    Raises:
        DataError: no such file, another kind of file, or a file that cannot be read.
    """
    kind = path.suffix.lower()
    if kind not in ROW_TYPES:
        raise DataError(f"'{path}' has no rows that can be read here: give a file in {', '.join(ROW_TYPES)}.")
    return _READERS[kind](content_of(path), path)


def content_of(path: Path) -> str:
    """Return what a UTF-8 file holds.

    Raises:
        DataError: no such file, no UTF-8, or nothing but space in it.
    """
    if not path.is_file():
        raise DataError(f"Text file '{path}' was not found: correct the path.")
    try:
        content = path.read_text(encoding="utf-8-sig")  # spreadsheets begin files with a byte-order mark
    except UnicodeDecodeError as error:
        raise DataError(f"Text file '{path}' is not UTF-8 (byte {error.start}): convert it.") from None
    except OSError as error:
        raise DataError(f"Text file '{path}' cannot be read: {error.strerror}.") from None
    if not content.strip():
        raise DataError(f"Text file '{path}' is empty: give one with text in it.")
    return content


def rows_of_hub(name: str, subset: str | None, split: str) -> Iterable[Any]:
    """Return the rows of a data set of the Hugging Face hub, or of the local cache.

    Raises:
        MissingPackageError: the package ``datasets`` is not installed.
        DataError: the hub cannot be reached or has no such data set.
    """
    file = f"give a file ({', '.join(FILE_TYPES)}) or 'pydoc' as `source`"
    with needed_for(f"Data sets of the Hugging Face hub such as '{name}'", otherwise=file):
        datasets = importlib.import_module("datasets")  # heavy, and only needed here
    try:
        return datasets.load_dataset(name, subset, split=split)
    except Exception as error:  # whatever its transport raises; the sentence hands it on
        raise DataError(
            f"Split '{split}' of data set '{name}' could not be loaded from the Hugging Face hub ({error}): check "
            f"the name and the connection, or give a file ({', '.join(FILE_TYPES)}) or 'pydoc' as `source`."
        ) from error


def cell(row: Any, column: str, number: int, what: str) -> Any:
    """Return a row's value in a column.

    Args:
        row: as read.
        column: its name.
        number: of the row, from 1, for the message.
        what: the source, for the message.

    Raises:
        DataError: the row is no mapping, or has no such column.
    """
    if not isinstance(row, Mapping) or column not in row:
        # Bounded: rows may have thousands of columns, or names of any length.
        names = ", ".join(map(str, list(row)[:20]))[:200] if isinstance(row, Mapping) else ""
        there = names or f"none (a {type(row).__name__})"
        raise DataError(f"{what} has no column '{column}' in row {number}: its columns are {there}.")
    return row[column]


def text_cell(row: Any, column: str, number: int, what: str) -> str:
    """Return a row's text in a column; as :func:`cell`, and a value that is no text is an error, too."""
    value = cell(row, column, number, what)
    if not isinstance(value, str):
        raise DataError(
            f"{what} has {shown(value)} in column '{column}' of row {number}, which is no text: remove the "
            "row or name another column."
        )
    return value


def _json_rows(content: str, path: Path) -> list[Any]:
    rows = parse_json(content, DataError, f"'{path}'", "one object a line is a .jsonl file", len(content))
    if isinstance(rows, Mapping) and isinstance(rows.get("data"), list):  # as SQuAD's own files
        return rows["data"]
    if not isinstance(rows, list):
        raise DataError(f"'{path}' holds a {type(rows).__name__}, but must hold a list of objects.")
    return rows


def _jsonl_rows(content: str, path: Path) -> list[Any]:
    lines = enumerate(content.split("\n"), 1)  # not splitlines(): JSON may hold U+2028 as it is
    return [
        parse_json(line, DataError, f"Line {number} of '{path}'", "give an object a line", len(line))
        for number, line in lines
        if line.strip()
    ]


def _csv_rows(content: str, path: Path) -> list[Any]:
    try:
        return list(csv.DictReader(io.StringIO(content, newline=""), strict=True))
    except csv.Error as error:
        raise DataError(f"'{path}' cannot be read as CSV: {error}; a .jsonl file has no such limits.") from None


_READERS = {".json": _json_rows, ".jsonl": _jsonl_rows, ".csv": _csv_rows}
