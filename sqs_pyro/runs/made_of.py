"""What a finished run was made of: its recipe names files, whose content may have changed since."""

from collections.abc import Callable
from functools import cache
from hashlib import file_digest
from pathlib import Path

from sqs_pyro.data import load_data
from sqs_pyro.documents import read_json_object
from sqs_pyro.errors import DataError, OutputError
from sqs_pyro.fingerprint import Fingerprint, fingerprint, first_difference, loader_fingerprint
from sqs_pyro.runs.directory import write_json
from sqs_pyro.runs.recipe import RunRecipe

MADE_OF = "fingerprint.json"
_NAMES = {"network": "weights"}


def write_made_of(directory: Path, recipe: RunRecipe) -> None:
    """Write the fingerprint of what a run's recipe names now into its directory."""
    write_json(directory / MADE_OF, made_of(recipe))


def made_of(recipe: RunRecipe) -> Fingerprint:
    """The fingerprint of data and weights that a recipe names.

    Raises:
        DataError: the data is not there.
    """
    data = load_data(recipe.data, recipe.seed)
    loaders = {"training": data.train, "validation": data.validation, "test": data.test}
    said = {
        f"{name} {key}": value
        for name, loader in loaders.items()
        for key, value in loader_fingerprint(loader).items()
    }
    weights = recipe.baseline.checkpoint
    network = {} if weights is None else {str(weights): f"file digest {_digest(Path(weights))}"}
    return fingerprint({}, network, said)


def difference(directory: Path, recipe: RunRecipe, now: Callable[[RunRecipe], Fingerprint]) -> str | None:
    """How data or weights differ from those that a finished run was made of, as a clause; None if they do not.

    A run of an older version did not say, and data that is not here any more cannot be asked.
    """
    path = directory / MADE_OF
    if not path.is_file():
        return None
    try:
        found = first_difference(read_json_object(path, OutputError, "run it again"), now(recipe))
    except (DataError, FileNotFoundError):
        return None
    return None if found is None else f"other {_NAMES.get(found[0], found[0])} ({found[1]})"


def made_of_many() -> Callable[[RunRecipe], Fingerprint]:
    """:func:`made_of` for many recipes, which reads what they share once."""
    by_key: dict[str, RunRecipe] = {}

    @cache
    def known(key: str) -> Fingerprint:
        return made_of(by_key[key])

    def now(recipe: RunRecipe) -> Fingerprint:
        key = recipe.model_dump_json(include={"data": True, "seed": True, "baseline": {"checkpoint"}})
        by_key.setdefault(key, recipe)
        return known(key)

    return now


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return file_digest(file, "sha256").hexdigest()[:16]
