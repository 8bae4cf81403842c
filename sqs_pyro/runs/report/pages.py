"""Pages in their places: of a run in its directory, and anew of what is finished."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sqs_pyro.atomic import check_place, resolved, write_text
from sqs_pyro.documents import read_json_object
from sqs_pyro.errors import OutputError
from sqs_pyro.integrations.checkpoint_documents import CONFIG
from sqs_pyro.reporting.bench_tables import kernel_tables, model_tables
from sqs_pyro.reporting.compared_tables import compared_tables
from sqs_pyro.reporting.page.bench import bench_page
from sqs_pyro.reporting.page.compared import compared_page
from sqs_pyro.reporting.page.document import GENERATOR
from sqs_pyro.reporting.page.run import run_page
from sqs_pyro.reporting.page.study import study_page
from sqs_pyro.reporting.printed import Report
from sqs_pyro.reporting.study_tables import comparison_tables, sweep_tables
from sqs_pyro.reporting.tables import report_tables
from sqs_pyro.runs.directory import METRICS, PACKED, PAGE, read_run, reported, understood
from sqs_pyro.runs.report.documents import run_documents
from sqs_pyro.runs.seal import put

_STUDIES = {"compare.json": comparison_tables, "sweep.json": sweep_tables}
_MARK = f'<meta name="generator" content="{GENERATOR}">'.encode()
_HEAD = 4096  # bytes of a page in which its mark stands


@dataclass(frozen=True)
class Reported:
    """What is finished, told.

    Attributes:
        document: as one document.
        tables: for a terminal.
        page: as HTML.
        place: where its page is kept.
        directory: of a run, which lists its files; None: of something else.
    """

    document: dict[str, Any]
    tables: Report
    page: str
    place: Path
    directory: Path | None = None


def write_run_page(directory: Path) -> None:
    """Write the page of a run that is about to be finished into its directory."""
    with reported(directory):
        page = run_page(run_documents(directory))
    write_text(directory / PAGE, page)


def report_of(sources: Sequence[Path]) -> Reported:
    """Return what is to be told of a run, a study or a benchmark; of several runs, how they compare.

    Args:
        sources: a run's or a study's directory, or what ``sqs bench --out`` has written; or several runs'.

    Raises:
        OutputError: there is no such thing, or it was altered.
    """
    if len(sources) > 1:
        return _of_runs(sources)
    (source,) = sources
    if source.name == PACKED and (source.parent / METRICS).is_file():
        source = source.parent
    if source.suffix == ".json" and source.is_file():
        return _of_bench(source)
    summaries = [source / name for name in _STUDIES if (source / name).is_file()]
    if (source / CONFIG).is_file() and not (source / METRICS).is_file():
        raise OutputError(
            f"'{source}' is a Hugging Face directory, which keeps no figures of a run: give a run's directory; "
            "`sqs inspect` and `sqs evaluate` tell of a packed one."
        )
    if summaries and not (source / METRICS).is_file():
        return _of_study(max(summaries, key=lambda path: path.stat().st_mtime))
    return _of_run(source)


def write_page(told: Reported, out: Path | None = None) -> Path:
    """Write a page to its place, or to another; the list of a run's directory says what it is.

    Raises:
        OutputError: something else is there, or it cannot be written.
    """
    place = out or told.place
    check_page_place(place)
    if told.directory is not None and resolved(place) == resolved(told.place):  # however it was named
        put(told.directory, PAGE, told.page)
    else:
        write_text(place, told.page)
    return place


def check_page_place(place: Path) -> None:
    """Check that a page can be written: what is there already is an older one.

    Raises:
        OutputError: it cannot.
    """
    check_place(place)
    if place.exists() and not _is_page(place):
        raise OutputError(f"'{place}' exists and is no page of this program: choose another path with --out.")


def _is_page(path: Path) -> bool:
    if not path.is_file():
        return False
    with path.open("rb") as file:
        return _MARK in file.read(_HEAD)


def _of_run(directory: Path) -> Reported:
    document = read_run(directory)
    with reported(directory):  # figures are looked up here, before anything is printed
        whole = run_documents(directory)
        tables, page = report_tables(whole), run_page(whole)
    return Reported(document, tables, page, directory / PAGE, directory)


def _of_runs(directories: Sequence[Path]) -> Reported:
    names = [str(directory) for directory in directories]
    if len(set(names)) < len(names):
        raise OutputError("A run is given twice: give each once.")
    runs = {}
    for name, directory in zip(names, directories, strict=True):
        with reported(directory):
            runs[name] = run_documents(directory)
            run_page(runs[name])  # says of which run it is that something is missing
    kept = {name: {key: run[key] for key in ("metrics", "bounds") if key in run} for name, run in runs.items()}
    metrics = {name: run["metrics"] for name, run in runs.items()}
    return Reported({"runs": kept}, compared_tables(metrics), compared_page(runs), Path(PAGE))


def _of_study(path: Path) -> Reported:
    summary = read_json_object(path, OutputError, "run the study again")
    with understood(f"'{path}'", "sqs compare"):
        return Reported(summary, _STUDIES[path.name](summary), study_page(summary), path.with_name(PAGE))


def _of_bench(path: Path) -> Reported:
    figures = read_json_object(path, OutputError, "measure again")
    with understood(f"'{path}'", "sqs bench --out"):
        of_models = any("network" in row for row in figures["rows"])
        tables = (model_tables if of_models else kernel_tables)(figures)
        return Reported(figures, tables, bench_page(figures), path.with_suffix(".html"))
