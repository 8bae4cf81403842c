"""What is done with a packed file: evaluate, uncertainty, inspect, export, generate."""

import json
from pathlib import Path
from typing import Annotated

import typer

from sqs_pyro.cli.application import app
from sqs_pyro.cli.options import DataOption, DeviceOption, FileArgument, JsonOption, NetworkOption, RootOption
from sqs_pyro.cli.running import command_line, numbers, one_sentence_errors, show


@app.command("evaluate")
def evaluate_command(
    file: FileArgument,
    data: DataOption = None,
    root: RootOption = None,
    shift: Annotated[
        str | None,
        typer.Option("--shift", metavar="SHIFT", help="Shift the images: rotation:30, noise:0.5 or uniform."),
    ] = None,
    network: NetworkOption = None,
    device: DeviceOption = None,
    as_json: JsonOption = False,
) -> None:
    """Evaluate a packed file on its test data: its task's figures and size."""
    with one_sentence_errors():
        from sqs_pyro.reporting.tables import evaluation_tables
        from sqs_pyro.runs.files import evaluate_file

        evaluation = evaluate_file(
            file, data_from=data, root=root, shift=shift, network=network, device=device or "cpu"
        )
        show(evaluation, evaluation_tables(evaluation), as_json)


@app.command("uncertainty")
def uncertainty_command(
    file: FileArgument,
    data: DataOption = None,
    root: RootOption = None,
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
    with one_sentence_errors():
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
        show(document, uncertainty_tables(document), as_json)
        if out is not None:
            typer.echo(f"Wrote {out}", err=True)


@app.command("inspect")
def inspect_command(
    file: FileArgument,
    runtime: Annotated[
        bool, typer.Option("--runtime", help="Build the network, and show the form of its weights on this device.")
    ] = False,
    network: NetworkOption = None,
    device: DeviceOption = None,
    as_json: JsonOption = False,
) -> None:
    """Show what a packed file holds, to the byte, without building the network."""
    with one_sentence_errors():
        from sqs_pyro.reporting.tables import inspection_tables
        from sqs_pyro.runs.files import inspect_file

        inspection = inspect_file(file, runtime=runtime, network=network, device=device)
        show(inspection, inspection_tables(inspection), as_json)


@app.command("export")
def export_command(
    file: FileArgument,
    export_format: Annotated[str, typer.Option("--format", metavar="FORMAT", help="See below.")],
    out: Annotated[Path, typer.Option("--out", metavar="PATH", help="File or directory to make.")],
    dtype: Annotated[
        str | None, typer.Option("--dtype", help="Of what has no codes: float32, bfloat16 or float16 [float32].")
    ] = None,
    input_shape: Annotated[
        str | None,
        typer.Option("--input-shape", metavar="1,28,28", help="Of one random example [the file's own data]."),
    ] = None,
    data: DataOption = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an older export.")] = False,
    network: NetworkOption = None,
    device: DeviceOption = None,
    as_json: JsonOption = False,
) -> None:
    """Write the network of a packed file for other programs, run what was written, and compare.

    dense: a plain checkpoint. aoti: a compiled network on packed weights that needs only PyTorch, Python or not.
    onnx, openvino, coreml: a model of codes and codebooks. onnx-qdq: an ONNX model that stays small in memory.
    torchao: a state dict of its tensors, of whole numbers. executorch: a program, with XNNPACK's products of them.
    Of a packed Hugging Face directory of whole numbers also compressed-tensors (vLLM) and gguf (llama.cpp).
    """
    with one_sentence_errors():
        from sqs_pyro.reporting.tables import export_tables
        from sqs_pyro.runs.export import export_file

        shape = None if input_shape is None else numbers(input_shape, ",", "--input-shape")
        document = export_file(
            file,
            export_format,
            out,
            dtype=dtype,
            input_shape=shape,
            data_from=data,
            overwrite=overwrite,
            network=network,
            device=device or "cpu",
        )
        show({"command": command_line(), **document}, export_tables(document), as_json)
        typer.echo(f"Wrote {out}", err=True)


@app.command("generate")
def generate_command(
    file: FileArgument,
    prompt: Annotated[str, typer.Argument(metavar="PROMPT", help="The text to continue; - reads it from stdin.")],
    tokens: Annotated[int, typer.Option(help="New tokens, at most.")] = 128,
    temperature: Annotated[float, typer.Option(help="Of the draws; 0 takes the likeliest token.")] = 0.0,
    seed: Annotated[int, typer.Option(help="Of the draws.")] = 0,
    chat: Annotated[
        bool | None,
        typer.Option(
            "--chat/--plain", help="Prompt in the chat template, or as it is [a template, if there is one]."
        ),
    ] = None,
    compiled: Annotated[
        bool,
        typer.Option("--compile", help="By compiled code: faster, behind minutes of compiling the first time."),
    ] = False,
    int8: Annotated[
        bool, typer.Option("--int8", help="Round inputs to 8 bits where weights are whole numbers: faster.")
    ] = False,
    dtype: Annotated[str, typer.Option(help="Of what is computed: float32, bfloat16 or float16.")] = "float32",
    device: DeviceOption = None,
    as_json: JsonOption = False,
) -> None:
    """Continue a text by a packed language model, as it comes, and say how fast."""
    with one_sentence_errors():
        from sqs_pyro.runs.generation import generate_file

        document = generate_file(
            file,
            typer.get_text_stream("stdin").read() if prompt == "-" else prompt,
            tokens=tokens,
            temperature=temperature,
            seed=seed,
            chat=chat,
            compiled=compiled,
            int8=int8,
            dtype=dtype,
            device=device or "cpu",
            tell=(lambda text: None) if as_json else (lambda text: print(text, end="", flush=True)),
        )
        if as_json:
            typer.echo(json.dumps(document, indent=2))
            return
        typer.echo()
        rate = document["tokens_per_second"]
        speed = "" if rate is None else f", then {rate:.1f} a second"
        typer.echo(
            f"{document['tokens']} tokens, the first after {document['first_token_seconds']:.2f} s{speed}",
            err=True,
        )
