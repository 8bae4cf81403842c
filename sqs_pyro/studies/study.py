"""Studies: every cell is one ordinary run in a directory of its own, and a finished one is not run again."""

import sys
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal

from sqs_pyro.atomic import check_place, clean_inside, one_sentence, resolved, write_text
from sqs_pyro.documents import parse_yaml
from sqs_pyro.errors import OutputError, ResourceError, SQSError, first_line
from sqs_pyro.locks import alone_in
from sqs_pyro.reporting.page.study import study_page
from sqs_pyro.reporting.study_plots import comparison_figure, sweep_figure
from sqs_pyro.reporting.study_summary import summarise, write_csv
from sqs_pyro.reporting.style import write_figure
from sqs_pyro.runs.bookkeeping import Progress, silent
from sqs_pyro.runs.directory import PAGE, read_run, write_json
from sqs_pyro.studies.finished import MadeOf, check_cell, made_of_now, why_again
from sqs_pyro.studies.processes import Outcome, run_commands
from sqs_pyro.studies.recipe import Cell, StudyRecipe, cells, point_label

STUDY, RUNS, BASELINES = "study.yaml", "runs", "baselines"
LOCK = ".sqs-study.lock"  # while somebody works on the study


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
        One result for each cell, in the order of :func:`~sqs_pyro.studies.recipe.cells`.

    Raises:
        RecipeError: the study is not valid.
        OutputError: ``out_dir`` is another study's, or something else, or in use, or cannot be written; a finished
            run in it was altered.
    """
    found = cells(study)
    directory = resolved(out_dir)
    baselines = directory / BASELINES if baselines_dir is None else resolved(baselines_dir)
    check_place(baselines / "kept.pt")
    now = made_of_now()
    with _study_directory(directory, study, found, now, overwrite=overwrite) as runs:
        # Asked under the lock: nobody else finishes cells meanwhile.
        waiting = [cell for cell in found if why_again(runs / cell.directory, cell, now)]
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
            out = runs / cell.directory
            # The study as a whole has asked before it replaces anything; a cell that waits may be replaced.
            cell.kind.run(cell.recipe, out, overwrite=True, baselines_dir=baselines, progress=progress)
        except (OutputError, ResourceError):
            raise  # the next cell would have no room either
        except SQSError as error:
            yield cell.name, str(error)
        else:
            yield cell.name, None


def _in_processes(
    waiting: Sequence[Cell], runs: Path, baselines: Path, jobs: int, say: Callable[[str], None]
) -> Generator[Outcome, None, None]:
    """Run `sqs compress` for each cell; one of each baseline comes first, so that baselines train side by side."""
    keys = {cell.name: cell.kind.baseline_key(cell.recipe) for cell in waiting}
    first = {keys[cell.name]: cell for cell in reversed(waiting)}  # the earliest of each key stays
    ordered = sorted(waiting, key=lambda cell: cell is not first[keys[cell.name]])
    with TemporaryDirectory() as recipes:
        commands: dict[str, list[str | Path]] = {}
        for cell in ordered:
            recipe = Path(recipes, f"{cell.directory}.yaml")
            # Whole and validated: the child does not read the study, which may be edited while it runs.
            recipe.write_text(cell.recipe.as_yaml(), encoding="utf-8")
            command: list[str | Path] = [sys.executable, "-m", "sqs_pyro", "compress", recipe, "--overwrite"]
            commands[cell.name] = [*command, "--out", runs / cell.directory, "--baselines", baselines]
        yield from run_commands(commands, jobs, say)


def _result(cell: Cell, runs: Path, error: str | None) -> CellResult:
    if error is not None:
        return CellResult(cell, None, error)
    # From disk, whoever ran it and when: a finished cell and a new one are told in the same way.
    return CellResult(cell, read_run(runs / cell.directory)["metrics"], None)


def write_summary(
    kind: Literal["compare", "sweep"],
    study: StudyRecipe,
    results: Sequence[CellResult],
    out_dir: str | Path,
    *,
    command: str | None = None,
) -> dict[str, Any]:
    """Write ``compare.json``, ``.csv``, ``.png`` (or ``sweep``...) and ``report.html`` into the study's directory.

    Args:
        kind: ``"compare"`` draws points side by side, ``"sweep"`` curves over the size of the file.
        study: what was run.
        results: what came of it.
        out_dir: the study's directory.
        command: the command line that ran it, if it was one.

    Returns:
        What the JSON holds, see :func:`~sqs_pyro.reporting.study_summary.summarise`.
    """
    directory = resolved(out_dir)
    plain = [_plain(result) for result in results]
    summary = {"command": command, **summarise(study.name, plain, study.reference)}
    write_json(directory / f"{kind}.json", summary)
    write_csv(directory / f"{kind}.csv", summary)
    figure = sweep_figure(summary) if kind == "sweep" else comparison_figure(summary)
    write_figure(figure, directory / f"{kind}.png")
    write_text(directory / PAGE, study_page(summary))
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
    directory: Path, study: StudyRecipe, found: Sequence[Cell], now: MadeOf, *, overwrite: bool
) -> Iterator[Path]:
    """Check the study's directory, make it, keep others out, and yield where its runs are."""
    runs = directory / RUNS
    _check_directory(directory, study)
    # All cells before the directory is made: what is in the way of the last one is told at once.
    for cell in found:
        check_cell(runs / cell.directory, cell, now, overwrite=overwrite)
    with ExitStack() as alone:
        with one_sentence(runs):
            runs.mkdir(parents=True, exist_ok=True)
            alone.enter_context(alone_in(directory, directory / LOCK))
        clean_inside(directory)
        write_text(directory / STUDY, _sealed(study.as_yaml()))  # renewed: cells may have been added
        yield runs


def _check_directory(directory: Path, study: StudyRecipe) -> None:
    check_place(directory / STUDY)
    if not directory.exists() or not any(directory.iterdir()):
        return
    kept = directory / STUDY
    # Locks and half-written files are ours, whatever state the directory is in.
    others = {path.name for path in directory.iterdir() if not path.name.startswith(".sqs-")}
    if not kept.exists() and not others <= {RUNS, BASELINES}:  # these alone: killed before it was written
        raise OutputError(
            f"'{directory}' exists and is no study (it holds no {STUDY}): choose another output directory."
        )
    name = _name_in(kept) if kept.exists() else study.name
    if name != study.name:
        raise OutputError(
            f"'{directory}' holds the study '{name}', not '{study.name}': choose another output directory."
        )


_SUM = "# sha256 of the lines below: "


def _sealed(text: str) -> str:
    return f"{_SUM}{sha256(text.encode()).hexdigest()}\n{text}"


def _name_in(kept: Path) -> str:
    """Return the name of the study in a directory; a file without a digest is of an older version."""
    text = kept.read_bytes().decode("utf-8", errors="replace")
    head, _, below = text.partition("\n")
    try:
        # A damaged head is no head any more: whatever of it is left counts as one.
        if ("#" in head or "sha256" in head) and text != _sealed(below):
            raise ValueError("its checksum does not fit")
        return str(parse_yaml(text, "it")["name"])
    except (ValueError, TypeError, KeyError) as error:
        reason = first_line(error)
        raise OutputError(
            f"'{kept}' is damaged ({reason}): write 'name: ' and the study's name into it, as its only line, and "
            "the same command goes on with the runs that are finished."
        ) from None
