"""The common part of every run that fine-tunes while it compresses: fp32 weights, a packed file, and its worth."""

import copy
from collections.abc import Callable, Mapping
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch
from numpy.typing import NDArray
from torch import nn

from sqs_pyro import save, size_report
from sqs_pyro.compression.baseline import BaselineRecipe, EpochRecord, kept_epoch, train_baseline
from sqs_pyro.compression.finetune.call import CompressionResult, StepRecord, check_target, compress, network_model
from sqs_pyro.compression.finetune.recipe import CompressionRecipe
from sqs_pyro.compression.finetune.search import SearchRecipe, smallest
from sqs_pyro.compression.finetune.shards import check_divisible
from sqs_pyro.compression.finetune.telling import step_teller
from sqs_pyro.compression.patience import Kept
from sqs_pyro.data import Data
from sqs_pyro.evaluation.classification import largest_difference
from sqs_pyro.evaluation.latency import latency
from sqs_pyro.inference.guides.site import check_codebooks
from sqs_pyro.loggers.logger import Log
from sqs_pyro.networks.calling import device_of
from sqs_pyro.networks.coverage import coverage
from sqs_pyro.own_code import is_own
from sqs_pyro.packing.size import SizeReport
from sqs_pyro.ranks import ranks
from sqs_pyro.reporting.kept import kept_in_words
from sqs_pyro.reporting.layers import LayerPicture, layer_document
from sqs_pyro.reporting.plots import write_pictures
from sqs_pyro.runs.bookkeeping import Clock, Progress, machine, versions
from sqs_pyro.runs.directory import BLOCKS, CHECKPOINT, HISTORY, LAYERS, PACKED, in_turn, write_csv, write_lines
from sqs_pyro.runs.kinds import OpenedFile
from sqs_pyro.runs.recipe import WholeRecipe
from sqs_pyro.tasks.task import Judged, Parts, judge, lost


def file_metadata(recipe: WholeRecipe, about: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """Return what a run's file says of itself: its recipe, and what is told of inputs and targets."""
    # These change nothing in it; defaults, which recipe.yaml spells out, would be a fiftieth of a small file.
    kept = {"recipe": recipe.model_dump(mode="json", exclude={"bounds", "loggers"}, exclude_defaults=True)}
    return {**kept, "data": about} if about else kept


def check_compressible(
    net: nn.Module, recipe: CompressionRecipe, metadata: Mapping[str, Any] | None = None
) -> None:
    """Check that a network has layers to compress, weights enough in each for its codebook, and a size to reach.

    Args:
        net: the network.
        recipe: how it is compressed.
        metadata: of its file, whose bytes count.

    Raises:
        NetworkError, RecipeError: it has not; the sentence names the layer.
    """
    # Of a copy, as a model of it would be compressed: sites are named and counted by the same code.
    model = network_model(copy.deepcopy(net), recipe)
    for name, weight in model.site_values().items():
        check_codebooks(name, weight.shape, recipe.components_of(name), recipe.groups)
    check_target(net, recipe, metadata)


def trained_or_kept(
    net: nn.Module,
    train: Any,
    validation: Any,
    section: BaselineRecipe,
    kept: Path,
    compression: CompressionRecipe,
    metadata: Mapping[str, Any],
    tell: Progress,
    log: Log,
    **options: Any,
) -> list[EpochRecord]:
    """Train a network in place, or take the weights that an earlier call has kept.

    Args:
        net: to train.
        train, validation: minibatches.
        section: how to train.
        kept: file of the trained weights, or of an interrupted training's.
        compression: what follows; whether the network can be compressed is checked first.
        metadata: of the file that is to come.
        tell: told of epochs.
        log: told of their figures.
        options: ``loss`` and ``judge`` of :func:`~sqs_pyro.compression.baseline.train_baseline`.

    Returns:
        A record for every epoch of training, when ever that was.
    """

    log_epoch = log.steps("baseline")

    def progress(record: EpochRecord) -> None:
        log_epoch(record)
        judged = "" if record.validation_accuracy is None else f"validation {record.validation_accuracy:.2%}, "
        tell("baseline", record.epoch, section.epochs, f"{judged}loss {record.loss:.3f}")

    if not kept.exists():
        # Compression checks this, too, but after hours of training.
        check_compressible(net, compression, metadata)
        if compression.shards > 1:
            check_divisible(train, net, compression.shards)
    with in_turn(kept.with_suffix(".lock")):  # runs side by side share one baseline: the first trains it
        history = train_baseline(net, train, validation, section, checkpoint=kept, progress=progress, **options)
    tell_kept(tell, "baseline", kept_epoch(history, section))
    return history


def tell_kept(tell: Progress, stage: str, kept: Kept | None) -> None:
    """Tell that a stage has stopped before its end, if it has."""
    if kept is not None and kept.last < kept.planned:
        tell(stage, kept.planned, kept.planned, kept_in_words(asdict(kept), stage))


def note_kept(metrics: dict[str, Any], section: str, kept: Kept | None) -> None:
    """Note in what ``metrics.json`` will hold which weights of a section were kept, if it had patience."""
    if kept is not None:
        metrics["kept"] = {**metrics.get("kept", {}), section: asdict(kept)}


def compress_and_measure(
    recipe: WholeRecipe,
    compression: CompressionRecipe,
    judged: Judged,
    net: nn.Module,
    data: Data | Parts[Any],
    directory: Path,
    clock: Clock,
    progress: Progress,
    log: Log,
    about: Mapping[str, Any] | None = None,
    search: SearchRecipe | None = None,
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
        log: told of their figures.
        about: what of inputs and targets the file shall tell, see :class:`~sqs_pyro.data.splits.Data`.
        search: for which size; None: that of ``compression``.

    Returns:
        The result, and what ``metrics.json`` shall hold, ``stage_seconds`` left out.
    """
    # Here, on the network that goes into compression: never a figure that was kept with the weights.
    baseline = judged.measure(net, data.test)
    clock.lap("baseline")
    tell_step = step_teller(progress)

    def tell(stage: str, record: StepRecord) -> None:
        log.steps(stage)(record)
        tell_step(stage, record)

    if search is not None:
        (directory / BLOCKS).mkdir(exist_ok=True)
    result, seconds, searched = shared(recipe, compression, judged, net, data, directory, tell, about, search)
    if search is None:
        tell_kept(progress, "compression", result.kept)
    clock.lap("compression")
    packed = directory / PACKED
    save(result.network, packed)
    write_csv(directory / HISTORY, [record.row() for record in result.history])
    report = size_report(packed)  # of the file, not of the network in memory: honest bytes
    pictures = layer_pictures(result, report)
    write_lines(directory / LAYERS, "layers", [layer_document(picture) for picture in pictures])
    write_pictures(directory, pictures, result.history, judged.headline)
    clock.lap("writing")
    loaded = OpenedFile(packed, {}, _own_name(net)).load().to(device_of(net))
    compressed = judged.measure(loaded, data.test)
    validation = judged.measure(loaded, data.validation)  # of the file too: choices are made by it
    curves = {"fp32": baseline, "packed file": compressed, "validation": validation}
    # Apart from the figures, which are one number each; the validation's is not drawn.
    reliability = {name: own.pop("reliability") for name, own in curves.items() if "reliability" in own}
    reliability.pop("validation", None)
    metrics = {
        "name": recipe.name,
        "seed": recipe.seed,
        "baseline": baseline,
        "compressed": compressed,
        "validation": validation,
        **({"reliability": reliability} if reliability else {}),
        f"{judged.headline}_drop": lost(judged, baseline, compressed),
        "max_logit_difference": largest_difference(result.hard, loaded, data.test),
        "size": report.to_dict(),
        "nonzero_rate": report.nonzero_rate,
        "coverage": asdict(coverage(result.hard, result.model.site_values())),
        "beta": result.history[-1].kl_weight,
        "findings": [asdict(finding) for finding in result.findings],
        **searched,
        "latency": latency(result.hard, loaded, next(iter(data.test))[0]),
        "seconds": seconds,
        "versions": versions(),
        "machine": machine(),
    }
    note_kept(metrics, "compression", result.kept)
    return result, metrics


def shared(
    recipe: WholeRecipe,
    compression: CompressionRecipe,
    judged: Judged,
    net: nn.Module,
    data: Data | Parts[Any],
    directory: Path,
    tell: Callable[[str, StepRecord], None] | None = None,
    about: Mapping[str, Any] | None = None,
    search: SearchRecipe | None = None,
) -> tuple[CompressionResult, float, dict[str, Any]]:
    """Compress a network: the part of :func:`compress_and_measure` that ranks share, its arguments as there.

    Args:
        tell: told of steps, with the name of what is going on; None on ranks that do not lead.

    Returns:
        The result, what it took in seconds, and what a search tells.
    """
    options: dict[str, Any] = {
        "validation": data.validation,
        "likelihood": judged.likelihood,
        "judge": judge(judged),
        "seed": recipe.seed,
        "metadata": file_metadata(recipe, about),
    }
    if search is None:
        told = False if tell is None else partial(tell, "compression")
        kept_at = directory / CHECKPOINT
        result = compress(net, data.train, compression, checkpoint=kept_at, progress=told, **options)
        return result, result.seconds, {}
    attempts = directory / BLOCKS
    found = smallest(net, data.train, compression, search, directory=attempts, progress=tell, **options)
    return found.result, found.seconds, {"search": found.document(search.points)}


def take_leaders_weights(net: nn.Module) -> None:
    """Give a network on each rank the weights that it has on the leader, which has trained or read them."""
    among = ranks()
    if among.size > 1:
        state = {name: value.cpu() for name, value in net.state_dict().items()} if among.leads else None
        net.load_state_dict(among.from_rank(state))


def _own_name(net: nn.Module) -> str | None:
    """Return the name of the user's code that has built a network, as their recipe gives it; None: it was none."""
    spec: Any = getattr(net, "network_spec", None)
    return spec["name"] if spec is not None and is_own(spec["name"]) else None


@torch.no_grad()
def layer_pictures(result: CompressionResult, report: SizeReport) -> list[LayerPicture]:
    """Return a picture of every compressed layer, in the network's order.

    Args:
        result: the compressed network and its posterior.
        report: its size, for the bits that each layer takes.
    """
    shipped = dict(result.hard.named_parameters())
    bits = {row.name: 8 * row.bytes / row.numel for row in report.tensors}
    pictures = []
    for name, site in result.guide.site_guides().items():
        # Survivors, as the windows were made of them; a layer of zeros alone has only its latents to show.
        bulk = site.windows.bulk(site.latent[site.mask] if site.mask.any() else site.latent)
        pictures.append(
            LayerPicture(
                name=name,
                weights=_array(site.latent),
                values=_array(shipped[name]),
                nonzero=_array(site.gates() > 0.5),
                loc=_array(site.loc[0]),  # of several codebooks the first: a picture has room for one
                scale=_array(site.scale[0]),
                mixing=_array(site.mixing_logits[0].softmax(-1)),
                window_edges=_array(site.edges),
                bits=bits[name],
                bulk=None if bulk is None else _array(torch.stack(bulk)),
            )
        )
    return pictures


def _array(tensor: torch.Tensor) -> NDArray[Any]:
    return tensor.detach().flatten().cpu().numpy()
