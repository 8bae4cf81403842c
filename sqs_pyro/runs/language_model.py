"""A language model's whole run: a checkpoint of transformers in, a packed file that runs out, both judged."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from sqs_pyro import load, save, size_report
from sqs_pyro.atomic import resolved
from sqs_pyro.compression.blockwise.blocks import BlockwiseResult
from sqs_pyro.compression.blockwise.call import compress_transformer
from sqs_pyro.compression.blockwise.store import BlockRecord
from sqs_pyro.compression.checkpoint import check_same, read_checkpoint, write_checkpoint
from sqs_pyro.evaluation.classification import largest_difference
from sqs_pyro.fingerprint import Fingerprint, described, fingerprint, network_fingerprint
from sqs_pyro.integrations.pretrained import check_causal, check_lengths, find_pretrained
from sqs_pyro.networks.architectures import blocks
from sqs_pyro.networks.tokens import vocabulary_size
from sqs_pyro.reporting.blocks_plot import write_blocks_picture
from sqs_pyro.runs.bookkeeping import Clock, versions
from sqs_pyro.runs.directory import (
    BLOCKS,
    CHECKPOINT,
    METRICS,
    PACKED,
    check_output,
    kept_checkpoint,
    run_directory,
    write_csv,
    write_json,
)
from sqs_pyro.runs.language_model_recipe import LanguageModelRecipe
from sqs_pyro.runs.language_texts import (
    finite,
    judged,
    judging_streams,
    load_texts,
    read_sequences,
    with_generated,
)
from sqs_pyro.runs.progress import Progress, silent

BLOCKS_TABLE, BLOCKS_PICTURE = "blocks.csv", "blocks.png"


@dataclass(frozen=True, eq=False)
class _Subject:
    """What a run works on, all of it checked.

    Attributes:
        net: the network.
        tokenizer: that belongs to it.
        read: calibration sequences of the text ``[n, length]``.
        streams: texts to judge by, tokens ``[T]`` each.
    """

    net: nn.Module
    tokenizer: Any
    read: Tensor
    streams: dict[str, Tensor]


def run(
    recipe: LanguageModelRecipe, out_dir: str | Path, *, overwrite: bool = False, progress: Progress = silent
) -> dict[str, Any]:
    """Load a language model, compress it block by block, write the packed file, and judge that file from disk.

    Everything that can be checked is checked before anything is compressed. The finished directory holds
    ``packed.safetensors``, ``metrics.json``, ``recipe.yaml`` with all defaults filled in, ``blocks.csv`` and
    ``blocks.png``. An interrupted run is taken up behind its last finished block by the same call, with the same
    calibration sequences, and ends in the same bytes.

    Args:
        recipe: what to do.
        out_dir: directory to make.
        overwrite: replace a finished run that is there.
        progress: called after each block.

    Returns:
        What ``metrics.json`` holds. NLL is in nats a token, sizes are in bytes.

    Raises:
        SQSError: one sentence that says what is wrong with recipe, network, text or output directory.
    """
    out_dir = resolved(out_dir)
    check_output(out_dir, recipe.as_yaml(), overwrite=overwrite)
    subject = _subject(recipe)
    made_of = _fingerprint(recipe, subject)
    kept = kept_checkpoint(out_dir, recipe.as_yaml())
    if kept is not None:  # checked here, where a refusal costs no finished block
        check_same(read_checkpoint(kept, _KEPT)["fingerprint"], made_of, kept)
    with run_directory(out_dir, recipe.as_yaml(), overwrite=overwrite) as directory:
        metrics = _compress_and_measure(recipe, subject, made_of, directory, progress)
        write_json(directory / METRICS, metrics)
    return metrics


def _subject(recipe: LanguageModelRecipe) -> _Subject:
    """Everything that the recipe names, what is cheap first."""
    found = find_pretrained(recipe.network)
    text, foreign = load_texts(recipe)
    net = found.network()
    check_lengths(net, recipe)
    vocab_size = vocabulary_size(net)
    streams = judging_streams(recipe, text, foreign, found.tokenizer, vocab_size)
    read = read_sequences(recipe, text, found.tokenizer, vocab_size)
    check_causal(net, read[0, :8])
    return _Subject(net, found.tokenizer, read, streams)


def _fingerprint(recipe: LanguageModelRecipe, subject: _Subject) -> Fingerprint:
    """What a run is made of: the recipe names files, whose content may change."""
    data = {"text": described(subject.read)}
    data |= {f"stream {name}": described(tokens) for name, tokens in subject.streams.items()}
    return fingerprint(recipe.model_dump(mode="json"), network_fingerprint(subject.net), data)


_KEPT = frozenset({"fingerprint", "sequences", "baseline", "seconds"})


def _prepared(
    recipe: LanguageModelRecipe, subject: _Subject, made_of: Fingerprint, directory: Path, progress: Progress
) -> dict[str, Any]:
    """Calibration sequences and the fp32 network's figures, of an earlier, interrupted call or made now."""
    path = directory / CHECKPOINT
    if path.exists():
        state = read_checkpoint(path, _KEPT)
        check_same(state["fingerprint"], made_of, path)
        return state
    clock = Clock()
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
    recipe: LanguageModelRecipe, subject: _Subject, made_of: Fingerprint, directory: Path, progress: Progress
) -> dict[str, Any]:
    prepared = _prepared(recipe, subject, made_of, directory, progress)
    sequences, baseline = prepared["sequences"], prepared["baseline"]
    clock = Clock()
    result, seconds = _compress(recipe, subject, sequences, directory, progress)
    clock.lap("compression")
    packed = directory / PACKED
    save(result.network, packed)
    records = [asdict(record) for record in result.records]
    write_csv(directory / BLOCKS_TABLE, [_row(record) for record in result.records])
    write_blocks_picture(directory / BLOCKS_PICTURE, records)
    report = size_report(packed)
    clock.lap("writing")
    loaded = load(packed, subject.net)
    compressed = judged(loaded, subject.streams, recipe.evaluation, progress)
    clock.lap("evaluation")
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
        "blocks": records,
        "findings": [asdict(finding) for finding in result.findings],
        "seconds": seconds,
        "stage_seconds": {**prepared["seconds"], **clock.seconds, "compression": seconds},
        "versions": versions("transformers"),
    }


def _compress(
    recipe: LanguageModelRecipe, subject: _Subject, sequences: Tensor, directory: Path, progress: Progress
) -> tuple[BlockwiseResult, float]:
    """The packed network, and seconds of all calls together up to their last finished blocks."""
    total, kept = len(blocks(subject.net)), directory / BLOCKS
    before = len(list(kept.glob("block-*.pt")))

    def tell(record: BlockRecord) -> None:
        text = f"{record.bits:.2f} bits a weight, error {record.error:.4f}"
        progress("compression", record.block + 1, total, text)

    result = compress_transformer(
        subject.net,
        sequences,
        recipe.blockwise,
        directory=kept,
        progress=tell,
        metadata={"recipe": recipe.model_dump(mode="json")},
    )
    return result, result.seconds + sum(record.seconds for record in result.records[:before])


def _row(record: BlockRecord) -> dict[str, Any]:
    """A block as one flat row; columns of a layer begin with its path in the block."""
    layers = {f"{name}.{key}": value for name, layer in record.layers.items() for key, value in layer.items()}
    whole = {"block": record.block, "bits": record.bits, "error": record.error, "seconds": record.seconds}
    return {**whole, **layers}


def _ratios(baseline: Mapping[str, Any], compressed: Mapping[str, Any]) -> dict[str, float | None]:
    """Perplexity of the file over that of the network it came from, by text; None where either is infinite."""
    found: dict[str, float | None] = {}
    for name in compressed:
        after, before = compressed[name]["perplexity"], baseline[name]["perplexity"]
        found[name] = None if None in (after, before) else finite(after / before)
    return found
