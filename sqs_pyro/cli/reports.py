"""What is told: of runs as a page, of this machine."""

from pathlib import Path
from typing import Annotated

import typer

from sqs_pyro.cli.application import app
from sqs_pyro.cli.options import JsonOption
from sqs_pyro.cli.running import one_sentence_errors, show
from sqs_pyro.errors import OutputError


@app.command("report")
def report_command(
    sources: Annotated[
        list[Path],
        typer.Argument(
            metavar="DIR...", help="A run's or a study's directory, or JSON of `sqs bench`; or several runs."
        ),
    ],
    out: Annotated[
        Path | None,
        typer.Option("--out", metavar="FILE", help="Where the page goes [its directory; of several runs, here]."),
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Show what a run, a study or a benchmark measured, and write it as one page, `report.html`.

    Of several runs the page shows how they compare.
    """
    with one_sentence_errors():
        from sqs_pyro.runs.report.pages import check_page_place, report_of, write_page

        if out is not None:
            check_page_place(out)
        told = report_of(sources)
        show(told.document, told.tables, as_json)
        try:
            typer.echo(f"Wrote {write_page(told, out)}", err=True)
        except OutputError as error:
            if out is not None or len(sources) > 1:
                raise
            # What is finished may lie where nobody writes any more: it was shown all the same.
            typer.echo(f"No page is written: {error}", err=True)


@app.command("doctor")
def doctor_command(as_json: JsonOption = False) -> None:
    """Say what this machine has (compiler, instructions, GPU, optional packages, data, caches) and what follows.

    CPU kernels are compiled if they are not there yet.
    """
    with one_sentence_errors():
        from sqs_pyro.reporting.tables import doctor_tables
        from sqs_pyro.runs.front.doctor import examine

        found = examine()
        show(found, doctor_tables(found), as_json)
