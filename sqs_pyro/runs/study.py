"""Studies: every cell is one ordinary run in a directory of its own, and a finished one is not run again."""

import json
import sys
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal

import yaml

from sqs_pyro.errors import OutputError, RecipeError, SQSError
from sqs_pyro.recipe import parse
from sqs_pyro.reporting.study_plots import comparison_figure, sweep_figure
from sqs_pyro.reporting.study_summary import summarise, write_csv
from sqs_pyro.runs.directory import METRICS, RECIPE, check_output, check_writable, locked
from sqs_pyro.runs.pipeline import run
from sqs_pyro.runs.processes import Outcome, run_commands
from sqs_pyro.runs.progress import Progress, silent
from sqs_pyro.runs.recipe import RunRecipe
from sqs_pyro.runs.study_recipe import Cell, StudyRecipe, cells, point_label

STUDY, RUNS, BASELINES = "study.yaml", "runs", "baselines"


@dataclass(frozen=True)
class CellResult:
    """What came of one cell.

    Attributes:
        cell: which run.
        metrics: what its ``metrics.json`` holds, or None if it failed.
        error: the sentence it failed with, or None.
    """

    cell: Cell
    metrics: dict[str, Any] | None
    error: str | None


def run_study(
    study: StudyRecipe,
    out_dir: str | Path,
    *,
    baselines_dir: str | Path | None = None,
    overwrite: bool = False,
    jobs: int = 1,
    progress: Progress = silent,
) -> list[CellResult]:
    """Run the cells of a study that are not finished yet; the same call goes on where it was interrupted.

    A cell that fails with an :class:`~sqs_pyro.errors.SQSError` is reported in its result, and tried again by the
    next call. Seeds, variants and values can be added to a study that has been run.

    Args:
        study: what to run.
        out_dir: its directory: the runs are in ``runs``, trained baselines in ``baselines``.
        baselines_dir: where trained baselines are kept instead.
        overwrite: run cells again whose recipe is not the one that they were run with.
        jobs: runs at a time; more than one are processes of their own, which share out torch's threads.
        progress: called often, for a progress bar; its stage ``"study"`` counts cells.

    Returns:
        One result for each cell, in the order of :func:`~sqs_pyro.runs.study_recipe.cells`.

    Raises:
        RecipeError: the study is not valid.
        OutputError: ``out_dir`` is another study's, or something else, or in use.
    """
    found = cells(study)
    directory = Path(out_dir).absolute()
    baselines = directory / BASELINES if baselines_dir is None else Path(baselines_dir).absolute()
    with _study_directory(directory, study, found, overwrite=overwrite) as runs:
        waiting = [cell for cell in found if not _is_finished(runs / cell.directory, cell.recipe)]
        count = _Count(progress, len(found) - len(waiting), len(found))
        if jobs > 1:
            work = _in_processes(waiting, runs, baselines, jobs, count.say)
        else:
            work = _one_by_one(waiting, runs, baselines, count.say, progress)
        errors = {}
        with closing(work):  # an interruption here stops the processes there
            for name, error in work:
                errors[name] = error
                count.one_more(f"{name}: failed" if error else name)
        return [_result(cell, runs, errors.get(cell.name)) for cell in found]


class _Count:
    """How many cells are done, for the progress bar."""

    def __init__(self, progress: Progress, done: int, total: int) -> None:
        self._progress, self._done, self._total = progress, done, total

    def say(self, text: str) -> None:
        self._progress("study", self._done, self._total, text)

    def one_more(self, text: str) -> None:
        self._done += 1
        self.say(text)


def _one_by_one(
    waiting: Sequence[Cell], runs: Path, baselines: Path, say: Callable[[str], None], progress: Progress
) -> Generator[Outcome, None, None]:
    for cell in waiting:
        say(cell.name)
        try:
            run(cell.recipe, runs / cell.directory, overwrite=True, baselines_dir=baselines, progress=progress)
        except SQSError as error:
            yield cell.name, str(error)
        else:
            yield cell.name, None


def _in_processes(
    waiting: Sequence[Cell], runs: Path, baselines: Path, jobs: int, say: Callable[[str], None]
) -> Generator[Outcome, None, None]:
    """`sqs compress` for each cell; a cell of each baseline comes first, so that baselines train side by side."""
    first = {cell.recipe.baseline_key: cell for cell in reversed(waiting)}
    ordered = sorted(waiting, key=lambda cell: cell is not first[cell.recipe.baseline_key])
    with TemporaryDirectory() as recipes:
        commands: dict[str, list[str | Path]] = {}
        for cell in ordered:
            recipe = Path(recipes, f"{cell.directory}.yaml")
            recipe.write_text(cell.recipe.as_yaml(), encoding="utf-8")
            command: list[str | Path] = [sys.executable, "-m", "sqs_pyro", "compress", recipe, "--overwrite"]
            commands[cell.name] = [*command, "--out", runs / cell.directory, "--baselines", baselines]
        yield from run_commands(commands, jobs, say)


def _result(cell: Cell, runs: Path, error: str | None) -> CellResult:
    if error is not None:
        return CellResult(cell, None, error)
    metrics = (runs / cell.directory / METRICS).read_text(encoding="utf-8")
    return CellResult(cell, json.loads(metrics), None)


def write_summary(
    kind: Literal["compare", "sweep"], study: StudyRecipe, results: Sequence[CellResult], out_dir: str | Path
) -> dict[str, Any]:
    """Write ``compare.json``, ``.csv`` and ``.png`` (or ``sweep``...) into the study's directory.

    Args:
        kind: ``"compare"`` draws points side by side, ``"sweep"`` curves over the size of the file.
        study: what was run.
        results: what came of it.
        out_dir: the study's directory.

    Returns:
        What the JSON holds, see :func:`~sqs_pyro.reporting.study_summary.summarise`.
    """
    directory = Path(out_dir)
    summary = summarise(study.name, [_plain(result) for result in results])
    (directory / f"{kind}.json").write_text(
        json.dumps(summary, indent=2, allow_nan=False) + "\n", encoding="utf-8"
    )
    write_csv(directory / f"{kind}.csv", summary)
    figure = sweep_figure(summary) if kind == "sweep" else comparison_figure(summary)
    figure.savefig(directory / f"{kind}.png", dpi=150)
    return summary


def _plain(result: CellResult) -> dict[str, Any]:
    cell = result.cell
    return {
        "variant": cell.variant,
        "point": point_label(cell.values),
        "values": cell.values,
        "seed": cell.seed,
        "metrics": result.metrics,
        "error": result.error,
    }


@contextmanager
def _study_directory(
    directory: Path, study: StudyRecipe, found: Sequence[Cell], *, overwrite: bool
) -> Iterator[Path]:
    """Check the study's directory, make it, keep others out, and yield where its runs are."""
    runs = directory / RUNS
    _check_directory(directory, study)
    for cell in found:
        _check_cell(runs / cell.directory, cell.recipe, overwrite=overwrite)
    runs.mkdir(parents=True, exist_ok=True)
    with locked(directory):
        (directory / STUDY).write_text(study.as_yaml(), encoding="utf-8")
        yield runs


def _check_directory(directory: Path, study: StudyRecipe) -> None:
    check_writable(directory)
    if not directory.exists() or not any(directory.iterdir()):
        return
    kept = directory / STUDY
    if not kept.exists():
        raise OutputError(
            f"'{directory}' exists and is no study (it holds no {STUDY}): choose another output directory."
        )
    name = (yaml.safe_load(kept.read_text(encoding="utf-8")) or {}).get("name")
    if name != study.name:
        raise OutputError(
            f"'{directory}' holds the study '{name}', not '{study.name}': choose another output directory."
        )


def _check_cell(directory: Path, recipe: RunRecipe, *, overwrite: bool) -> None:
    if overwrite or not (directory / METRICS).exists():
        check_output(directory, recipe.as_yaml(), overwrite=overwrite)
    elif not _is_finished(directory, recipe):
        raise OutputError(
            f"'{directory}' holds a finished run of another recipe: choose another output directory, or run it "
            "again with --overwrite."
        )


def _is_finished(directory: Path, recipe: RunRecipe) -> bool:
    """Whether a directory holds a finished run of just this recipe; keys that came later have their defaults."""
    if not (directory / METRICS).exists():
        return False
    try:
        return parse(RunRecipe, yaml.safe_load((directory / RECIPE).read_text(encoding="utf-8"))) == recipe
    except RecipeError:  # a key that is no more
        return False
