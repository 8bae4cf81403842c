"""Runs on images: a trained network in, a packed file that runs out, and what was measured on the way."""

from dataclasses import asdict
from pathlib import Path
from typing import Any

from torch import nn

from sqs_pyro.atomic import check_place, resolved
from sqs_pyro.compression.baseline import kept_epoch
from sqs_pyro.data import Data, load_data
from sqs_pyro.inference.diagnostics import inert_averaging
from sqs_pyro.loggers.logger import Log, logged
from sqs_pyro.ranks import ranks
from sqs_pyro.runs.bookkeeping import Clock, Progress, chosen_device, silent
from sqs_pyro.runs.directory import (
    MADE_OF,
    METRICS,
    check_output,
    partial_directory,
    run_directory,
    run_loggers,
    write_json,
)
from sqs_pyro.runs.images.network import give_weights, made_of, untrained_network
from sqs_pyro.runs.measured import compress_and_measure, note_kept, shared, take_leaders_weights
from sqs_pyro.runs.posterior import run_averaging, write_bounds
from sqs_pyro.runs.recipe import RunRecipe
from sqs_pyro.runs.report.pages import write_run_page
from sqs_pyro.tasks.metrics import data_objective
from sqs_pyro.tasks.objectives import objective
from sqs_pyro.tasks.task import lost


def run(
    recipe: RunRecipe,
    out_dir: str | Path,
    *,
    overwrite: bool = False,
    baselines_dir: str | Path | None = None,
    progress: Progress = silent,
) -> dict[str, Any]:
    """Train or find the baseline, compress it, write the packed file, and evaluate that file from disk.

    On ranks all of them call this: they share the compression, and the leader does the rest.

    Everything that can be checked is checked before anything is trained. The finished directory holds
    ``packed.safetensors``, ``metrics.json``, ``bounds.json``, ``recipe.yaml`` with all defaults filled in,
    ``history.csv``, ``layers.json``, the pictures and ``report.html``. An interrupted run is taken up where
    it was by the same call.

    Args:
        recipe: what to do.
        out_dir: directory to make.
        overwrite: replace a finished run that is there.
        baselines_dir: where trained baselines are kept; ``baselines`` beside ``out_dir`` by default.
        progress: called often, for a progress bar.

    Returns:
        What ``metrics.json`` holds; nothing on ranks that do not lead. Accuracies and calibration errors are
        fractions, NLL is in nats.

    Raises:
        SQSError: one sentence that says what is wrong with recipe, data, network or output directory.
    """
    among = ranks()
    among.check(recipe.compression.shards, "compression.shards")
    out_dir = resolved(out_dir)
    if not among.leads:
        _follow(recipe, out_dir)
        return {}
    baselines = resolved(baselines_dir) if baselines_dir is not None else out_dir.parent / "baselines"
    check_output(out_dir, recipe.as_yaml(), overwrite=overwrite)
    loggers = run_loggers(recipe, out_dir)
    check_place(baselines / "kept.pt")  # any name will do: it is the place that is tried
    # The baseline's seed orders its data: runs of several seeds may share one baseline.
    data = load_data(recipe.data, recipe.baseline.seed)
    device = chosen_device(recipe.device)
    net = untrained_network(recipe, data).to(device)
    with (
        run_directory(out_dir, recipe.as_yaml(), overwrite=overwrite) as directory,
        logged(loggers, recipe.name or out_dir.name, recipe.model_dump(mode="json")) as log,
    ):
        # Inside, so that one process at a time trains for this run, but kept outside: a failed run leaves it.
        epochs = give_weights(recipe, net, data, baselines, progress, log)
        take_leaders_weights(net)
        data = load_data(recipe.data, recipe.seed)  # afresh: the same order whether a baseline was kept or not
        clock = Clock()
        metrics = _compress_and_measure(recipe, net, data, directory, clock, progress, log)
        baseline = sum(epoch.seconds for epoch in epochs)
        metrics["stage_seconds"] = {**clock.seconds, "baseline": baseline, "compression": metrics["seconds"]}
        write_json(directory / MADE_OF, made_of(recipe))
        if epochs:
            note_kept(metrics, "baseline", kept_epoch(epochs, recipe.baseline))
        write_json(directory / METRICS, metrics)
        log.finish(metrics)
        write_run_page(directory)
    return metrics


def _follow(recipe: RunRecipe, out_dir: Path) -> None:
    """Take part in the compression that another rank leads; nothing is written."""
    net = untrained_network(recipe, load_data(recipe.data, recipe.baseline.seed)).to(chosen_device(recipe.device))
    take_leaders_weights(net)
    data = load_data(recipe.data, recipe.seed)
    judged, place = data_objective(recipe.data, data), partial_directory(out_dir)
    shared(recipe, recipe.compression, judged, net, data, place, about=data.about, search=recipe.search)


def _compress_and_measure(
    recipe: RunRecipe, net: nn.Module, data: Data, directory: Path, clock: Clock, progress: Progress, log: Log
) -> dict[str, Any]:
    judged = data_objective(recipe.data, data)
    result, metrics = compress_and_measure(
        recipe,
        recipe.compression,
        judged,
        net,
        data,
        directory,
        clock,
        progress,
        log,
        about=data.about,
        search=recipe.search,
    )
    if recipe.data.metric is not None:  # the task's own figure is compared by studies
        own = objective(data, recipe.data.ignore_index)
        metrics[f"{own.headline}_drop"] = lost(own, metrics["baseline"], metrics["compressed"])
    if recipe.averaging is not None:
        metrics |= run_averaging(recipe.averaging, result, data, recipe.seed, directory)
        at = metrics["averaged"]["temperature"], recipe.averaging.gate_temperature
        metrics["findings"] += [asdict(finding) for finding in inert_averaging(result.guide, *at)]
    clock.lap("evaluation")
    write_bounds(recipe.bounds, result, data.train, recipe.seed, directory, progress)
    clock.lap("bounds")
    return metrics
