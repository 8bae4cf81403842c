"""How every command runs: errors become one sentence, results go to stdout, everything else to stderr."""

import json
import os
import shlex
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import typer

from sqs_pyro.errors import RecipeError, SQSError

if TYPE_CHECKING:
    from sqs_pyro.reporting.printed import Report

BAD_INPUT, INTERRUPTED, TERMINATED = 2, 130, 143  # the last two as shells have them: 128 and the signal


@contextmanager
def one_sentence_errors(resume: str = "", on_ranks: bool = False) -> Iterator[None]:
    """Let errors of the input become one sentence on stderr; bugs pass with their traceback.

    Args:
        resume: what to do after an interruption.
        on_ranks: whether the command knows what to do where `torchrun` has started several of it; others are
            refused, for all of them would do and write the same.
    """
    from sqs_pyro.compression.interruption import Terminated, interruptions_as_exceptions
    from sqs_pyro.ranks import number_started
    from sqs_pyro.resources import enough_resources

    try:
        with interruptions_as_exceptions(), enough_resources("This command"):
            if not on_ranks and (number := number_started()) > 1:
                raise RecipeError(
                    f"{number} processes of this command were started by torchrun (WORLD_SIZE), but it is one "
                    "process's: start it without; ranks share `sqs compress`."
                )
            yield
    except SQSError as error:
        typer.echo(f"error: {error}", err=True)
        raise typer.Exit(BAD_INPUT) from None
    except (KeyboardInterrupt, Exception) as error:
        interruption = _interruption(error)
        # The system's own words, of a full disk behind stdout say, are a sentence already.
        if interruption is None and isinstance(error, OSError) and error.strerror:
            where = f"'{error.filename}'" if error.filename else "The output"
            typer.echo(f"error: {where} cannot be used ({error.strerror}): correct it, or make room.", err=True)
            raise typer.Exit(BAD_INPUT) from None
        if interruption is None:
            raise
        if number_started() == 1 or os.environ.get("RANK") == "0":  # of several one says it
            typer.echo(f"Interrupted{': ' + resume if resume else ''}.", err=True)
        # Python notes an interruption that leaves executed text (dataclasses are made so), forgets it only when it
        # executes text again, and at the end of `python -m` would die of the signal, whatever became of it.
        exec("")
        raise typer.Exit(TERMINATED if isinstance(interruption, Terminated) else INTERRUPTED) from None


def _interruption(error: BaseException | None) -> KeyboardInterrupt | None:
    """Return the interruption behind an error: what is interrupted in its import raises errors of its own."""
    while error is not None and not isinstance(error, KeyboardInterrupt):
        error = error.__cause__ or error.__context__
    return error


def show(document: dict[str, Any], report: "Report", as_json: bool) -> None:
    """Print a document as tables, or as JSON."""
    if as_json:
        typer.echo(json.dumps(document, indent=2, allow_nan=False))
        return
    from sqs_pyro.reporting.printed import print_report

    print_report(report, width=120)  # of a pipe, which has none of its own; 80 would fold the names of tensors


def command_line() -> str:
    """Return what was typed, for documents that are kept."""
    return shlex.join(["sqs", *sys.argv[1:]])


def numbers(text: str, between: str, option: str, count: int | None = None) -> tuple[int, ...]:
    """Return the whole numbers that an option lists, ``count`` of them if it is given; raises RecipeError."""
    parts = text.split(between)
    if not all(part.strip().isdecimal() for part in parts) or count not in (None, len(parts)):
        raise RecipeError(f"{option} has {text!r}, which is not whole numbers with {between!r} between them.")
    return tuple(int(part) for part in parts)
