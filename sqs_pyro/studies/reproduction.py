"""The paper, table by table: each row's recipe beside baselines, the paper's figure, and bytes as they are.

Recipes of rows and tables are the package's own, in ``paper/``; ``recipes/paper`` of the repository leads there.
A table is a study for each of its rows.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal

from pydantic import Field

from sqs_pyro.atomic import resolved
from sqs_pyro.documents import read_yaml, shown
from sqs_pyro.errors import RecipeError
from sqs_pyro.recipes import RecipeSection, parse
from sqs_pyro.reporting.paired import holm, paired_difference
from sqs_pyro.runs.bookkeeping import Progress, silent
from sqs_pyro.runs.directory import write_json
from sqs_pyro.runs.recipe import changed, with_value
from sqs_pyro.studies import made
from sqs_pyro.studies.recipe import StudyRecipe, VariantRecipe, cells
from sqs_pyro.studies.study import BASELINES, run_study, write_summary

Scale = Literal["tiny", "here", "full"]

SCHEMA = 1  # of the document that `reproduce` returns; raised when a key changes its meaning
TABLE = "table.json"
_MADE = "made"
_PAPER = Path(__file__).parent / "paper"


class Published(RecipeSection):
    """What the paper says of a method on a row.

    Attributes:
        fp32: the figure of its fp32 network, a fraction.
        figure: that of its compressed network, a fraction.
        drop: what is lost, where only that is known.
        ratio: ``32 / (log2 K · non-zero rate)``, as it counts.
        source: where this was read.
    """

    fp32: float | None = Field(default=None, ge=0, le=1)
    figure: float | None = Field(default=None, ge=0, le=1)
    drop: float | None = Field(default=None, ge=-1, le=1)
    ratio: float | None = Field(default=None, gt=0)
    source: str = Field(min_length=1)

    @property
    def lost(self) -> float | None:
        """What is lost, or None where it is not known."""
        known = self.fp32 is not None and self.figure is not None
        return self.fp32 - self.figure if known else self.drop  # type: ignore[operator]


class Made(RecipeSection):
    """What a scale makes, or takes from this machine.

    Attributes:
        network: write a tiny checkpoint of the row's architecture, with rows of its data's form.
        questions: of these, rows of questions.
        topics: write sentences of so many topics of Python's help.
        package: take the checkpoint of an installed Python package, ``name/directory`` in it.
    """

    network: bool = False
    questions: bool = False
    topics: int | None = Field(default=None, ge=2)
    package: str | None = Field(default=None, pattern=r"^[\w-]+/.+$")

    def write(self, directory: Path, architecture: str) -> dict[str, Any]:
        """Write it, and return the keys of a recipe that name it."""
        keys: dict[str, Any] = {}
        if self.package is not None:
            name, _, inside = self.package.partition("/")
            keys |= made.package(name, inside)
        if self.topics is not None:
            keys |= made.topics(directory, self.topics)
        if self.network:
            keys |= made.text(directory, architecture, questions=self.questions)
        return keys


class TableRecipe(RecipeSection):
    """A table of the paper.

    Attributes:
        title: shown above it.
        figure: by which networks are compared: ``accuracy`` or ``f1``.
        rows: names of run recipes beside it.
        published: row to method to what the paper says.
        methods: labels and what each changes in a row, dotted or nested as variants of a study.
        against: a method to the one that its difference is of; the first, of those that are not named.
        tiny: dotted keys of a row and their values at scale ``tiny``; ``made`` is what has to be made.
        here: likewise of scale ``here``; None: there is nothing on this machine for it.
    """

    title: str = Field(min_length=1)
    figure: Literal["accuracy", "f1"]
    rows: tuple[str, ...] = Field(min_length=1)
    published: dict[str, dict[str, Published]] = Field(default_factory=dict)
    methods: dict[str, dict[str, Any]] = Field(min_length=1)
    against: dict[str, str] = Field(default_factory=dict)
    tiny: dict[str, Any]
    here: dict[str, Any] | None = None


def table_names() -> list[str]:
    """Return the names of all tables."""
    return sorted(path.stem for path in (_PAPER / "tables").glob("*.yaml"))


def load_table(name: str) -> TableRecipe:
    """Read a table.

    Raises:
        RecipeError: there is none of this name, or it names a row or method that it has not.
    """
    if name not in table_names():
        raise RecipeError(f"There is no table {shown(name)}: there are {', '.join(table_names())}.")
    table = parse(TableRecipe, read_yaml(_PAPER / "tables" / f"{name}.yaml"), name)
    for row, of_row in table.published.items():
        if row not in table.rows or not set(of_row) <= set(table.methods):
            raise RecipeError(f"Table '{name}' has published figures of {row!r} without the row or a method.")
    unknown = {*table.against, *table.against.values()} - set(table.methods)
    if unknown:
        raise RecipeError(
            f"Table '{name}' holds {shown(min(unknown))} against another method, but has no such one."
        )
    return table


def row_recipe(row: str) -> dict[str, Any]:
    """Return the run recipe of a row, as it is written."""
    values: dict[str, Any] = read_yaml(_PAPER / f"{row}.yaml")
    return values


def row_study(
    table: TableRecipe,
    row: str,
    scale: Scale,
    directory: Path,
    *,
    methods: Sequence[str] = (),
    seeds: Sequence[int] = (),
    changes: Sequence[str] = (),
) -> StudyRecipe:
    """Return the study of one row, validated; what a scale makes is written below ``directory``.

    Args:
        table, row: which.
        scale: ``tiny``: made data, seconds; ``here``: data and networks of this machine; ``full``: the paper's.
        directory: of the table.
        methods: labels to run; empty: all.
        seeds: instead of the row's own.
        changes: ``KEY=VALUE`` of every row, the last word.

    Raises:
        RecipeError: a method or key is unknown, or there is nothing for this scale.
        DataError: what the scale takes is not on this machine.
    """
    unknown = [label for label in methods if label not in table.methods]
    if unknown:
        raise RecipeError(f"There is no method {shown(unknown[0])}: there are {', '.join(table.methods)}.")
    values = row_recipe(row)
    title = values["name"]
    if scale != "full":
        at_scale = table.tiny if scale == "tiny" else table.here
        if at_scale is None:
            raise RecipeError(f"'{title}' has no scale 'here': choose tiny or full.")
        asked = parse(Made, at_scale.get("made", {}), f"{scale}.made")
        keys = {key: value for key, value in at_scale.items() if key != "made"}
        # What is made last: it names files in a section that the scale replaces.
        keys |= asked.write(directory / _MADE / row, row.rpartition("_")[2])
        for key, value in keys.items():
            values = with_value(values, key, value)
    values = changed(values, changes)
    chosen = {label: table.methods[label] for label in methods or table.methods}
    study = StudyRecipe(
        name=f"{title} ({scale})",
        base=values,
        seeds=tuple(seeds) or (int(values.get("seed", 0)),),
        variants={label: VariantRecipe(set=change) for label, change in chosen.items()},
    )
    cells(study)
    return study


def reproduce(
    name: str,
    scale: Scale,
    out_dir: str | Path,
    *,
    rows: Sequence[str] = (),
    methods: Sequence[str] = (),
    seeds: Sequence[int] = (),
    changes: Sequence[str] = (),
    jobs: int = 1,
    overwrite: bool = False,
    progress: Progress = silent,
    command: str | None = None,
) -> dict[str, Any]:
    """Run a table's rows with its methods, and return the paper's figures, these, and both ratios.

    A row is a study in a directory of its own; the same call goes on where it was interrupted, and what has failed
    is tried again.

    Args:
        name: of the table, see :func:`table_names`.
        scale, methods, seeds, changes: as of :func:`row_study`.
        out_dir: directory of the table.
        rows: to run; empty: all.
        jobs, overwrite, progress: as of :func:`~sqs_pyro.studies.study.run_study`.
        command: the command line that asks for it, if it was one.

    Returns:
        What ``table.json`` holds: ``title``, ``scale``, ``figure`` and ``rows``, one for each row and method. A
        row's ``difference`` is from the method ``against`` at the same seeds: ``mean``, ``interval``, ``p`` and
        ``p_holm`` (see :mod:`sqs_pyro.reporting.paired`), of three seeds at least.

    Raises:
        RecipeError, DataError, OutputError: one sentence; what can be checked is checked before the first run.
    """
    table, directory = load_table(name), resolved(out_dir)
    unknown = [row for row in rows if row not in table.rows]
    if unknown:
        raise RecipeError(f"Table '{name}' has no row {shown(unknown[0])}: it has {', '.join(table.rows)}.")
    options: dict[str, Any] = {"methods": methods, "seeds": seeds, "changes": changes}
    studies = {row: row_study(table, row, scale, directory, **options) for row in rows or table.rows}
    found = []
    for row, study in studies.items():
        out = directory / row
        results = run_study(
            study,
            out,
            jobs=jobs,
            baselines_dir=directory / BASELINES,
            overwrite=overwrite,
            progress=progress,
        )
        summary = write_summary("compare", study, results, out, command=command)
        found += _compared(table, [_line(table, row, study, point) for point in summary["points"]])
    document = {
        "schema": SCHEMA,
        "command": command,
        "table": name,
        "title": table.title,
        "scale": scale,
        "figure": table.figure,
        "rows": found,
    }
    write_json(directory / TABLE, document)
    return document


def _line(table: TableRecipe, row: str, study: StudyRecipe, point: Mapping[str, Any]) -> dict[str, Any]:
    said = table.published.get(row, {}).get(point["variant"])
    mean, sd = point["mean"], point["sd"]
    # At scale `here` questions may have become classes.
    figure = table.figure if table.figure in mean or not mean else "accuracy"
    return {
        "row": row,
        "title": study.name,
        "method": point["variant"],
        "published": None if said is None else {**said.model_dump(), "lost": said.lost},
        "figure": figure,
        "fp32": mean.get(f"baseline_{figure}"),
        "ours": mean.get(figure),
        "sd": sd.get(figure),
        "lost": mean.get(f"{figure}_drop"),
        "seeds": point["seeds"],
        "by_seed": point["by_seed"].get(figure, []),
        "paper_ratio": mean.get("paper_ratio"),
        "file_ratio": mean.get("ratio"),
        "file_bytes": mean.get("file_bytes"),
        "nonzero_rate": mean.get("nonzero_rate"),
        "errors": point["errors"],
    }


def _compared(table: TableRecipe, lines: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return a row's lines with their differences; Holm's correction is for all of the row."""
    lines = [{**line, "against": None, "difference": None} for line in lines]
    by_method = {line["method"]: line for line in lines}
    for line in lines:
        label = table.against.get(line["method"], next(iter(table.methods)))
        other = by_method.get(label)
        if other is None or other is line:
            continue
        figures = [dict(zip(each["seeds"], each["by_seed"], strict=False)) for each in (line, other)]
        seeds = [seed for seed in figures[0] if seed in figures[1]]
        if seeds:
            pair = ([of[seed] for seed in seeds] for of in figures)
            line |= {"against": label, "difference": {**asdict(paired_difference(*pair)), "p_holm": None}}
    tested = [line["difference"] for line in lines if line["difference"] and line["difference"]["p"] is not None]
    for difference, p_holm in zip(tested, holm([each["p"] for each in tested]), strict=True):
        difference["p_holm"] = p_holm
    return lines
