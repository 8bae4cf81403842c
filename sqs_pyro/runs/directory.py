"""Run directories that appear under their final name only when everything in them is written.

A run works in ``NAME.partial`` beside the directory it was asked for and is renamed at the end. An
interrupted run leaves the partial directory with its checkpoint, and the same recipe takes it up again; a run
that fails because of its input leaves nothing but what was finished before.
"""

import contextlib
import csv
import io
import json
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from sqs_pyro.atomic import check_place, clean, clean_inside, one_sentence, replace_directory, write_text
from sqs_pyro.documents import read_json_object, shown
from sqs_pyro.errors import OutputError, ResourceError, SQSError
from sqs_pyro.locks import alone_in, held, lock_beside
from sqs_pyro.loggers.logger import Logger
from sqs_pyro.runs.recipe import WholeRecipe
from sqs_pyro.runs.seal import check_sealed, foreign_file, seal, unknown_file

RECIPE, METRICS, BOUNDS, CHECKPOINT = "recipe.yaml", "metrics.json", "bounds.json", "checkpoint.pt"
HISTORY, LAYERS, PAGE = "history.csv", "layers.json", "report.html"
PACKED, MADE_OF = "packed.safetensors", "fingerprint.json"
_REPAIR = "the run directory was altered, run it again"
LOGS = "logs"  # directory of what loggers keep, each in its own
BLOCKS = "blocks"  # directory of an unfinished run's finished blocks, or of a search's attempts
HUGGING_FACE = "hugging_face"  # directory that transformers loads, of a network from a GGUF file
_PARTIAL = ".partial"
_BEING_WRITTEN = ".sqs-*.part/*"  # what a killed process was writing
# before runs listed it; the page is younger, but written into older directories, too
_OLDER = (RECIPE, METRICS, BOUNDS, PACKED, PAGE, "ensemble.safetensors", "*.csv", "*.png")
_UNFINISHED = (
    *_OLDER,
    LAYERS,
    CHECKPOINT,
    MADE_OF,
    f"{HUGGING_FACE}/*",
)  # by name, as the list of digests is only written at the end


def read_run(directory: Path) -> dict[str, Any]:
    """Return what a finished run measured.

    Returns:
        ``metrics`` and, where the run has them, ``bounds``.

    Raises:
        OutputError: the directory is no finished run, or a file in it is not as the run wrote it.
    """
    if not (directory / METRICS).is_file():
        raise OutputError(
            f"'{directory}' is no finished run (it holds no {METRICS}): give one that `sqs compress` wrote."
        )
    check_sealed(directory, only=(METRICS, BOUNDS))  # a packed file of gigabytes is not read for two figures
    kept = {"metrics": directory / METRICS, "bounds": directory / BOUNDS}
    return {name: read_json_object(path, OutputError, _REPAIR) for name, path in kept.items() if path.is_file()}


@contextmanager
def reported(directory: Path) -> Iterator[None]:
    """Say in one sentence that a run's figures, which the body looks up, are not those that a run writes.

    Raises:
        OutputError: a figure is missing, or of another kind.
    """
    with understood(f"'{directory / METRICS}' or a document beside it", "sqs compress"):
        yield


@contextmanager
def understood(what: str, command: str) -> Iterator[None]:
    """Say in one sentence that a document, whose figures the body looks up, is not what a command writes.

    Raises:
        OutputError: a figure is missing, or of another kind.
    """
    try:
        yield
    except (LookupError, TypeError, ValueError, AttributeError, ArithmeticError) as error:
        if isinstance(error, SQSError):  # some are ValueErrors, too, and say it better
            raise
        said = f"it has no {shown(error.args[0], 80)}" if isinstance(error, KeyError) else shown(str(error), 200)
        raise OutputError(f"{what} is not what `{command}` writes ({said}): run it again.") from error


def write_json(path: Path, document: Mapping[str, Any]) -> None:
    """Write a document of finite numbers, readable by people too."""
    write_text(path, json.dumps(document, indent=2, allow_nan=False) + "\n")


def write_lines(path: Path, name: str, items: Sequence[Mapping[str, Any]]) -> None:
    """Write a document with one list, an item a line: of long lists of numbers, which nobody reads one by one."""
    lines = (json.dumps(item, allow_nan=False, separators=(",", ":")) for item in items)
    write_text(path, f'{{"{name}": [\n' + ",\n".join(lines) + "\n]}\n")


def write_csv(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Write rows, at least one and all with the same keys, under a line of these keys."""
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, list(rows[0]))
    writer.writeheader()
    writer.writerows(rows)
    write_text(path, text.getvalue())


def partial_directory(final: Path) -> Path:
    """Return where a run works until it is finished."""
    return final.with_name(final.name + _PARTIAL)


def run_loggers(recipe: WholeRecipe, final: Path) -> list[Logger]:
    """Return the loggers of a run that shall have the directory ``final``; nothing is written yet.

    Raises:
        MissingPackageError: what one writes to is not installed.
    """
    logs = partial_directory(final) / LOGS
    return [each.build(logs / each.name, final.parent) for each in recipe.loggers]


def check_output(final: Path, recipe_text: str, *, overwrite: bool) -> None:
    """Check that a run may write to ``final``; nothing but leftovers of killed processes is changed.

    Args:
        final: directory that the finished run shall have.
        recipe_text: the recipe as it will be written; an unfinished run is resumed only if its text is equal.
        overwrite: whether a finished run may be replaced, and an unfinished one of another recipe discarded.

    Raises:
        OutputError: ``final`` or its partial directory is in the way.
    """
    check_place(final, room=len(_PARTIAL))  # the partial name is longer, and must fit the file system as well
    clean(final)  # first, so that a killed process's leftovers are not taken for somebody's files
    _check_final(final, overwrite=overwrite)
    partial = partial_directory(final)
    _check_partial(partial)
    if _has_work(partial) and not overwrite and not _same_recipe(partial, recipe_text):
        raise OutputError(
            f"'{partial}' holds an unfinished run of another recipe: finish it with that recipe, choose "
            "another output directory, or discard it with --overwrite."
        )


def kept_checkpoint(final: Path, recipe_text: str) -> Path | None:
    """Return the checkpoint from which a run of this recipe would go on, if there is one."""
    partial = partial_directory(final)
    kept = partial / CHECKPOINT
    return kept if kept.is_file() and _same_recipe(partial, recipe_text) else None


def _check_final(final: Path, *, overwrite: bool) -> None:
    if final.exists() and not final.is_dir():
        raise OutputError(f"Output directory '{final}' cannot be made, because '{final}' is a file.")
    if not final.exists() or not any(final.iterdir()):
        return  # an empty directory may have been made for the run
    if not (final / METRICS).exists():
        raise OutputError(
            f"'{final}' exists and is no run directory (it holds no {METRICS}): choose another output directory."
        )
    if not overwrite:
        raise OutputError(
            f"'{final}' already holds a finished run: choose another output directory, or replace it with "
            "--overwrite."
        )
    # Replacing deletes what is there, but not a note or a plot that somebody has put beside the results.
    foreign = foreign_file(final, _OLDER)
    if foreign is not None:
        raise OutputError(
            f"'{final}' holds '{foreign}', which no run wrote: move it away, or choose another output directory."
        )


def _check_partial(partial: Path) -> None:
    """Check that what has the name of an unfinished run is one: it is emptied, or becomes the finished run."""
    if partial.is_symlink() or (partial.exists() and not partial.is_dir()):
        kind = "a symbolic link" if partial.is_symlink() else "a file"
        raise OutputError(f"'{partial}' is needed for the unfinished run but is {kind}: move it away.")
    whole = _UNFINISHED if (partial / RECIPE).is_file() else (CHECKPOINT,)  # a recipe is written first
    foreign = unknown_file(partial, (*whole, f"{BLOCKS}/*", f"{LOGS}/*", _BEING_WRITTEN))
    if foreign is not None:
        raise OutputError(
            f"'{partial}' is needed for the unfinished run but holds '{foreign}', which no run wrote: move it "
            "away, or choose another output directory."
        )


def _has_work(partial: Path) -> bool:
    """Whether an unfinished run has something to go on from."""
    blocks = partial / BLOCKS
    return (partial / CHECKPOINT).exists() or (blocks.is_dir() and any(blocks.iterdir()))


def _same_recipe(partial: Path, recipe_text: str) -> bool:
    recipe = partial / RECIPE
    # Bytes: a recipe that was cut in the middle of a character is another one, not an error.
    return recipe.is_file() and recipe.read_bytes() == recipe_text.encode()


@contextmanager
def run_directory(final: Path, recipe_text: str, *, overwrite: bool) -> Iterator[Path]:
    """Work in the partial directory; rename it to ``final`` when the body succeeds.

    What was there to go on from before an :class:`~sqs_pyro.errors.SQSError` in the body stays, and so do the
    checkpoint and finished blocks of a run that had no room to go on; after any other SQSError nothing is left.
    Any other interruption keeps the partial directory if it holds a checkpoint, or loggers have begun.

    Raises:
        OutputError: as :func:`check_output`, the disk is full, or another process works on the same run.
    """
    check_output(final, recipe_text, overwrite=overwrite)  # again: data was loaded since the caller's own look
    partial = partial_directory(final)
    with contextlib.ExitStack() as alone:
        with one_sentence(partial):
            partial.parent.mkdir(parents=True, exist_ok=True)
            # beside the directory, not in it: it is renamed at the end, and the lock must outlive that
            alone.enter_context(alone_in(partial, lock_beside(final)))
            partial.mkdir(exist_ok=True)
        clean_inside(partial)
        # Asked before the body, which writes a checkpoint of its own.
        began = (partial / CHECKPOINT).exists() and _same_recipe(partial, recipe_text)
        try:
            if not _same_recipe(partial, recipe_text):  # of another recipe, and check_output let it go
                _empty(partial)
                write_text(partial / RECIPE, recipe_text)
            yield partial
            seal(partial, leave_out=(CHECKPOINT, BLOCKS))  # which do not go with the finished run
        except SQSError as error:
            # blocks are hours of work: only a recipe, data or network that was wrong from the start leaves nothing
            goes_on = began or isinstance(error, OutputError | ResourceError)
            if not (partial / BLOCKS).exists() and not (goes_on and _has_work(partial)):
                shutil.rmtree(partial)
            raise
        except BaseException:  # Ctrl-C, or a bug: what it has computed is good
            # Logs are of a baseline, which is kept elsewhere: they go on with it.
            if not (_has_work(partial) or (partial / LOGS).exists()):
                shutil.rmtree(partial)
            raise
        # Still under the lock: another process must not take the partial directory up meanwhile.
        replace_directory(partial, final, without=(CHECKPOINT, BLOCKS))


@contextmanager
def in_turn(lock: Path) -> Iterator[None]:
    """Wait until no other process is in a body of the same lock file, which is gone when the last has left.

    Raises:
        OutputError: the lock file cannot be made.
    """
    with contextlib.ExitStack() as turn:
        with one_sentence(lock):
            lock.parent.mkdir(parents=True, exist_ok=True)
            turn.enter_context(held(lock, wait=True))
        yield


def _empty(directory: Path) -> None:
    for path in directory.iterdir():
        # A link is removed as a link: what it points to is not ours.
        shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
