"""Whether a cell's finished run is still of its recipe, and of the data and weights that the recipe names."""

from collections.abc import Callable
from pathlib import Path

from sqs_pyro.documents import read_json_object, read_yaml
from sqs_pyro.errors import DataError, OutputError, RecipeError
from sqs_pyro.fingerprint import Fingerprint, fingerprint, first_difference
from sqs_pyro.runs.directory import MADE_OF, METRICS, RECIPE, check_output
from sqs_pyro.runs.recipe import WholeRecipe
from sqs_pyro.runs.seal import check_sealed
from sqs_pyro.studies.recipe import Cell

MadeOf = Callable[[Cell], Fingerprint]
_NAMES = {"network": "weights"}  # what a fingerprint's part is called in a sentence about a cell


def check_cell(directory: Path, cell: Cell, now: MadeOf, *, overwrite: bool) -> None:
    """Check that a cell may be run in a directory, or need not.

    Raises:
        OutputError: something else is in it, or the finished run of another recipe that may not be overwritten.
    """
    if overwrite or not (directory / METRICS).exists():
        check_output(directory, cell.recipe.as_yaml(), overwrite=overwrite)
    elif why := why_again(directory, cell, now):
        raise OutputError(
            f"'{directory}' holds a finished run of {why}: choose another output directory, or run it again with "
            "--overwrite."
        )


def why_again(directory: Path, cell: Cell, now: MadeOf) -> str | None:
    """Return what a directory holds that is not the finished run of just this recipe and data, or None if it is.

    Keys that came later have their defaults.

    Raises:
        OutputError: a file of the finished run was altered.
    """
    if not (directory / METRICS).exists():
        return "nothing"  # or an unfinished run, which the run itself goes on with or refuses
    check_sealed(directory)
    try:
        kept = cell.kind.parse(read_yaml(directory / RECIPE))
    except RecipeError:  # a key that is no more, or a file that was cut
        return "another recipe"
    # As recipes, not as text: defaults are filled in, so that a key that came later makes no difference. Who is
    # told of a run has no part in what comes of it.
    if kept.model_copy(update={"loggers": cell.recipe.loggers}) != cell.recipe:
        return _changed_keys(kept, cell.recipe)
    return _difference(directory, cell, now)


def made_of_now() -> MadeOf:
    """Return a function that tells what cells are made of now; what several share is read once."""
    known: dict[tuple[str, int], Fingerprint] = {}

    def now(cell: Cell) -> Fingerprint:
        # Cells with the same baseline name the same network and data; the seed orders the data.
        key = cell.kind.baseline_key(cell.recipe), cell.seed
        if key not in known:
            known[key] = cell.kind.made_of(cell.recipe)
        return known[key]

    return now


def _changed_keys(kept: WholeRecipe, recipe: WholeRecipe) -> str:
    found = first_difference(
        fingerprint(kept.model_dump(mode="json"), {}, {}), fingerprint(recipe.model_dump(mode="json"), {}, {})
    )
    return "another recipe" if found is None else f"another recipe ({found[1]})"


def _difference(directory: Path, cell: Cell, now: MadeOf) -> str | None:
    """Return how data or weights differ from those of a finished run, as a clause; None if they do not.

    A run of an older version did not say, and data that is not here any more cannot be asked.
    """
    path = directory / MADE_OF
    if not path.is_file():
        return None
    try:
        found = first_difference(read_json_object(path, OutputError, "run it again"), now(cell))
    except (DataError, FileNotFoundError):
        return None
    return None if found is None else f"other {_NAMES.get(found[0], found[0])} ({found[1]})"
