"""Many runs of one recipe: compare and sweep."""

from pathlib import Path
from typing import Annotated, Literal

import typer

from sqs_pyro.cli.application import app
from sqs_pyro.cli.options import JsonOption
from sqs_pyro.cli.running import BAD_INPUT, command_line, numbers, one_sentence_errors, show

Scale = Literal["tiny", "here", "full"]
_GOES_ON = "Interrupted with Ctrl-C, the same command goes on where it stopped."
StudyArgument = Annotated[Path, typer.Argument(metavar="RECIPE", help="A YAML study, see docs/compare.md.")]
StudyOption = Annotated[Path, typer.Option("--out", metavar="DIR", help="Directory of the study.")]
BaselinesOption = Annotated[
    Path | None,
    typer.Option("--baselines", metavar="DIR", help="Where trained networks are kept [in DIR of --out]."),
]
SeedsOption = Annotated[str | None, typer.Option("--seeds", metavar="0,1,2", help="Instead of the study's seeds.")]
JobsOption = Annotated[int, typer.Option("--jobs", min=1, metavar="N", help="Runs at a time, each a process.")]
AgainOption = Annotated[bool, typer.Option("--overwrite", help="Run cells again whose recipe has changed.")]
ChangesOption = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="Change one key, e.g. base.compression.epochs=2."),
]


@app.command("compare", help=f"Run variants of a recipe: one table and one picture side by side. {_GOES_ON}")
@app.command("sweep", help=f"Run a recipe over grids of values: accuracy over the size of the file. {_GOES_ON}")
def study_command(
    context: typer.Context,
    recipe: StudyArgument,
    out: StudyOption,
    seeds: SeedsOption = None,
    jobs: JobsOption = 1,
    baselines: BaselinesOption = None,
    overwrite: AgainOption = False,
    changes: ChangesOption = None,
    as_json: JsonOption = False,
) -> None:
    """Run a study; the two commands differ in how they show it."""
    kind: Literal["compare", "sweep"] = "sweep" if context.command.name == "sweep" else "compare"
    with one_sentence_errors(f"the same command goes on; '{out}' keeps what is finished"):
        from sqs_pyro.reporting.study_tables import comparison_tables, sweep_tables
        from sqs_pyro.reporting.terminal import progress_display
        from sqs_pyro.studies.recipe import load_study
        from sqs_pyro.studies.study import run_study, write_summary

        study = load_study(recipe, [*(changes or []), *([] if seeds is None else [f"seeds=[{seeds}]"])])
        with progress_display() as progress:
            results = run_study(
                study, out, jobs=jobs, baselines_dir=baselines, overwrite=overwrite, progress=progress
            )
        summary = write_summary(kind, study, results, out, command=command_line())
        show(summary, (sweep_tables if kind == "sweep" else comparison_tables)(summary), as_json)
        typer.echo(f"Wrote {out / kind}.json, .csv, .png and report.html", err=True)
    # Outside: the study itself has succeeded, and its summary is written; only the exit status says it.
    failed = [result for result in results if result.error is not None]
    if failed:
        typer.echo(f"error: {len(failed)} of {len(results)} runs failed, see above.", err=True)
        raise typer.Exit(BAD_INPUT)


@app.command("reproduce")
def reproduce_command(
    table: Annotated[str, typer.Argument(metavar="TABLE", help="cifar10, cifar100, squad or sst2.")],
    out: Annotated[Path, typer.Option("--out", metavar="DIR", help="Directory of the table.")],
    scale: Annotated[
        Scale,
        typer.Option(help="Made data (seconds a run), data and networks of this machine, or the paper's."),
    ] = "here",
    rows: Annotated[
        list[str] | None, typer.Option("--row", metavar="ROW", help="One row, again for more.")
    ] = None,
    methods: Annotated[
        list[str] | None, typer.Option("--method", metavar="LABEL", help="One method, again for more.")
    ] = None,
    seeds: SeedsOption = None,
    jobs: JobsOption = 1,
    overwrite: AgainOption = False,
    changes: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY=VALUE", help="Change one key of every row, e.g. data.limit=500."),
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Run a table of the SQS paper beside baselines: its figure, ours, its ratio and that of the file.

    Interrupted with Ctrl-C, the same command goes on where it stopped.
    """
    with one_sentence_errors(f"the same command goes on; '{out}' keeps what is finished"):
        from sqs_pyro.reporting.reproduced_tables import reproduced_tables
        from sqs_pyro.reporting.terminal import progress_display
        from sqs_pyro.studies.reproduction import TABLE, reproduce

        with progress_display() as progress:
            document = reproduce(
                table,
                scale,
                out,
                rows=rows or (),
                methods=methods or (),
                seeds=() if seeds is None else numbers(seeds, ",", "--seeds"),
                changes=changes or (),
                jobs=jobs,
                overwrite=overwrite,
                progress=progress,
                command=command_line(),
            )
        show(document, reproduced_tables(document), as_json)
        typer.echo(f"Wrote {out / TABLE}, and a study for each row", err=True)
    failed = sum(len(line["errors"]) for line in document["rows"])
    if failed:
        typer.echo(f"error: {failed} runs failed, see above.", err=True)
        raise typer.Exit(BAD_INPUT)
