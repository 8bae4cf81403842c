"""The `sqs` command: the one place that joins everything.

Commands import what they need when they run, so that `sqs --help` and mistyped options answer at once.
Results go to stdout (tables, or one JSON document with ``--json``), everything else to stderr.
"""

import json
import shlex
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from sqs_pyro.errors import OutputError, RecipeError, SQSError

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from sqs_pyro.reporting.printed import Report

BAD_INPUT, INTERRUPTED, TERMINATED = 2, 130, 143  # the last two as shells have them: 128 and the signal

app = typer.Typer(
    name="sqs",
    help="Bayesian compression of neural networks: prune, quantize, pack, and measure the file.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="markdown",  # paragraphs are wrapped anew, brackets are brackets
    pretty_exceptions_enable=False,  # a bug keeps its traceback
)

JsonOption = Annotated[bool, typer.Option("--json", help="Print one JSON document instead of tables.")]
_GOES_ON = "Interrupted with Ctrl-C, the same command goes on where it stopped."
DeviceOption = Annotated[
    str | None, typer.Option("--device", metavar="DEVICE", help="cpu, cuda, cuda:1, mps or auto.")
]
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
BenchOutOption = Annotated[
    Path | None,
    typer.Option("--out", metavar="JSON", help="Write the figures there, and a picture beside."),
]
FileArgument = Annotated[Path, typer.Argument(metavar="FILE", help="A packed file, or a run's directory.")]
NetworkOption = Annotated[
    str | None,
    typer.Option("--network", metavar="MODULE:FUNCTION", help="Code of yours that builds the file's network."),
]


def main() -> None:
    """Entry point of the `sqs` command."""
    app()


@app.command("compress")
def compress_command(
    source: Annotated[
        str,
        typer.Argument(
            metavar="RECIPE|NETWORK",
            help="A YAML recipe; a network: registered, torchvision/NAME, timm/NAME, module:function or "
            "file.py:function; or a language model's directory.",
        ),
    ],
    data: Annotated[
        str | None,
        typer.Argument(
            metavar="DATA",
            help="Of a network: a data set's name, .npz, .csv, .jsonl or .parquet, a directory of images, or "
            "module:function. Of a language model: text.",
            show_default=False,
        ),
    ] = None,
    out: Annotated[
        Path | None, typer.Option("--out", metavar="DIR", help="Directory to make for the run [in runs/].")
    ] = None,
    ratio: Annotated[float | None, typer.Option(help="Times smaller than the fp32 network.")] = None,
    megabytes: Annotated[float | None, typer.Option(help="Of the file.")] = None,
    bits: Annotated[
        float | None, typer.Option(help="Of the file, a parameter; of a language model, a compressed weight.")
    ] = None,
    task: Annotated[
        str | None, typer.Option(help="classification, multilabel, regression or segmentation.")
    ] = None,
    checkpoint: Annotated[
        Path | None, typer.Option(metavar="FILE", help="The network's weights; without, it is trained first.")
    ] = None,
    trained: Annotated[
        bool, typer.Option("--trained", help="The network has its weights from what builds it.")
    ] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace a finished run.")] = False,
    seed: Annotated[int | None, typer.Option("--seed", help="Instead of the recipe's seed.")] = None,
    device: DeviceOption = None,
    baselines: Annotated[
        Path | None,
        typer.Option("--baselines", metavar="DIR", help="Where trained networks are kept [runs' directory]."),
    ] = None,
    changes: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY=VALUE", help="Change one key, e.g. compression.nonzero_rate=0.2."),
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Train or load a network, compress it, and write a packed file with its figures and pictures.

    A network needs data and a size: `sqs compress torchvision/mobilenet_v3_small photos/ --ratio 20`. The recipe
    that this comes to is kept beside the file. A recipe with the key `blockwise` compresses a language model,
    block by block; one with the key `task` a transformer, while it is fine-tuned. Interrupted with Ctrl-C, the
    same command goes on where it stopped.
    """
    with _one_sentence_errors(f"the same command goes on from the last checkpoint of '{out or 'the run'}'"):
        from sqs_pyro.reporting.tables import run_tables
        from sqs_pyro.reporting.terminal import progress_display
        from sqs_pyro.runs.front.asked import asked_recipe, default_out
        from sqs_pyro.runs.kinds import kind_of
        from sqs_pyro.runs.recipe import Goal

        goal = Goal(ratio, megabytes, bits)
        asked = [f"{key}={value}" for key, value in (("seed", seed), ("device", device)) if value is not None]
        asked = [*(changes or []), *asked]
        recipe = asked_recipe(source, data, goal, task=task, checkpoint=checkpoint, trained=trained, changes=asked)
        out = out or default_out(source, data, goal)
        with progress_display() as progress:
            metrics = kind_of(recipe).run(
                recipe, out, overwrite=overwrite, baselines_dir=baselines, progress=progress
            )
        _show(metrics, run_tables(metrics), as_json)
        # To stderr: stdout is the table or the one JSON document, which has them, too.
        for finding in metrics.get("findings", ()):
            typer.echo(f"finding: {finding['sentence']}", err=True)
        typer.echo(f"Wrote {out}", err=True)


@app.command("evaluate")
def evaluate_command(
    file: FileArgument,
    data: Annotated[
        str | None,
        typer.Option(
            "--data", metavar="RECIPE|MODULE:FUNCTION", help="Recipe or code of yours whose data to use."
        ),
    ] = None,
    root: Annotated[
        Path | None, typer.Option("--root", metavar="DIR", help="Where the data set is on this machine.")
    ] = None,
    shift: Annotated[
        str | None,
        typer.Option("--shift", metavar="SHIFT", help="Shift the images: rotation:30, noise:0.5 or uniform."),
    ] = None,
    network: NetworkOption = None,
    device: DeviceOption = None,
    as_json: JsonOption = False,
) -> None:
    """Evaluate a packed file on its test data: its task's figures and size."""
    with _one_sentence_errors():
        from sqs_pyro.reporting.tables import evaluation_tables
        from sqs_pyro.runs.files import evaluate_file

        evaluation = evaluate_file(
            file, data_from=data, root=root, shift=shift, network=network, device=device or "cpu"
        )
        _show(evaluation, evaluation_tables(evaluation), as_json)


@app.command("uncertainty")
def uncertainty_command(
    file: FileArgument,
    data: Annotated[
        str | None,
        typer.Option(
            "--data", metavar="RECIPE|MODULE:FUNCTION", help="Recipe or code of yours whose data to use."
        ),
    ] = None,
    root: Annotated[
        Path | None, typer.Option("--root", metavar="DIR", help="Where the data set is on this machine.")
    ] = None,
    foreign: Annotated[
        list[str] | None,
        typer.Option("--foreign", metavar="NAME|PATH", help="Other classes: a data set, folder or recipe."),
    ] = None,
    shift: Annotated[
        list[str] | None,
        typer.Option("--shift", metavar="SHIFT", help="Shifted images: rotation:30, noise:0.5 or uniform."),
    ] = None,
    draws: Annotated[
        int | None,
        typer.Option("--draws", min=1, metavar="N", help="Networks: an ensemble's first N, or N drawn by widths."),
    ] = None,
    out: Annotated[
        Path | None, typer.Option("--out", metavar="DIR", help="Write the figures there, and pictures of them.")
    ] = None,
    network: NetworkOption = None,
    device: DeviceOption = None,
    as_json: JsonOption = False,
) -> None:
    """Say what a packed classifier's uncertainty is worth: calibration, selective prediction, other inputs.

    Of an ensemble, one draw stands beside the average; temperature scaling stands beside each. --foreign and
    --shift may be repeated.
    """
    with _one_sentence_errors():
        from sqs_pyro.reporting.tables import uncertainty_tables
        from sqs_pyro.runs.files import uncertainty_file

        document = uncertainty_file(
            file,
            data_from=data,
            root=root,
            foreign=foreign or (),
            shifts=shift or (),
            draws=draws,
            out=out,
            network=network,
            device=device or "cpu",
        )
        _show(document, uncertainty_tables(document), as_json)
        if out is not None:
            typer.echo(f"Wrote {out}", err=True)


@app.command("inspect")
def inspect_command(
    file: FileArgument,
    runtime: Annotated[
        bool, typer.Option("--runtime", help="Build the network, and show the form of its weights on this CPU.")
    ] = False,
    network: NetworkOption = None,
    as_json: JsonOption = False,
) -> None:
    """Show what a packed file holds, to the byte, without building the network."""
    with _one_sentence_errors():
        from sqs_pyro.reporting.tables import inspection_tables
        from sqs_pyro.runs.files import inspect_file

        inspection = inspect_file(file, runtime=runtime, network=network)
        _show(inspection, inspection_tables(inspection), as_json)


@app.command("export")
def export_command(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="A packed file, or packed Hugging Face directory.")],
    export_format: Annotated[str, typer.Option("--format", metavar="FORMAT", help="dense, aoti or onnx.")],
    out: Annotated[Path, typer.Option("--out", metavar="PATH", help="File to make; of aoti a directory.")],
    dtype: Annotated[
        str | None, typer.Option("--dtype", help="Of dense: float32, bfloat16 or float16 [float32].")
    ] = None,
    input_shape: Annotated[
        str | None,
        typer.Option("--input-shape", metavar="1,28,28", help="Of one random example [the file's own data]."),
    ] = None,
    data: Annotated[
        str | None,
        typer.Option(
            "--data", metavar="RECIPE|MODULE:FUNCTION", help="Recipe or code of yours whose data to use."
        ),
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an older export.")] = False,
    network: NetworkOption = None,
    as_json: JsonOption = False,
) -> None:
    """Write the network of a packed file for other programs, run what was written, and compare.

    dense: a plain checkpoint. aoti: a compiled network on packed weights that needs only PyTorch, Python or not.
    onnx: a model of codes and codebooks.
    """
    with _one_sentence_errors():
        from sqs_pyro.reporting.tables import export_tables
        from sqs_pyro.runs.export import export_file

        shape = None if input_shape is None else _numbers(input_shape, ",", "--input-shape")
        document = export_file(
            file,
            export_format,
            out,
            dtype=dtype,
            input_shape=shape,
            data_from=data,
            overwrite=overwrite,
            network=network,
        )
        _show({"command": _command_line(), **document}, export_tables(document), as_json)
        typer.echo(f"Wrote {out}", err=True)


@app.command("plan")
def plan_command(
    source: Annotated[
        Path, typer.Argument(metavar="CHECKPOINT|RECIPE", help="Directory with a config.json, or a YAML recipe.")
    ],
    sequences: Annotated[
        int | None, typer.Option("--sequences", min=1, help="Of a checkpoint: calibration sequences [128].")
    ] = None,
    length: Annotated[
        int | None, typer.Option("--length", min=2, help="Of a checkpoint: tokens in each [512].")
    ] = None,
    changes: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY=VALUE", help="A key of a recipe; of a checkpoint one of `blockwise`."),
    ] = None,
    whole: Annotated[
        bool, typer.Option("--whole", help="Of a checkpoint: all of it in memory, not one block at a time.")
    ] = False,
    as_json: JsonOption = False,
) -> None:
    """Tell how much memory blockwise compression is going to take, from the checkpoint's config.json alone.

    Of a recipe, what `sqs compress` takes; of a checkpoint, what it takes with `blockwise.streamed`.
    """
    with _one_sentence_errors():
        from sqs_pyro.reporting.tables import plan_tables
        from sqs_pyro.runs.kinds import kind_of, load_any_recipe
        from sqs_pyro.runs.language_model_recipe import checkpoint_recipe

        recipe: Any
        if source.is_file():
            if whole or (sequences, length) != (None, None):
                raise RecipeError(
                    f"--sequences, --length and --whole are for a checkpoint, but '{source}' is a recipe: change "
                    "text.count, text.length or blockwise.streamed with --set."
                )
            recipe = load_any_recipe(source, changes or [])
        else:
            recipe = checkpoint_recipe(source, sequences or 128, length or 512, changes or [], whole=whole)
        plan = kind_of(recipe).plan(recipe)
        _show(plan, plan_tables(plan), as_json)


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
    with _one_sentence_errors():
        from sqs_pyro.runs.report.pages import check_page_place, report_of, write_page

        if out is not None:
            check_page_place(out)
        told = report_of(sources)
        _show(told.document, told.tables, as_json)
        try:
            typer.echo(f"Wrote {write_page(told, out)}", err=True)
        except OutputError as error:
            if out is not None or len(sources) > 1:
                raise
            # What is finished may lie where nobody writes any more: it was shown all the same.
            typer.echo(f"No page is written: {error}", err=True)


@app.command("init")
def init_command(
    out: Annotated[Path, typer.Argument(metavar="RECIPE", help="The file to write.")] = Path("recipe.yaml"),
    network: Annotated[str | None, typer.Option(help="As of `sqs compress`; asked for without.")] = None,
    data: Annotated[str | None, typer.Option(help="As of `sqs compress`; asked for without.")] = None,
    task: Annotated[str | None, typer.Option(help="As of `sqs compress`.")] = None,
    checkpoint: Annotated[Path | None, typer.Option(metavar="FILE", help="The network's weights.")] = None,
    ratio: Annotated[float | None, typer.Option(help="Times smaller; asked for without.")] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace a file that is there.")] = False,
) -> None:
    """Ask a few questions, and write a recipe with comments for `sqs compress`."""
    with _one_sentence_errors():
        from sqs_pyro.runs.front.asked import asked_recipe
        from sqs_pyro.runs.front.first_recipe import write_first_recipe
        from sqs_pyro.runs.recipe import Goal

        names = "a name, torchvision/NAME, timm/NAME, module:function"
        network = network or _asked(f"Network ({names})", "--network")
        data = data or _asked("Data (a name, a file, a directory of images, module:function)", "--data")
        ratio = ratio or _asked("How many times smaller than in float32", "--ratio", 20.0)
        recipe = asked_recipe(network, data, Goal(ratio=ratio), task=task, checkpoint=checkpoint)
        write_first_recipe(recipe, out, overwrite=overwrite)
        typer.echo(f"Wrote {out}. Next: sqs compress {shlex.quote(str(out))}", err=True)


def _asked(question: str, option: str, default: Any = None) -> Any:
    """Ask on the terminal, for what is of the default's kind; where there is none, say which option answers."""
    if not _has_terminal():
        raise RecipeError(f"There is no terminal to ask on: give {option}.")
    return typer.prompt(question, default=default, err=True)


def _has_terminal() -> bool:
    return sys.stdin.isatty()


@app.command("doctor")
def doctor_command(as_json: JsonOption = False) -> None:
    """Say what this machine has (compiler, instructions, GPU, optional packages, data, caches) and what follows.

    CPU kernels are compiled if they are not there yet.
    """
    with _one_sentence_errors():
        from sqs_pyro.reporting.tables import doctor_tables
        from sqs_pyro.runs.front.doctor import examine

        found = examine()
        _show(found, doctor_tables(found), as_json)


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
    with _one_sentence_errors():
        from sqs_pyro.bench.kernels import bench_kernels
        from sqs_pyro.reporting.bench_plots import kernels_figure
        from sqs_pyro.reporting.bench_tables import kernel_tables

        _check_bench_out(out)
        sizes = None if shapes is None else tuple(_numbers(s, "x", "--shapes", 2) for s in shapes.split(","))
        document = bench_kernels(
            sizes,  # type: ignore[arg-type]
            _numbers(rows, ",", "--rows"),
            _numbers(bits, ",", "--bits"),
            threads,
            rounds,
            progress=lambda line: typer.echo(line, err=True),
            device=device,
        )
        _write_bench(out, document, kernels_figure)
        _show(document, kernel_tables(document), as_json)


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
    out: BenchOutOption = None,
    as_json: JsonOption = False,
) -> None:
    """Time whole networks, packed beside dense and NF4, float32 and bfloat16, cold and warm, methods in turn."""
    with _one_sentence_errors():
        from sqs_pyro.bench.model import bench_model
        from sqs_pyro.bench.networks import bench_networks
        from sqs_pyro.reporting.bench_plots import model_figure
        from sqs_pyro.reporting.bench_tables import model_tables

        _check_bench_out(out)
        batches, widths = _numbers(batch, ",", "--batch"), _numbers(bits, ",", "--bits")
        shape = None if input_shape is None else _numbers(input_shape, "x", "--input-shape")
        tokens = _numbers(lengths, ",", "--lengths")
        found = [net for name in networks for net in bench_networks(name, widths, shape, tokens, network)]
        document = bench_model(
            found,
            batches,
            threads,
            rounds,
            compiled=compiled,
            progress=lambda line: typer.echo(line, err=True),
        )
        _write_bench(out, document, model_figure)
        _show(document, model_tables(document), as_json)


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

        write_json(out, {"command": _command_line(), **document})
        write_figure(figure(document), out.with_suffix(".png"))
        page = write_page(report_of([out]))
        typer.echo(f"Wrote {out}, {out.with_suffix('.png').name} and {page.name}", err=True)


def _command_line() -> str:
    """Return what was typed, for documents that are kept."""
    return shlex.join(["sqs", *sys.argv[1:]])


def _numbers(text: str, between: str, option: str, count: int | None = None) -> tuple[int, ...]:
    parts = text.split(between)
    if not all(part.strip().isdecimal() for part in parts) or count not in (None, len(parts)):
        raise RecipeError(f"{option} has {text!r}, which is not whole numbers with {between!r} between them.")
    return tuple(int(part) for part in parts)


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
    with _one_sentence_errors(f"the same command goes on; '{out}' keeps what is finished"):
        from sqs_pyro.reporting.study_tables import comparison_tables, sweep_tables
        from sqs_pyro.reporting.terminal import progress_display
        from sqs_pyro.studies.recipe import load_study
        from sqs_pyro.studies.study import run_study, write_summary

        study = load_study(recipe, [*(changes or []), *([] if seeds is None else [f"seeds=[{seeds}]"])])
        with progress_display() as progress:
            results = run_study(
                study, out, jobs=jobs, baselines_dir=baselines, overwrite=overwrite, progress=progress
            )
        summary = write_summary(kind, study, results, out, command=_command_line())
        _show(summary, (sweep_tables if kind == "sweep" else comparison_tables)(summary), as_json)
        typer.echo(f"Wrote {out / kind}.json, .csv, .png and report.html", err=True)
    # Outside: the study itself has succeeded, and its summary is written; only the exit status says it.
    failed = [result for result in results if result.error is not None]
    if failed:
        typer.echo(f"error: {len(failed)} of {len(results)} runs failed, see above.", err=True)
        raise typer.Exit(BAD_INPUT)


@contextmanager
def _one_sentence_errors(resume: str = "") -> Iterator[None]:
    """Let errors of the input become one sentence on stderr; bugs pass with their traceback."""
    from sqs_pyro.compression.interruption import Terminated, interruptions_as_exceptions
    from sqs_pyro.resources import enough_resources

    try:
        with interruptions_as_exceptions(), enough_resources("This command"):
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


def _show(document: dict[str, Any], report: "Report", as_json: bool) -> None:
    if as_json:
        typer.echo(json.dumps(document, indent=2, allow_nan=False))
        return
    from sqs_pyro.reporting.printed import print_report

    print_report(report, width=120)  # of a pipe, which has none of its own; 80 would fold the names of tensors
