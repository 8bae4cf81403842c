"""A whole run: a trained network in, a packed file that runs out, and what was measured on the way."""

from dataclasses import asdict
from pathlib import Path
from typing import Any

from torch import nn

from sqs_pyro import load, save, size_report
from sqs_pyro.compression import CompressionResult, StepRecord, compress
from sqs_pyro.data import Data, load_data
from sqs_pyro.inference.diagnostics import inert_averaging
from sqs_pyro.inference.evaluate import evaluate, largest_difference
from sqs_pyro.reporting.bounds_plot import write_bounds_picture
from sqs_pyro.reporting.plots import write_pictures
from sqs_pyro.runs.averaging import run_averaging
from sqs_pyro.runs.bookkeeping import Clock, versions
from sqs_pyro.runs.bounds import run_bounds
from sqs_pyro.runs.directory import (
    BOUNDS,
    CHECKPOINT,
    METRICS,
    PACKED,
    check_output,
    run_directory,
    write_csv,
    write_json,
)
from sqs_pyro.runs.network import give_weights, untrained_network
from sqs_pyro.runs.pictures import layer_pictures
from sqs_pyro.runs.progress import Progress, silent
from sqs_pyro.runs.recipe import RunRecipe, load_recipe

__all__ = ["HISTORY", "PACKED", "RunRecipe", "load_recipe", "run"]

HISTORY = "history.csv"


def run(
    recipe: RunRecipe,
    out_dir: str | Path,
    *,
    overwrite: bool = False,
    baselines_dir: str | Path | None = None,
    progress: Progress = silent,
) -> dict[str, Any]:
    """Train or find the baseline, compress it, write the packed file, and evaluate that file from disk.

    Everything that can be checked is checked before anything is trained. The finished directory holds
    ``packed.safetensors``, ``metrics.json``, ``bounds.json``, ``recipe.yaml`` with all defaults filled in,
    ``history.csv`` and the pictures. An interrupted run is taken up where it was by the same call.

    Args:
        recipe: what to do.
        out_dir: directory to make.
        overwrite: replace a finished run that is there.
        baselines_dir: where trained baselines are kept; ``baselines`` beside ``out_dir`` by default.
        progress: called often, for a progress bar.

    Returns:
        What ``metrics.json`` holds. Accuracies and calibration errors are fractions, NLL is in nats.

    Raises:
        SQSError: one sentence that says what is wrong with recipe, data, network or output directory.
    """
    out_dir = Path(out_dir).absolute()
    baselines = Path(baselines_dir) if baselines_dir is not None else out_dir.parent / "baselines"
    check_output(out_dir, recipe.as_yaml(), overwrite=overwrite)
    data = load_data(recipe.data, recipe.baseline.seed)
    net = untrained_network(recipe, data)
    with run_directory(out_dir, recipe.as_yaml(), overwrite=overwrite) as directory:
        epochs = give_weights(recipe, net, data, baselines, progress)
        data = load_data(recipe.data, recipe.seed)  # afresh: the same order whether a baseline was kept or not
        metrics = _compress_and_measure(recipe, net, data, directory, progress)
        metrics["stage_seconds"] = {
            "baseline": sum(epoch.seconds for epoch in epochs),
            **metrics["stage_seconds"],
        }
        write_json(directory / METRICS, metrics)
    return metrics


def _compress_and_measure(
    recipe: RunRecipe, net: nn.Module, data: Data, directory: Path, progress: Progress
) -> dict[str, Any]:
    baseline = evaluate(net, data.test)
    clock = Clock()
    result = _compress(recipe, net, data, directory, progress)
    clock.lap("compression")
    packed = directory / PACKED
    save(result.network, packed)
    write_csv(directory / HISTORY, [asdict(record) for record in result.history])
    report = size_report(packed)
    write_pictures(directory, layer_pictures(result, report), result.history)
    clock.lap("writing")
    loaded = load(packed)
    findings = list(result.findings)
    measured = {
        "baseline": asdict(baseline),
        "compressed": asdict(evaluate(loaded, data.test)),
        "validation": asdict(evaluate(loaded, data.validation)),  # of the file too: choices are made by it
    }
    if recipe.averaging is not None:
        measured |= run_averaging(recipe.averaging, result, data, recipe.seed, directory)
        at = measured["averaged"]["temperature"], recipe.averaging.gate_temperature
        findings += inert_averaging(result.guide, *at)
    clock.lap("evaluation")
    bounds = run_bounds(result, data.train, recipe.seed)
    write_json(directory / BOUNDS, bounds)
    write_bounds_picture(directory / "bounds.png", bounds)
    clock.lap("bounds")
    return {
        "name": recipe.name,
        "seed": recipe.seed,
        **measured,
        "accuracy_drop": measured["baseline"]["accuracy"] - measured["compressed"]["accuracy"],
        "max_logit_difference": largest_difference(result.hard, loaded, data.test),
        "size": report.to_dict(),
        "nonzero_rate": report.nonzero_rate,
        "beta": result.history[-1].kl_weight,
        "findings": [asdict(finding) for finding in findings],
        "seconds": result.seconds,
        "stage_seconds": {**clock.seconds, "compression": result.seconds},
        "versions": versions(),
    }


def _compress(
    recipe: RunRecipe, net: nn.Module, data: Data, directory: Path, progress: Progress
) -> CompressionResult:
    def tell(record: StepRecord) -> None:
        accuracy = "" if record.accuracy is None else f", validation {record.accuracy:.2%}"
        text = f"{record.stage}: loss {record.loss:.3f}, non-zero {record.nonzero_rate:.1%}{accuracy}"
        progress("compression", record.step, record.total_steps, text)

    return compress(
        net,
        data.train,
        recipe.compression,
        validation=data.validation,
        seed=recipe.seed,
        checkpoint=directory / CHECKPOINT,
        progress=tell,
        metadata={"recipe": recipe.model_dump(mode="json")},
    )
