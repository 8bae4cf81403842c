"""A language model's whole run: a checkpoint of transformers in, a packed file that runs out, both judged."""

import math
from collections.abc import Mapping
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from sqs_pyro import load, save, size_report
from sqs_pyro.atomic import resolved
from sqs_pyro.compression.blockwise.blocks import BlockwiseResult
from sqs_pyro.compression.blockwise.call import compress_transformer
from sqs_pyro.compression.blockwise.machines import MACHINES
from sqs_pyro.compression.blockwise.recipe import WITHOUT_EFFECT, BlockwiseRecipe
from sqs_pyro.compression.blockwise.search import BitsSearchRecipe, next_bits
from sqs_pyro.compression.blockwise.store import BlockRecord
from sqs_pyro.compression.blockwise.vocabulary import candidates
from sqs_pyro.compression.checkpoint import check_same, read_checkpoint, write_checkpoint
from sqs_pyro.compression.layers import check_layers
from sqs_pyro.compression.searching import Attempt, Found, smallest
from sqs_pyro.errors import DataError, RecipeError
from sqs_pyro.evaluation.classification import largest_difference
from sqs_pyro.exporting.examples import random_text
from sqs_pyro.fingerprint import Fingerprint, described, fingerprint
from sqs_pyro.integrations import save_pretrained
from sqs_pyro.integrations.checkpoint import plan_checkpoint, streamed_network
from sqs_pyro.integrations.pretrained import check_causal, find_pretrained
from sqs_pyro.loggers.logger import Log, logged
from sqs_pyro.networks.architectures import blocks
from sqs_pyro.networks.linear_form import in_linear_form
from sqs_pyro.networks.residency import InMemory, Residency, called_whole, resident_fingerprint
from sqs_pyro.networks.structure import known_or_found
from sqs_pyro.networks.tokens import vocabulary_size
from sqs_pyro.ranks import ranks
from sqs_pyro.recipes import parse
from sqs_pyro.reporting.blocks_plot import write_blocks_picture
from sqs_pyro.runs.bookkeeping import Clock, Progress, chosen_device, machine, silent, versions
from sqs_pyro.runs.directory import (
    BLOCKS,
    CHECKPOINT,
    HUGGING_FACE,
    METRICS,
    PACKED,
    check_output,
    kept_checkpoint,
    run_directory,
    run_loggers,
    write_csv,
    write_json,
)
from sqs_pyro.runs.kinds import Document, OpenedFile, TextKind
from sqs_pyro.runs.language_model_recipe import (
    VALIDATION,
    LanguageModelRecipe,
    check_lengths,
    finite,
    judged,
    judging_streams,
    load_texts,
    read_sequences,
    with_generated,
)
from sqs_pyro.runs.recipe import Goal
from sqs_pyro.runs.report.pages import write_run_page

BLOCKS_TABLE, BLOCKS_PICTURE = "blocks.csv", "blocks.png"
_FARTHEST = 7.0  # nats a token: a network that has lost more has lost everything


@dataclass(frozen=True, eq=False)
class _Subject:
    """What a run works on, all of it checked.

    Attributes:
        net: the network.
        blocks: its blocks.
        residency: which of its weights are in memory.
        tokenizer: that belongs to it.
        read: calibration sequences of the text ``[n, length]``.
        streams: texts to judge by, tokens ``[T]`` each.
    """

    net: nn.Module
    blocks: list[nn.Module]
    residency: Residency
    tokenizer: Any
    read: Tensor
    streams: dict[str, Tensor]

    def called(self) -> AbstractContextManager[None]:
        """Let the network be called as a whole inside, streamed or not."""
        return called_whole(self.net, self.blocks, self.residency)


def run(
    recipe: LanguageModelRecipe, out_dir: str | Path, *, overwrite: bool = False, progress: Progress = silent
) -> dict[str, Any]:
    """Load a language model, compress it block by block, write the packed file, and judge that file from disk.

    Everything that can be checked is checked before anything is compressed. The finished directory holds
    ``packed.safetensors``, ``metrics.json``, ``recipe.yaml`` with all defaults filled in, ``blocks.csv``,
    ``blocks.png`` and ``report.html``. An interrupted run is taken up behind its last finished
    block by the same call, with the same calibration sequences, and ends in the same bytes.

    On ranks all of them call this: they share the compression, and the leader does the rest.

    Args:
        recipe: what to do.
        out_dir: directory to make.
        overwrite: replace a finished run that is there.
        progress: called after each block.

    Returns:
        What ``metrics.json`` holds; nothing on ranks that do not lead. NLL is in nats a token, sizes are in bytes.

    Raises:
        SQSError: one sentence that says what is wrong with recipe, network, text or output directory.
    """
    among = ranks()
    among.check(recipe.blockwise.units, "blockwise.units")
    if not among.leads:
        _follow(recipe)
        return {}
    out_dir = resolved(out_dir)
    check_output(out_dir, recipe.as_yaml(), overwrite=overwrite)
    loggers = run_loggers(recipe, out_dir)
    subject = _subject(recipe)
    made_of = _fingerprint(recipe, subject)
    kept = kept_checkpoint(out_dir, recipe.as_yaml())
    if kept is not None:  # checked here, where a refusal costs no finished block
        check_same(read_checkpoint(kept, _KEPT)["fingerprint"], made_of, kept)
    with (
        run_directory(out_dir, recipe.as_yaml(), overwrite=overwrite) as directory,
        logged(loggers, recipe.name or out_dir.name, recipe.model_dump(mode="json")) as log,
    ):
        metrics = _compress_and_measure(recipe, subject, made_of, directory, progress, log)
        write_json(directory / METRICS, metrics)
        log.finish(metrics)
        write_run_page(directory)
    return metrics


#: What the leader is about to compress: calibration sequences, and bits a weight.
_Task = tuple[Tensor, float | None]


def _follow(recipe: LanguageModelRecipe) -> None:
    """Take part in compressions, as long as the leader begins one; nothing is written."""
    subject, nothing = _subject(recipe), None
    while (task := ranks().from_rank(cast("_Task | None", nothing))) is not None:
        sequences, bits = task
        _compressed(_sized(recipe, bits), subject, sequences)


def _sized(recipe: LanguageModelRecipe, bits: float | None) -> LanguageModelRecipe:
    return recipe.model_copy(update={"blockwise": recipe.blockwise.model_copy(update={"bits": bits})})


def _subject(recipe: LanguageModelRecipe) -> _Subject:
    """Return everything that the recipe names, what is cheap first."""
    device = _device(recipe)
    # Configuration and tokenizer: weights are read last, without which nothing is found by structure.
    found = find_pretrained(recipe.network, known=recipe.blockwise.streamed)
    text, foreign = load_texts(recipe)
    residency: Residency = InMemory()
    if recipe.blockwise.streamed:
        net, residency = streamed_network(recipe.network.path, getattr(torch, recipe.network.dtype))
    else:
        net = found.network()
    check_lengths(net, recipe)
    vocab_size = vocabulary_size(net)
    streams = judging_streams(recipe, text, foreign, found.tokenizer, vocab_size)
    read = read_sequences(recipe, text, found.tokenizer, vocab_size)
    with in_linear_form(net):
        architecture = known_or_found(net, {"input_ids": read[:1, :8]})
        named = candidates(net, recipe.blockwise, architecture)
        check_layers(recipe.blockwise.layers, named, "blockwise.layers")
    subject = _Subject(net, blocks(net, architecture), residency, found.tokenizer, read, streams)
    with subject.called():
        check_causal(net, read[0, :8])  # eight tokens show whether a later one changes what was said before
    if residency.whole:
        net.to(device)
    return subject


def _device(recipe: LanguageModelRecipe) -> torch.device:
    if not recipe.blockwise.streamed:
        return chosen_device(recipe.device)
    if recipe.device not in ("auto", "cpu"):
        raise RecipeError(
            f"Recipe key 'device' is {recipe.device!r}, but a streamed checkpoint is compressed on the CPU: leave "
            "out one of device and blockwise.streamed."
        )
    return torch.device("cpu")


def _fingerprint(recipe: LanguageModelRecipe, subject: _Subject) -> Fingerprint:
    """Return what a run is made of: the recipe names files, whose content may change."""
    data = {"text": described(subject.read)}
    data |= {f"stream {name}": described(tokens) for name, tokens in subject.streams.items()}
    network = resident_fingerprint(subject.net, subject.blocks, subject.residency)
    return fingerprint(recipe.model_dump(mode="json"), network, data)


# Of a checkpoint: what is drawn or measured once before the blocks, which are kept each by itself.
_KEPT = frozenset({"fingerprint", "sequences", "baseline", "seconds"})


def _prepared(
    recipe: LanguageModelRecipe, subject: _Subject, made_of: Fingerprint, directory: Path, progress: Progress
) -> dict[str, Any]:
    """Return calibration sequences and the fp32 network's figures, of an earlier, interrupted call or made now."""
    path = directory / CHECKPOINT
    if path.exists():
        state = read_checkpoint(path, _KEPT)
        check_same(state["fingerprint"], made_of, path)
        return state
    clock = Clock()
    with subject.called():
        sequences = with_generated(recipe, subject.net, subject.tokenizer, subject.read, progress)
        clock.lap("calibration")
        baseline = judged(subject.net, subject.streams, recipe.evaluation, progress)
        clock.lap("baseline")
    state = {
        "fingerprint": made_of,
        "sequences": sequences,
        "baseline": baseline,
        "seconds": clock.seconds,
    }
    write_checkpoint(path, state)
    return state


def _compress_and_measure(
    recipe: LanguageModelRecipe,
    subject: _Subject,
    made_of: Fingerprint,
    directory: Path,
    progress: Progress,
    log: Log,
) -> dict[str, Any]:
    prepared = _prepared(recipe, subject, made_of, directory, progress)
    sequences, baseline = prepared["sequences"], prepared["baseline"]
    clock = Clock()  # anew: laps of an interrupted call are in ``prepared``
    kept = directory / BLOCKS
    searched: dict[str, Any] = {}
    if recipe.search is None:
        result, seconds = _compress(recipe, subject, sequences, kept, progress, log)
    else:
        found = _fewest_bits(recipe, recipe.search, subject, prepared, kept, progress, log)
        result, seconds = found.result, found.seconds
        searched = {"search": found.document(recipe.search.points)}
    ranks().from_rank(None)  # the last one
    clock.lap("compression")
    packed = directory / PACKED
    save(result.network, packed)
    records = [asdict(record) for record in result.records]
    write_csv(directory / BLOCKS_TABLE, [_row(record) for record in result.records])
    write_blocks_picture(directory / BLOCKS_PICTURE, records)
    report = size_report(packed)
    clock.lap("writing")
    loaded = load(packed, subject.net)  # which may be on the meta device: only its form matters
    if recipe.network.gguf_file is not None:
        # Configuration and tokenizer are nowhere else in a form that is read without the file and its package.
        save_pretrained(loaded, directory / HUGGING_FACE, subject.tokenizer)
    compressed = judged(loaded, subject.streams, recipe.evaluation, progress)
    clock.lap("evaluation")
    # One sequence is enough to tell a file that was written wrongly; agreement was checked before.
    difference = largest_difference(result.network, loaded, [({"input_ids": sequences[:1]}, sequences[:1])])
    return {
        "name": recipe.name,
        "seed": recipe.seed,
        "baseline": baseline,
        "compressed": compressed,
        "perplexity_ratio": _ratios(baseline, compressed),
        "max_logit_difference": difference,
        "size": report.to_dict(),
        "nonzero_rate": report.nonzero_rate,
        "calibration": {
            "read": len(subject.read),
            "generated": recipe.generated,
            "tokens": sequences.numel(),
        },
        "vocabulary": [asdict(record) for record in result.vocabulary],
        "blocks": records,
        "finish": None if result.finish is None else asdict(result.finish),
        "findings": [asdict(finding) for finding in result.findings],
        **searched,
        "seconds": seconds,
        "stage_seconds": {**prepared["seconds"], **clock.seconds, "compression": seconds},
        "versions": versions("transformers"),
        "machine": machine(),
    }


def _fewest_bits(
    recipe: LanguageModelRecipe,
    search: BitsSearchRecipe,
    subject: _Subject,
    prepared: Mapping[str, Any],
    directory: Path,
    progress: Progress,
    log: Log,
) -> Found[BlockwiseResult]:
    """Compress to several sizes, one after the other, each kept in a directory of its own, and return the best."""
    before = prepared["baseline"][VALIDATION]["nll"]
    if before is None:
        raise DataError(
            "The network's own perplexity on the validation text is infinite: give text that it foretells."
        )
    stream = {VALIDATION: subject.streams[VALIDATION]}

    def attempt(number: int, bits: float) -> tuple[BlockwiseResult, Attempt, float]:
        sized = _sized(recipe, bits)
        own, stage = directory / f"attempt-{number}", f"try {number}"
        progress(stage, 0, len(subject.blocks), f"{bits:.2f} bits a weight")
        result, seconds = _compress(
            sized, subject, prepared["sequences"], own, progress, log, stage=stage, plan_directory=directory
        )
        packed = own / PACKED  # judged as it would ship
        save(result.network, packed)
        report = size_report(packed)
        after = judged(load(packed, subject.net), stream, recipe.evaluation, progress)[VALIDATION]["nll"]
        points = 100 * math.expm1(_FARTHEST if after is None else min(after - before, _FARTHEST))
        return result, Attempt(bits, report.ratio, report.total, points), seconds

    first = recipe.blockwise.bits
    assert first is not None
    repair = "allow more points or values (blockwise.num_components), or give more text.count or search.attempts"
    return smallest(attempt, first, lambda done: next_bits(done, search, recipe.blockwise), search.points, repair)


def _compress(
    recipe: LanguageModelRecipe,
    subject: _Subject,
    sequences: Tensor,
    kept: Path,
    progress: Progress,
    log: Log,
    *,
    stage: str = "compression",
    plan_directory: Path | None = None,
) -> tuple[BlockwiseResult, float]:
    """Return the packed network, and seconds of all calls together up to their last finished blocks."""
    total = len(subject.blocks)
    log_step = log.steps(stage)
    before = len(list(kept.glob("block-*.pt")))  # of interrupted calls: their seconds are in the blocks' records

    def tell(record: BlockRecord) -> None:
        log_step(record)
        bits = "left uncompressed" if record.bits is None else f"{record.bits:.2f} bits a weight"
        text = f"{bits}, error {record.error:.4f}"
        progress(stage, record.block + 1, total, text)

    ranks().from_rank((sequences, recipe.blockwise.bits))
    result = _compressed(
        recipe,
        subject,
        sequences,
        directory=kept,
        plan_directory=plan_directory,
        progress=tell,
        finishing=lambda done, steps, nats: progress(f"{stage}, last steps", done, steps, f"{nats:.3f} nats"),
    )
    # A block's own seconds; a plan or a half block that was lost with an interruption is nowhere noted.
    return result, result.seconds + sum(record.seconds for record in result.records[:before])


def _compressed(
    recipe: LanguageModelRecipe, subject: _Subject, sequences: Tensor, **options: Any
) -> BlockwiseResult:
    """Compress a recipe's network, which ranks do together; options as of :func:`compress_transformer`."""
    unsaid: Any = {"blockwise": WITHOUT_EFFECT, "loggers": True}
    return compress_transformer(
        subject.net,
        sequences,
        recipe.blockwise,
        residency=None if subject.residency.whole else subject.residency,
        # Streamed or not, and whoever is told of it, the file is the same to the byte.
        metadata={"recipe": recipe.model_dump(mode="json", exclude=unsaid)},
        **options,
    )


def _row(record: BlockRecord) -> dict[str, Any]:
    """Return a block as one flat row; columns of a layer begin with its path in the block."""
    layers = {f"{name}.{key}": value for name, layer in record.layers.items() for key, value in layer.items()}
    whole = {"block": record.block, "bits": record.bits, "error": record.error, "seconds": record.seconds}
    return {**whole, **layers}


def _ratios(baseline: Mapping[str, Any], compressed: Mapping[str, Any]) -> dict[str, float | None]:
    """Divide the file's perplexity by the network's it came from, by text; None where either is infinite."""
    found: dict[str, float | None] = {}
    for name in compressed:
        after, before = compressed[name]["perplexity"], baseline[name]["perplexity"]
        # Infinite ones have become None on their way to JSON.
        found[name] = None if None in (after, before) else finite(after / before)
    return found


# ---- the kind ----


class LanguageModels(TextKind[LanguageModelRecipe]):
    """Checkpoints of transformers, block by block; their files are filled into the recipe's network."""

    recipe = LanguageModelRecipe
    said = "a recipe of a language model"
    on_ranks = True
    masked = False

    def run(
        self,
        recipe: LanguageModelRecipe,
        out_dir: str | Path,
        *,
        overwrite: bool = False,
        baselines_dir: str | Path | None = None,
        progress: Progress = silent,
    ) -> dict[str, Any]:
        """See :func:`run`; nothing is trained that could be kept in ``baselines_dir``."""
        if baselines_dir is not None:
            raise RecipeError("--baselines is for networks that are trained here: leave it out.")
        return run(recipe, out_dir, overwrite=overwrite, progress=progress)

    def evaluate(
        self, file: OpenedFile, *, root: str | Path | None = None, shift: str | None = None
    ) -> dict[str, Any]:
        """Return the perplexity on the recipe's texts."""
        recipe = self.parse(file.document)
        self.refuse_images(file, root, shift)
        found = find_pretrained(recipe.network)
        text, foreign = load_texts(recipe)
        net = self.network(file)
        check_lengths(net, recipe)
        streams = judging_streams(recipe, text, foreign, found.tokenizer, vocabulary_size(net))
        return {
            "file": str(file.path),
            "perplexity": judged(net, streams, recipe.evaluation),
            "network": recipe.network.model_dump(mode="json"),
            "size": file.size().to_dict(),
        }

    def plain_network(self, document: Document) -> nn.Module:
        """Return the network of the recipe's checkpoint, without its weights: the file has every one of them."""
        return find_pretrained(self.parse(document).network).unloaded_network()

    def tokenizer(self, file: OpenedFile) -> Any:
        """Return the tokenizer of the recipe's checkpoint."""
        return find_pretrained(self.parse(file.document).network).tokenizer

    def sized(self, recipe: LanguageModelRecipe, goal: Goal) -> dict[str, Any]:
        """Return the bits of a compressed weight, the file's megabytes, or the search for them."""
        if goal.ratio is not None:
            raise RecipeError(
                "--ratio is for networks that are fine-tuned, but this is a language model, of whose file "
                "--bits, --megabytes or --points say how small it shall be: give one of them instead."
            )
        if goal.points is not None:
            few = {"num_components": recipe.blockwise.num_components}
            first = recipe.blockwise.bits or parse(BlockwiseRecipe, few, "blockwise").bits
            return {"blockwise.bits": first, "blockwise.megabytes": None, "search.points": goal.points}
        # The other ones are taken back, whatever the recipe has said.
        return {"blockwise.bits": goal.bits, "blockwise.megabytes": goal.megabytes, "search": None}

    def example(self, net: nn.Module, file: OpenedFile) -> tuple[Any, str]:
        """Return random tokens: any are a text."""
        return random_text(net, file.path)

    def plan(
        self,
        recipe: LanguageModelRecipe,
        *,
        ranks: int = 1,
        device_memory: float | None = None,
        machine: str = "cpu",
    ) -> dict[str, Any]:
        """Return bytes by moment and part, and seconds by part, from the checkpoint's ``config.json`` alone.

        Returns:
            ``checkpoint``, ``parameters``, ``tokens``, ``streamed``, ``ranks``; ``peak`` and ``moments`` of one
            rank, and ``device_memory`` with ``unfit``, None where it is enough; ``time`` with its ``machine``,
            ``seconds``, ``parts``, and the ``efficiency`` of the ranks.

        Raises:
            NetworkError, RecipeError: one sentence.
        """
        if recipe.network.gguf_file is not None:
            raise RecipeError(
                "A plan is told from a checkpoint's config.json, but the network is in the GGUF file "
                f"'{recipe.network.gguf_file}': give a directory of the same network."
            )
        if recipe.text.count is None:
            raise RecipeError("Recipe key 'text.count' is null, but a plan needs a number: give one with --set.")
        sequences = recipe.text.count + recipe.generated
        if machine not in MACHINES:
            raise RecipeError(f"Machine {machine!r} is unknown: give one of {', '.join(MACHINES)}.")
        found = plan_checkpoint(
            recipe.network.path,
            sequences,
            recipe.text.length,
            recipe.blockwise,
            ranks=ranks,
            device_memory=device_memory,
            machine=MACHINES[machine],
        )
        plan, seconds = found.memory, found.time.seconds
        return {
            "checkpoint": recipe.network.path,
            "parameters": plan.parameters,
            "tokens": plan.tokens,
            "streamed": recipe.blockwise.streamed,
            "ranks": ranks,
            "peak": plan.peak,
            "moments": plan.moments,
            "device_memory": device_memory,
            "unfit": found.unfit,
            "time": {
                "machine": MACHINES[machine].about,
                "seconds": seconds,
                "efficiency": found.alone.seconds / (ranks * seconds),
                "parts": found.time.parts,
            },
        }
