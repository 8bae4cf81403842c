"""The common part of every run that fine-tunes while it compresses: a packed file, and what it is worth."""

from dataclasses import asdict
from pathlib import Path
from typing import Any

from torch import nn

from sqs_pyro import load, save, size_report
from sqs_pyro.compression.finetune.call import CompressionResult, StepRecord, compress
from sqs_pyro.compression.finetune.recipe import CompressionRecipe
from sqs_pyro.data import Data
from sqs_pyro.evaluation.classification import largest_difference
from sqs_pyro.networks.calling import device_of
from sqs_pyro.networks.coverage import coverage
from sqs_pyro.reporting.bounds_plot import write_bounds_picture
from sqs_pyro.reporting.plots import write_pictures
from sqs_pyro.runs.bookkeeping import Clock, versions
from sqs_pyro.runs.bounds import run_bounds
from sqs_pyro.runs.bounds_recipe import BoundsRecipe
from sqs_pyro.runs.directory import BOUNDS, CHECKPOINT, PACKED, write_csv, write_json
from sqs_pyro.runs.pictures import layer_pictures
from sqs_pyro.runs.progress import Progress
from sqs_pyro.runs.recipe import WholeRecipe
from sqs_pyro.tasks.task import Judged, Parts, judge

HISTORY = "history.csv"


def compress_and_measure(
    recipe: WholeRecipe,
    compression: CompressionRecipe,
    judged: Judged,
    net: nn.Module,
    data: Data | Parts[Any],
    directory: Path,
    clock: Clock,
    progress: Progress,
) -> tuple[CompressionResult, dict[str, Any]]:
    """Compress a network, write the packed file, history and pictures, and measure the file as loaded from disk.

    Args:
        recipe: the whole one, which the file keeps.
        compression: how.
        judged: by which likelihood it is trained, and by which figures it is judged.
        net: fp32.
        data: loaders for training, for choices and for the final figures.
        directory: to write to; holds the checkpoint.
        clock: stages are noted there.
        progress: told of steps.

    Returns:
        The result, and what ``metrics.json`` shall hold, ``stage_seconds`` left out.
    """
    baseline = judged.measure(net, data.test)
    clock.lap("baseline")
    result = compress(
        net,
        data.train,
        compression,
        validation=data.validation,
        likelihood=judged.likelihood,
        judge=judge(judged),
        seed=recipe.seed,
        checkpoint=directory / CHECKPOINT,
        progress=_teller(progress),
        metadata={"recipe": recipe.model_dump(mode="json", exclude={"bounds"})},  # which change nothing in it
    )
    clock.lap("compression")
    packed = directory / PACKED
    save(result.network, packed)
    write_csv(directory / HISTORY, [record.row() for record in result.history])
    report = size_report(packed)
    write_pictures(directory, layer_pictures(result, report), result.history, judged.headline)
    clock.lap("writing")
    loaded = load(packed).to(device_of(net))
    compressed = judged.measure(loaded, data.test)
    return result, {
        "name": recipe.name,
        "seed": recipe.seed,
        "baseline": baseline,
        "compressed": compressed,
        "validation": judged.measure(loaded, data.validation),  # of the file too: choices are made by it
        f"{judged.headline}_drop": baseline[judged.headline] - compressed[judged.headline],
        "max_logit_difference": largest_difference(result.hard, loaded, data.test),
        "size": report.to_dict(),
        "nonzero_rate": report.nonzero_rate,
        "coverage": asdict(coverage(result.hard, result.model.site_values())),
        "beta": result.history[-1].kl_weight,
        "findings": [asdict(finding) for finding in result.findings],
        "seconds": result.seconds,
        "versions": versions(),
    }


def write_bounds(
    recipe: BoundsRecipe | None,
    result: CompressionResult,
    train: Any,
    seed: int,
    directory: Path,
    progress: Progress,
) -> None:
    """Write the bounds of :func:`~sqs_pyro.runs.bounds.run_bounds` and their picture, unless they are left out."""
    if recipe is None:
        return
    bounds = run_bounds(recipe, result, train, seed, progress)
    write_json(directory / BOUNDS, bounds)
    write_bounds_picture(directory / "bounds.png", bounds)


def _teller(progress: Progress) -> Any:
    """Tells of steps, the most important figure first: the last validation that there was."""
    judged = ""

    def tell(record: StepRecord) -> None:
        nonlocal judged
        if record.accuracy is not None:
            judged = f"validation {record.accuracy:.2%}, "
        text = f"{judged}loss {record.loss:.3f}, non-zero {record.nonzero_rate:.1%}, {record.stage}"
        progress("compression", record.step, record.total_steps, text)

    return tell
