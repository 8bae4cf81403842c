"""A whole run on a task: a checkpoint of transformers in, a packed file that runs out, both judged by the task."""

import json
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch
from torch import nn

from sqs_pyro.atomic import check_place, resolved
from sqs_pyro.compression.baseline import EpochRecord, kept_epoch
from sqs_pyro.compression.finetune.recipe import CompressionRecipe
from sqs_pyro.data.token_loader import TokenDataset, TokenLoader
from sqs_pyro.documents import shown
from sqs_pyro.errors import RecipeError
from sqs_pyro.exporting.examples import first_rows
from sqs_pyro.fingerprint import network_fingerprint
from sqs_pyro.integrations.pretrained import Pretrained, find_pretrained, pad_token
from sqs_pyro.loggers.logger import Log, logged
from sqs_pyro.networks.state import fp32_bytes
from sqs_pyro.networks.task_networks import AUTO_CLASSES, include_parts, task_network, transformer_in
from sqs_pyro.networks.tokens import longest_input, vocabulary_size
from sqs_pyro.ranks import ranks
from sqs_pyro.recipes import parse
from sqs_pyro.runs.bookkeeping import Clock, Progress, chosen_device, silent, versions
from sqs_pyro.runs.directory import (
    METRICS,
    check_output,
    partial_directory,
    run_directory,
    run_loggers,
    write_json,
)
from sqs_pyro.runs.kinds import Document, OpenedFile, TextKind
from sqs_pyro.runs.measured import (
    check_compressible,
    compress_and_measure,
    file_metadata,
    note_kept,
    shared,
    take_leaders_weights,
    trained_or_kept,
)
from sqs_pyro.runs.posterior import write_bounds
from sqs_pyro.runs.recipe import Goal
from sqs_pyro.runs.report.pages import write_run_page
from sqs_pyro.runs.task_recipe import TASK_RECIPES, TaskRecipe
from sqs_pyro.tasks.task import Parts, Task, judge, loss


@dataclass(frozen=True, eq=False)
class TaskText:
    """A task, its tokens, and the checkpoint whose network is to learn them; its weights are not loaded yet.

    Attributes:
        recipe: the run's.
        task: with its examples.
        found: configuration and tokenizer.
        datasets: tokens and targets.
    """

    recipe: TaskRecipe
    task: Task
    found: Pretrained
    datasets: Parts[TokenDataset]

    def network(self) -> nn.Module:
        """Return the fp32 network, with a new head where the recipe trains it."""
        recipe = self.recipe
        options = {**self.task.network_options, "pad_token_id": pad_token(self.found)}
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(recipe.seed)  # of a new head: the same one each time, as `_fine_tune` keeps by it
            transformer = self.found.network(
                AUTO_CLASSES[self.task.name], new_head=recipe.baseline is not None, **options
            )
        return task_network(transformer, self.task.name).to(chosen_device(recipe.device))

    def observed(self, net: nn.Module) -> "TaskText":
        """Return the same, with targets where they are what the fp32 network says."""
        return TaskText(self.recipe, self.task, self.found, self.task.observed(self.datasets, net))

    def loaders(self) -> Parts[TokenLoader]:
        """Make minibatches afresh: the order of the first epoch is always the same."""
        data, recipe = self.recipe.data, self.recipe
        options: dict[str, Any] = {
            "pad_token": pad_token(self.found),
            "vocab_size": vocabulary_size(self.found),
        }
        size = data.evaluation_batch_size  # no gradients, so there is room for more
        return Parts(
            TokenLoader(self.datasets.train, data.batch_size, shuffle=True, seed=recipe.seed, **options),
            TokenLoader(self.datasets.validation, size, **options),
            TokenLoader(self.datasets.test, size, **options),
        )


def task_text(recipe: TaskRecipe) -> TaskText:
    """Return everything that a recipe names but the weights, all of it checked, what is cheap first.

    Raises:
        NetworkError, DataError, RecipeError: one sentence that says what to repair.
    """
    found = find_pretrained(recipe.network)
    pad_token(found)  # fails here, where it is cheap, if there is none
    longest = longest_input(found)
    if longest is not None and recipe.data.max_length > longest:
        raise RecipeError(
            f"Recipe key 'data.max_length' is {recipe.data.max_length}, but the network takes at most {longest} "
            "tokens: give a smaller number."
        )
    task = recipe.build()
    text = TaskText(recipe, task, found, task.datasets(found.tokenizer))
    text.loaders()  # finds tokens that the network does not know, and too large minibatches
    return text


def run(
    recipe: TaskRecipe,
    out_dir: str | Path,
    *,
    overwrite: bool = False,
    baselines_dir: str | Path | None = None,
    progress: Progress = silent,
) -> dict[str, Any]:
    """Load a network, fine-tune it if asked to, compress it by SVI on the task, and judge the file from disk.

    On ranks all of them call this: they share the compression, and the leader does the rest.

    Everything that can be checked is checked before anything is trained. The finished directory holds
    ``packed.safetensors``, ``metrics.json``, ``recipe.yaml`` with all defaults filled in, ``history.csv``,
    ``layers.json``, the pictures and ``report.html``. An interrupted run is taken up where it was by the same
    call.

    Args:
        recipe: what to do.
        out_dir: directory to make.
        overwrite: replace a finished run that is there.
        baselines_dir: where fine-tuned networks are kept; ``baselines`` beside ``out_dir`` by default.
        progress: called often, for a progress bar.

    Returns:
        What ``metrics.json`` holds; nothing on ranks that do not lead. All figures of a task but its NLL
        (nats) are fractions.

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
    check_place(baselines / "kept.pt")
    text = task_text(recipe)
    # Also before the run directory is made: a refusal leaves nothing behind.
    net = text.network()
    compression = _with_parts(recipe, net)
    check_compressible(net, compression, file_metadata(recipe))
    with (
        run_directory(out_dir, recipe.as_yaml(), overwrite=overwrite) as directory,
        logged(loggers, recipe.name or out_dir.name, recipe.model_dump(mode="json")) as log,
    ):
        clock = Clock()
        epochs = _fine_tune(text, net, compression, baselines, progress, log)
        take_leaders_weights(net)
        text = text.observed(net)  # after fine-tuning: targets are of the network that is compressed
        clock.lap("fine_tuning")
        result, metrics = compress_and_measure(
            recipe,
            compression,
            text.task,
            net,
            text.loaders(),
            directory,
            clock,
            progress,
            log,
            search=recipe.search,
        )
        clock.lap("evaluation")
        write_bounds(recipe.bounds, result, text.loaders().train, recipe.seed, directory, progress)
        clock.lap("bounds")
        metrics["task"] = recipe.task
        metrics["stage_seconds"] = {**clock.seconds, "compression": metrics["seconds"]}
        metrics["versions"] = versions("transformers")
        if recipe.baseline is not None:
            note_kept(metrics, "baseline", kept_epoch(epochs, recipe.baseline.as_baseline(recipe.seed)))
        write_json(directory / METRICS, metrics)
        log.finish(metrics)
        write_run_page(directory)
    return metrics


def _follow(recipe: TaskRecipe, out_dir: Path) -> None:
    """Take part in the compression that another rank leads; nothing is written."""
    text = task_text(recipe)
    net = text.network()
    compression = _with_parts(recipe, net)
    take_leaders_weights(net)
    text = text.observed(net)
    place = partial_directory(out_dir)
    shared(recipe, compression, text.task, net, text.loaders(), place, search=recipe.search)


def _with_parts(recipe: TaskRecipe, net: nn.Module) -> CompressionRecipe:
    """Return how to compress, with the weights of the recipe's parts as sites unless it names sites itself."""
    if recipe.compression.include is not None:
        return recipe.compression
    return recipe.compression.model_copy(update={"include": include_parts(net, recipe.parts)})


def _fine_tune(
    text: TaskText, net: nn.Module, compression: CompressionRecipe, baselines: Path, progress: Progress, log: Log
) -> list[EpochRecord]:
    """Train the network in place, if the recipe says so; the same one is trained once and kept."""
    recipe = text.recipe
    if recipe.baseline is None:
        return []
    sections = recipe.model_dump(mode="json", include={"task", "network", "data", "baseline", "seed"})
    # A path says where a checkpoint was, not what is in it: its weights are part of the key.
    made_of = {"network": network_fingerprint(net), **sections}
    key = sha256(json.dumps(made_of, sort_keys=True).encode()).hexdigest()[:16]
    data = text.loaders()
    how = {"loss": loss(text.task), "judge": judge(text.task)}
    section = recipe.baseline.as_baseline(recipe.seed)
    kept = baselines / f"{key}.pt"
    told = file_metadata(recipe)
    return trained_or_kept(
        net, data.train, data.validation, section, kept, compression, told, progress, log, **how
    )


# ---- the kind ----


class Tasks(TextKind[TaskRecipe]):
    """Transformers that learn a task; the key ``task`` names one of :data:`TASK_RECIPES`."""

    recipe = TaskRecipe
    said = "a recipe of a task"
    on_ranks = True
    masked = True

    def parse(self, document: Document, where: str = "") -> TaskRecipe:
        """Validate a recipe of the task that it names."""
        task = document["task"]
        if not isinstance(task, str) or task not in TASK_RECIPES:
            raise RecipeError(
                f"Recipe key 'task' is {shown(task)}, but should be one of {', '.join(TASK_RECIPES)}."
            )
        # Each task has its own data section, so the class follows from the key before anything is validated.
        return parse(TASK_RECIPES[task], document, where)

    def run(
        self,
        recipe: TaskRecipe,
        out_dir: str | Path,
        *,
        overwrite: bool = False,
        baselines_dir: str | Path | None = None,
        progress: Progress = silent,
    ) -> dict[str, Any]:
        """See :func:`run`."""
        return run(recipe, out_dir, overwrite=overwrite, baselines_dir=baselines_dir, progress=progress)

    def evaluate(
        self, file: OpenedFile, *, root: str | Path | None = None, shift: str | None = None
    ) -> dict[str, Any]:
        """Return the task's figures on its test text."""
        recipe = self.parse(file.document)
        self.refuse_images(file, root, shift)
        text = task_text(recipe)
        net = self.network(file)
        if recipe.task == "embedding":  # judged by the fp32 network
            text = text.observed(text.network())
        return {
            "file": str(file.path),
            **text.task.measure(net, text.loaders().test),
            "task": recipe.task,
            "network": recipe.network.model_dump(mode="json"),
            "data": recipe.data.model_dump(mode="json"),
            "size": file.size().to_dict(),
        }

    def network(self, file: OpenedFile) -> nn.Module:
        """Return the packed network; that of a Hugging Face directory, a transformer alone, with its task."""
        net = super().network(file)
        return task_network(net, self.parse(file.document).task) if file.path.is_dir() else net

    def example(self, net: nn.Module, file: OpenedFile) -> tuple[Any, str]:
        """Return the first test texts."""
        return first_rows(task_text(self.parse(file.document)).loaders().test)

    def sized(self, recipe: TaskRecipe, goal: Goal) -> dict[str, Any]:
        """Return the ratio of the file, or the search for it."""
        return goal.keys(lambda: fp32_bytes(task_text(recipe).network()))

    def transformer(self, net: nn.Module) -> nn.Module:
        """Return the network behind which the task's head stands."""
        return transformer_in(net)
