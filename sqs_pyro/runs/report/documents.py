"""What a page of a run is made of: the documents in its directory."""

import csv
from pathlib import Path
from typing import Any

from sqs_pyro.documents import parse_yaml, read_json_object
from sqs_pyro.errors import OutputError
from sqs_pyro.runs.directory import HISTORY, LAYERS, RECIPE, read_run
from sqs_pyro.runs.seal import check_sealed

_LONGEST_HISTORY = 1 << 26  # bytes, as of a JSON document


def run_documents(directory: Path) -> dict[str, Any]:
    """Return what a run, finished or about to be, has measured and been asked for.

    Returns:
        ``metrics`` and, where they are there, ``bounds``, ``recipe``, ``recipe_text``, ``history`` (rows of texts)
        and ``layers``.

    Raises:
        OutputError: the directory is no finished run, or a file in it is not as the run wrote it.
        RecipeError: so is its recipe.
    """
    found = read_run(directory)
    check_sealed(directory, only=(RECIPE, HISTORY, LAYERS))
    if (path := directory / RECIPE).is_file():
        found["recipe_text"] = path.read_text(encoding="utf-8")
        found["recipe"] = parse_yaml(found["recipe_text"], f"Recipe '{path}'")
    if (path := directory / HISTORY).is_file():
        found["history"] = _history(path)
    if (path := directory / LAYERS).is_file():
        found["layers"] = read_json_object(path, OutputError, "run it again")["layers"]
    return found


def _history(path: Path) -> list[dict[str, str]]:
    with path.open(encoding="utf-8", newline="") as file:
        text = file.read(_LONGEST_HISTORY)
    return list(csv.DictReader(text.splitlines()))
