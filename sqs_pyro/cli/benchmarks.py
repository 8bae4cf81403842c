"""Measure speed: `sqs bench`."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from sqs_pyro.cli.application import app
from sqs_pyro.cli.options import DeviceOption, JsonOption, NetworkOption
from sqs_pyro.cli.running import command_line, numbers, one_sentence_errors, show
from sqs_pyro.errors import OutputError

if TYPE_CHECKING:
    from matplotlib.figure import Figure

BenchOutOption = Annotated[
    Path | None,
    typer.Option("--out", metavar="JSON", help="Write the figures there, and a picture beside."),
]


bench_app = typer.Typer(no_args_is_help=True, help="Measure speed on this machine, beside what else there is.")
app.add_typer(bench_app, name="bench")


@bench_app.command("kernels")
def bench_kernels_command(
    shapes: Annotated[
        str | None, typer.Option(help="OUTPUTSxINPUTS of weights, by commas; usual ones of the device without.")
    ] = None,
    rows: Annotated[str, typer.Option(help="Rows of x, by commas.")] = "1,4,16,64",
    bits: Annotated[str, typer.Option(help="Bits of codes, by commas.")] = "4,3,2",
    threads: Annotated[int, typer.Option(help="Threads of torch.")] = 1,
    rounds: Annotated[int, typer.Option(help="Products of each method.")] = 40,
    device: Annotated[str, typer.Option(help="cpu, or cuda: products in CUDA graphs.")] = "cpu",
    out: BenchOutOption = None,
    as_json: JsonOption = False,
) -> None:
    """Time products with packed weights beside float32, bfloat16, int4 and NF4, weights cold, methods in turn."""
    with one_sentence_errors():
        from sqs_pyro.bench.kernels import bench_kernels
        from sqs_pyro.reporting.bench_plots import kernels_figure
        from sqs_pyro.reporting.bench_tables import kernel_tables

        _check_bench_out(out)
        sizes = None if shapes is None else tuple(numbers(s, "x", "--shapes", 2) for s in shapes.split(","))
        document = bench_kernels(
            sizes,  # type: ignore[arg-type]
            numbers(rows, ",", "--rows"),
            numbers(bits, ",", "--bits"),
            threads,
            rounds,
            progress=lambda line: typer.echo(line, err=True),
            device=device,
        )
        _write_bench(out, document, kernels_figure)
        show(document, kernel_tables(document), as_json)


@bench_app.command("model")
def bench_model_command(
    networks: Annotated[
        list[str],
        typer.Argument(
            metavar="FILE...",
            help="Packed files; or resnet20, transformer, mobilenet_v3_small, efficientnet_b0: random codes.",
        ),
    ],
    batch: Annotated[str, typer.Option(help="Examples of a call, by commas.")] = "1,32",
    input_shape: Annotated[
        str | None, typer.Option("--input-shape", metavar="CxHxW", help="Of images [that of the file's data].")
    ] = None,
    lengths: Annotated[str, typer.Option(help="Of texts, in tokens, by commas.")] = "64,1",
    bits: Annotated[str, typer.Option(help="Bits of built-in networks' codes, by commas.")] = "4",
    threads: Annotated[int, typer.Option(help="Threads of torch.")] = 1,
    rounds: Annotated[int, typer.Option(help="Calls of each method, cold and warm.")] = 30,
    compiled: Annotated[
        bool, typer.Option("--compile/--eager", help="By torch.compile in one piece, or as they are.")
    ] = True,
    network: NetworkOption = None,
    device: DeviceOption = None,
    out: BenchOutOption = None,
    as_json: JsonOption = False,
) -> None:
    """Time whole networks, packed beside dense and NF4, float32 and bfloat16, cold and warm, methods in turn."""
    with one_sentence_errors():
        from sqs_pyro.bench.model import bench_model
        from sqs_pyro.bench.networks import bench_networks
        from sqs_pyro.reporting.bench_plots import model_figure
        from sqs_pyro.reporting.bench_tables import model_tables

        _check_bench_out(out)
        batches, widths = numbers(batch, ",", "--batch"), numbers(bits, ",", "--bits")
        shape = None if input_shape is None else numbers(input_shape, "x", "--input-shape")
        tokens = numbers(lengths, ",", "--lengths")
        found = [net for name in networks for net in bench_networks(name, widths, shape, tokens, network)]
        document = bench_model(
            found,
            batches,
            threads,
            rounds,
            compiled=compiled,
            progress=lambda line: typer.echo(line, err=True),
            device=device or "cpu",
        )
        _write_bench(out, document, model_figure)
        show(document, model_tables(document), as_json)


def _check_bench_out(out: Path | None) -> None:
    from sqs_pyro.atomic import check_place
    from sqs_pyro.runs.report.pages import check_page_place

    if out is None:
        return
    if out.suffix != ".json" or not out.absolute().parent.is_dir():
        raise OutputError(f"--out '{out}' should be a file *.json in a directory that is there: correct the path.")
    check_place(out)
    if out.exists() and not _is_bench(out):
        raise OutputError(f"'{out}' exists and holds no figures of `sqs bench`: choose another path.")
    check_page_place(out.with_suffix(".html"))


def _is_bench(path: Path) -> bool:
    try:
        document = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError):
        return False
    return isinstance(document, dict) and {"machine", "rows"} <= document.keys()


def _write_bench(out: Path | None, document: dict[str, Any], figure: "Callable[[dict[str, Any]], Figure]") -> None:
    """Write figures, and their picture beside them."""
    if out is not None:
        from sqs_pyro.reporting.style import write_figure
        from sqs_pyro.runs.directory import write_json
        from sqs_pyro.runs.report.pages import report_of, write_page

        write_json(out, {"command": command_line(), **document})
        write_figure(figure(document), out.with_suffix(".png"))
        page = write_page(report_of([out]))
        typer.echo(f"Wrote {out}, {out.with_suffix('.png').name} and {page.name}", err=True)
