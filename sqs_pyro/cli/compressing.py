"""Compress one network, or ask for the recipe or the memory first."""

import json
import shlex
import sys
from contextlib import nullcontext
from pathlib import Path
from typing import Annotated, Any

import typer

from sqs_pyro.cli.application import app
from sqs_pyro.cli.options import DeviceOption, JsonOption, size_in_bytes
from sqs_pyro.cli.running import BAD_INPUT, one_sentence_errors, show
from sqs_pyro.errors import RecipeError, ResourceError


@app.command("compress")
def compress_command(
    source: Annotated[
        str,
        typer.Argument(
            metavar="RECIPE|NETWORK",
            help="A YAML recipe; a network: registered, torchvision/NAME, timm/NAME, module:function or "
            "file.py:function; the Hugging Face directory of a classifier of images or a language model; or a "
            "language model's GGUF file.",
        ),
    ],
    data: Annotated[
        str | None,
        typer.Argument(
            metavar="DATA",
            help="Of a network: a data set's name, .npz, .csv, .jsonl or .parquet, a directory of images, "
            "hub/NAME, or module:function. Of a language model: text.",
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
    points: Annotated[
        float | None,
        typer.Option(
            help="Look for the smallest file that loses at most so many points on validation data; of a language "
            "model hundredths of its perplexity."
        ),
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
    logger: Annotated[
        list[str] | None,
        typer.Option(
            "--logger",
            metavar="NAME",
            help="csv, tensorboard, mlflow or wandb; again for more [the recipe's].",
        ),
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Train or load a network, compress it, and write a packed file with its figures and pictures.

    A network needs data and a size: `sqs compress torchvision/mobilenet_v3_small photos/ --ratio 20`, or what a
    small file may cost: `--points 0.5`. The recipe that this comes to is kept beside the file. A recipe with the
    key `blockwise` compresses a language model, block by block; one with the key `task` a transformer, while it is
    fine-tuned. Interrupted with Ctrl-C, the same command goes on where it stopped.
    """
    place = f"'{out or 'the run'}'"
    goes_on = f"the same command goes on from the last checkpoint of {place}, if it has one"
    with one_sentence_errors(goes_on, on_ranks=True):
        from sqs_pyro.ranks import started
        from sqs_pyro.reporting.latency import slower
        from sqs_pyro.reporting.tables import run_tables
        from sqs_pyro.reporting.terminal import progress_display
        from sqs_pyro.runs.bookkeeping import silent
        from sqs_pyro.runs.front.asked import asked_recipe, default_out
        from sqs_pyro.runs.kinds import kind_of
        from sqs_pyro.runs.recipe import Goal

        goal = Goal(ratio, megabytes, bits, points)
        asked = [f"{key}={value}" for key, value in (("seed", seed), ("device", device)) if value is not None]
        asked += [f"loggers={json.dumps(logger)}"] if logger else []
        asked = [*(changes or []), *asked]
        recipe = asked_recipe(source, data, goal, task=task, checkpoint=checkpoint, trained=trained, changes=asked)
        out = out or default_out(source, data, goal)
        kind = kind_of(recipe)
        with started() as among, progress_display() if among.leads else nullcontext(silent) as progress:
            if among.size > 1 and not kind.on_ranks:
                raise RecipeError(f"{among.size} ranks cannot share {kind.said}: start it without torchrun.")
            metrics = kind.run(recipe, out, overwrite=overwrite, baselines_dir=baselines, progress=progress)
        if not among.leads:
            return
        show(metrics, run_tables(metrics), as_json)
        # To stderr: stdout is the table or the one JSON document, which has them, too.
        found = [finding["sentence"] for finding in metrics.get("findings", ())]
        for sentence in [*found, *([slow] if (slow := slower(metrics.get("latency"))) else [])]:
            typer.echo(f"finding: {sentence}", err=True)
        typer.echo(f"Wrote {out}", err=True)
    # Outside, as of studies: what was found is written and shown, only the exit status says that it is not enough.
    if unmet := metrics.get("search", {}).get("unmet"):
        typer.echo(f"error: {unmet}", err=True)
        raise typer.Exit(BAD_INPUT)


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
    with one_sentence_errors():
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


@app.command("plan")
def plan_command(
    source: Annotated[
        Path, typer.Argument(metavar="CHECKPOINT|RECIPE", help="A config.json or its directory, or a YAML recipe.")
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
    ranks: Annotated[
        int, typer.Option("--ranks", min=1, help="That share the work: what each of them takes.")
    ] = 1,
    device_memory: Annotated[
        str | None,
        typer.Option("--device-memory", metavar="SIZE", help="That a rank has, such as 80GB: is it enough?"),
    ] = None,
    machine: Annotated[
        str, typer.Option("--machine", metavar="NAME", help="That time is told of: cpu or h100.")
    ] = "cpu",
    as_json: JsonOption = False,
) -> None:
    """Tell how much memory and time blockwise compression is going to take, from a config.json alone.

    Of a recipe, what `sqs compress` takes; of a checkpoint, what it takes with `blockwise.streamed`. Where a
    device's memory is not enough, it is said what would fit, and the exit status is 2.
    """
    with one_sentence_errors():
        from sqs_pyro.reporting.tables import plan_tables
        from sqs_pyro.runs.kinds import kind_of, load_any_recipe
        from sqs_pyro.runs.language_model_recipe import checkpoint_recipe

        recipe: Any
        memory = None if device_memory is None else size_in_bytes(device_memory, "--device-memory")
        source = source.parent if source.name == "config.json" else source
        if source.is_file():
            if whole or (sequences, length) != (None, None):
                raise RecipeError(
                    f"--sequences, --length and --whole are for a checkpoint, but '{source}' is a recipe: change "
                    "text.count, text.length or blockwise.streamed with --set."
                )
            recipe = load_any_recipe(source, changes or [])
        else:
            recipe = checkpoint_recipe(source, sequences or 128, length or 512, changes or [], whole=whole)
        plan = kind_of(recipe).plan(recipe, ranks=ranks, device_memory=memory, machine=machine)
        show(plan, plan_tables(plan), as_json)
        if plan["unfit"]:
            raise ResourceError(plan["unfit"])
