"""Run directories that appear under their final name only when everything in them is written.

A run works in ``NAME.partial`` beside the directory it was asked for and is renamed at the end. An
interrupted run leaves the partial directory with its checkpoint, and the same recipe takes it up again; a run
that fails because of its input leaves nothing but finished blocks.
"""

import csv
import fcntl
import json
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from sqs_pyro.errors import OutputError, SQSError

RECIPE, METRICS, BOUNDS, CHECKPOINT = "recipe.yaml", "metrics.json", "bounds.json", "checkpoint.pt"
PACKED = "packed.safetensors"
BLOCKS = "blocks"  # directory of an unfinished run's finished blocks


def read_run(directory: Path) -> dict[str, Any]:
    """What a finished run measured.

    Returns:
        ``metrics`` and, where the run has them, ``bounds``.

    Raises:
        OutputError: the directory is no finished run, or a file in it is no JSON.
    """
    if not (directory / METRICS).is_file():
        raise OutputError(
            f"'{directory}' is no finished run (it holds no {METRICS}): give one that `sqs compress` wrote."
        )
    kept = {"metrics": directory / METRICS, "bounds": directory / BOUNDS}
    return {name: _read_json(path) for name, path in kept.items() if path.is_file()}


def _read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError:
        raise OutputError(f"'{path}' is no JSON: the run directory was altered; run it again.") from None


def write_json(path: Path, document: Mapping[str, Any]) -> None:
    """Write a document of finite numbers, readable by people too."""
    path.write_text(json.dumps(document, indent=2, allow_nan=False) + "\n", encoding="utf-8")


def write_csv(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Write rows, at least one and all with the same keys, under a line of these keys."""
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


def partial_directory(final: Path) -> Path:
    """Where a run works until it is finished."""
    return final.with_name(final.name + ".partial")


def check_output(final: Path, recipe_text: str, *, overwrite: bool) -> None:
    """Check, without changing anything, that a run may write to ``final``.

    Args:
        final: directory that the finished run shall have.
        recipe_text: the recipe as it will be written; an unfinished run is resumed only if its text is equal.
        overwrite: whether a finished run may be replaced, and an unfinished one of another recipe discarded.

    Raises:
        OutputError: ``final`` or its partial directory is in the way.
    """
    _check_final(final, overwrite=overwrite)
    partial = partial_directory(final)
    if partial.exists() and not partial.is_dir():
        raise OutputError(f"'{partial}' is needed for the unfinished run but is a file: move it away.")
    if (partial / CHECKPOINT).exists() and not overwrite and not _same_recipe(partial, recipe_text):
        raise OutputError(
            f"'{partial}' holds an unfinished run of another recipe: finish it with that recipe, choose "
            "another output directory, or discard it with --overwrite."
        )


def kept_checkpoint(final: Path, recipe_text: str) -> Path | None:
    """The checkpoint from which a run of this recipe would go on, if there is one."""
    partial = partial_directory(final)
    kept = partial / CHECKPOINT
    return kept if kept.is_file() and _same_recipe(partial, recipe_text) else None


def check_writable(directory: Path) -> None:
    """Check that a directory is there, or can be made, and takes files.

    Raises:
        OutputError: a file is in the way, or it is not writable.
    """
    parent = next(path for path in [directory, *directory.parents] if path.exists())
    if not parent.is_dir():
        raise OutputError(f"Output directory '{directory}' cannot be made, because '{parent}' is a file.")
    if not os.access(parent, os.W_OK):
        raise OutputError(f"Output directory '{directory}' cannot be made, because '{parent}' is not writable.")


def _check_final(final: Path, *, overwrite: bool) -> None:
    check_writable(final)
    if not final.exists() or not any(final.iterdir()):
        return
    if not (final / METRICS).exists():
        raise OutputError(
            f"'{final}' exists and is no run directory (it holds no {METRICS}): choose another output directory."
        )
    if not overwrite:
        raise OutputError(
            f"'{final}' already holds a finished run: choose another output directory, or replace it with "
            "--overwrite."
        )


def _same_recipe(partial: Path, recipe_text: str) -> bool:
    recipe = partial / RECIPE
    return recipe.exists() and recipe.read_text(encoding="utf-8") == recipe_text


@contextmanager
def run_directory(final: Path, recipe_text: str, *, overwrite: bool) -> Iterator[Path]:
    """Work in the partial directory; rename it to ``final`` when the body succeeds.

    An :class:`~sqs_pyro.errors.SQSError` in the body removes the partial directory, unless blocks of a language
    model are finished in it. Any other interruption keeps it if it holds a checkpoint to resume from.

    Raises:
        OutputError: as :func:`check_output`, or another process works on the same run.
    """
    check_output(final, recipe_text, overwrite=overwrite)
    partial = partial_directory(final)
    partial.mkdir(parents=True, exist_ok=True)
    with locked(partial):
        if not _same_recipe(partial, recipe_text):
            _empty(partial)
            (partial / RECIPE).write_text(recipe_text, encoding="utf-8")
        try:
            yield partial
        except SQSError:
            if not (partial / BLOCKS).exists():  # finished blocks are hours of work: the input may be repaired
                shutil.rmtree(partial)
            raise
        except BaseException:
            if not (partial / CHECKPOINT).exists():
                shutil.rmtree(partial)
            raise
        (partial / CHECKPOINT).unlink(missing_ok=True)
        shutil.rmtree(partial / BLOCKS, ignore_errors=True)
        _publish(partial, final)


@contextmanager
def locked(directory: Path) -> Iterator[None]:
    """Keep other processes from working in a directory.

    Raises:
        OutputError: another process works in it.
    """
    handle = os.open(directory, os.O_RDONLY)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise OutputError(
                f"'{directory}' is in use by another process: wait for it, or choose another output directory."
            ) from None
        yield
    finally:
        os.close(handle)  # releases the lock


@contextmanager
def in_turn(lock: Path) -> Iterator[None]:
    """Wait until no other process is in a body of the same lock file, which is gone when the last has left."""
    lock.parent.mkdir(parents=True, exist_ok=True)
    while True:
        handle = os.open(lock, os.O_CREAT | os.O_RDWR)
        fcntl.flock(handle, fcntl.LOCK_EX)
        if _is_still(lock, handle):  # else its holder has removed it while this process waited: there is a new one
            break
        os.close(handle)
    try:
        yield
    finally:
        lock.unlink()
        os.close(handle)  # releases the lock


def _is_still(path: Path, handle: int) -> bool:
    try:
        return os.path.samestat(path.stat(), os.fstat(handle))
    except FileNotFoundError:
        return False


def _empty(directory: Path) -> None:
    for path in directory.iterdir():
        shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()


def _publish(partial: Path, final: Path) -> None:
    """Put the finished directory in place; a replaced one is deleted only after that."""
    replaced = final.with_name(final.name + ".replaced")
    if final.exists():
        if replaced.exists():
            shutil.rmtree(replaced)
        final.rename(replaced)
    partial.rename(final)
    if replaced.exists():
        shutil.rmtree(replaced)
