"""A language model fine-tuned by SVI at half of its weights zero, beside the blockwise path at equal bits.

SmolLM2-135M-Instruct as in language_model.py: same text, same judges, same windows. Three ways to a file of as
many bits a weight:

* ``blockwise``: no fine-tuning, a file that language_model.py has left (``--blockwise FILE``).
* ``SVI``: :func:`sqs_pyro.compress` of the pretrained network, magnitudes times inputs say which weights are zero.
* ``blockwise, then SVI``: codes and zeros of the blockwise file stay, codebooks and norms of all blocks learn.

The likelihood observes the fp32 network's opinion alone (``distillation.weight`` 1), so that the text's own
kind, which the fp32 network never saw in training, earns nothing. Every figure is that of the file, from disk.

    python benchmarks/language_model_finetuned.py --foreign TEXT --blockwise FILE [--packages DIRECTORY]

Writes ``language_model_finetuned.json`` beside this file; rows of ways that were not asked for stay in it.
"""

import argparse
import json
import time
from pathlib import Path
from typing import Any

import pyro
import torch
from figures import write_figures
from language_model import LENGTH, calibration, digest, judged, shown, texts
from other_methods import compressed_layers
from packaged_weights import language_model
from torch import Tensor, nn

from sqs_pyro import SQSELBO, BayesianNetwork, SpikeGMMGuide, compress, load, save, size_report
from sqs_pyro.compression.blockwise.training import in_units_of_scales, with_scales
from sqs_pyro.compression.finetune.call import StepRecord
from sqs_pyro.data.next_token_loader import NextTokenLoader
from sqs_pyro.kernels import packed_network
from sqs_pyro.kernels.placing import unpack_weights
from sqs_pyro.models.distillation import DistillationLikelihood, DistilledLoader
from sqs_pyro.packing.stored import stored_weights


def measured(packed: nn.Module, net: nn.Module, path: Path, judges: dict[str, Tensor]) -> dict[str, Any]:
    save(packed, path)
    size = size_report(path)
    figures = {"bits": size.bits_per_weight, "zero_rate": 1 - size.nonzero_rate, "file_bytes": size.total}
    return figures | judged(load(path, net), judges)


def tuned(net: nn.Module, loader: NextTokenLoader, args: argparse.Namespace) -> nn.Module:
    """SVI from the pretrained weights."""

    def tell(record: StepRecord) -> None:
        print(
            f"  step {record.step}/{record.total_steps} {record.stage}: loss {record.loss:.3f}, "
            f"non-zero {record.nonzero_rate:.1%}",
            flush=True,
        )

    recipe = {
        "epochs": -(-args.steps // len(loader)),
        "nonzero_rate": 0.5,
        "num_components": args.components,
        "include": [f"^{name.replace('.', '[.]')}[.]weight$" for name in compressed_layers(net)],
        "pruning": {"saliency": "activation", "scope": "layer", "start": 0.0, "end": 0.4, "every": 10},
        "distillation": {"weight": 1.0, "temperature": 1.0},
        "precision": "bfloat16",
        "optimizer": "adamw",
        "learning_rate": args.rate,
        "weight_decay": 0.0,
        "codebook_learning_rate": 2e-3,
        "kl_weight": 0.0,
        "batch_norm_batches": 0,
        "layout": "entropy",
        "coding_start": 0.5,
        "freeze_start": 0.75,
    }
    return compress(net, loader, recipe, checkpoint=args.dir / "tuned.checkpoint", progress=tell).network


def settled(net: nn.Module, loader: NextTokenLoader, args: argparse.Namespace) -> nn.Module:
    """SVI of codebooks and norms alone, from codes and zeros that are there, written against Pyro itself."""
    blockwise = load(args.blockwise, net)
    coded = {name: weight.coded() for name, weight in stored_weights(blockwise).items()}
    plain = unpack_weights(blockwise, torch.float32)
    with in_units_of_scales(plain, coded) as (codewords, scaled):
        for name, parameter in plain.named_parameters():
            parameter.requires_grad_(parameter.dim() == 1 and not name.endswith(".log_scales"))
        names = [f"^{name.replace('.', '[.]')}$" for name in coded]
        likelihood = DistillationLikelihood(1.0, 1.0)
        model = BayesianNetwork(plain, likelihood=likelihood, num_data=len(loader.dataset), include=names)
        guide = SpikeGMMGuide(model, coded=codewords, stage="frozen", estimator="straight_through")
        observed = DistilledLoader(loader, net, 1.0)
        optimizer = pyro.optim.PyroLRScheduler(
            torch.optim.lr_scheduler.LambdaLR,
            {
                "optimizer": torch.optim.Adam,
                "optim_args": lambda name: {"lr": 2e-4 if "loc" in name else 1e-3},
                "lr_lambda": lambda step: max(1 - step / args.steps, 0.0),
            },
        )
        svi = pyro.infer.SVI(model, guide, optimizer, loss=SQSELBO(kl_weight=0.0))
        step = 0
        while step < args.steps:
            for x, y in observed:
                loss = svi.step(x, y) / model.num_data
                optimizer.step()
                step += 1
                if step % 10 == 0:
                    print(f"  step {step}/{args.steps}: loss {loss:.3f}", flush=True)
                if step == args.steps:
                    break
        found = guide.harden()
    back = {name: with_scales(found[name], scaled.get(name)) for name in coded}
    return packed_network(plain, back, layout="entropy")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--packages", type=Path)
    parser.add_argument("--foreign", type=Path, required=True)
    parser.add_argument("--blockwise", type=Path, metavar="FILE")
    parser.add_argument("--ways", nargs="*", choices=WAYS, default=list(WAYS))
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--components", type=int, default=12)
    parser.add_argument("--rate", type=float, default=2e-4, help="of latents, AdamW")
    parser.add_argument("--sequences", type=int, default=400, help="of 128 tokens, half of them the network's own")
    parser.add_argument("--tokens", type=int, default=20480)
    parser.add_argument("--dir", type=Path, default=Path("runs/language_model_finetuned"))
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    args.dir.mkdir(parents=True, exist_ok=True)
    net, tokenizer = language_model(args.packages)
    judges = texts(tokenizer, [args.foreign], args.tokens)
    sequences = calibration(net, tokenizer, args.sequences // 2, [], args.dir / f"text-{args.sequences}.pt")
    loader = NextTokenLoader(sequences.view(-1, LENGTH // 2), 4, shuffle=True)
    base = judged(net, judges)
    target = Path(__file__).with_suffix(".json")
    rows = {row["method"]: row for row in json.loads(target.read_text())["rows"]} if target.exists() else {}

    def add(row: dict[str, Any]) -> None:
        print(shown(row, base), flush=True)
        rows[row["method"]] = row
        document = {
            "network": "SmolLM2-135M-Instruct",
            "window": LENGTH,
            "foreign_sha256": digest(args.foreign),
            "rows": list(rows.values()),
        }
        write_figures(target, document)

    add({"method": "fp32", "bits": 32.0, **base})
    for way in args.ways:
        start, cpu = time.perf_counter(), time.process_time()
        packed = WAYS[way](net, loader, args)
        cost = {
            "steps": args.steps,
            "seconds": time.perf_counter() - start,
            "processor_seconds": time.process_time() - cpu,
        }
        add({"method": way, **measured(packed, net, args.dir / f"{way}.safetensors", judges), **cost})


WAYS = {
    "blockwise": lambda net, loader, args: load(args.blockwise, net),
    "SVI": tuned,
    "blockwise, then SVI": settled,
}

if __name__ == "__main__":
    main()
