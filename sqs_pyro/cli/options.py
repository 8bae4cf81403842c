"""Options and arguments that several commands have."""

from pathlib import Path
from typing import Annotated

import typer

from sqs_pyro.errors import RecipeError

JsonOption = Annotated[bool, typer.Option("--json", help="Print one JSON document instead of tables.")]
DeviceOption = Annotated[
    str | None, typer.Option("--device", metavar="DEVICE", help="cpu, cuda, cuda:1, mps or auto.")
]
FileArgument = Annotated[
    Path,
    typer.Argument(metavar="FILE", help="A packed file, a run's directory, or a packed Hugging Face directory."),
]
NetworkOption = Annotated[
    str | None,
    typer.Option("--network", metavar="MODULE:FUNCTION", help="Code of yours that builds the file's network."),
]
DataOption = Annotated[
    str | None,
    typer.Option("--data", metavar="RECIPE|MODULE:FUNCTION", help="Recipe or code of yours whose data to use."),
]
RootOption = Annotated[
    Path | None, typer.Option("--root", metavar="DIR", help="Where the data set is on this machine.")
]


def size_in_bytes(given: str, option: str) -> int:
    """Return a size such as 80GB or 64GiB.

    Raises:
        RecipeError: it is none.
    """
    from pydantic import ByteSize, TypeAdapter, ValidationError

    try:
        size = int(TypeAdapter(ByteSize).validate_python(given))
    except ValidationError:
        size = 0
    if size < 1:
        raise RecipeError(f"{option} is {given!r}, but must be a size such as 80GB or 64GiB.")
    return size
