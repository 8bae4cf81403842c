"""What decides at about three bits, without any fine-tuning: which weights are zero, windows, and codebooks.

SmolLM2-135M-Instruct, text and judges of language_model.py. Every cell is a guide's most probable network: K = 16,
each layer the same share of zeros, found so that the file has ``--bits`` a weight (codes, tables and codebooks),
no error compensation. Saliencies are the guide's own after ``--steps`` steps of SVI that move gates alone: λ,
λ |w|, or λ |w| times the root mean square of the weight's inputs.

    python benchmarks/language_model_ablation.py --foreign TEXT [--packages DIRECTORY]

Cells that ``language_model_ablation.json`` beside this file has are not run again.
"""

import argparse
import copy
import json
import time
from itertools import product
from pathlib import Path
from typing import Any

import pyro
import torch
from figures import write_figures
from language_model import LENGTH, calibration, digest, judged, shown, texts
from other_methods import compressed_layers
from packaged_weights import language_model
from torch import Tensor, nn

from sqs_pyro import SQSELBO, BayesianNetwork, PruningSchedule, SpikeGMMGuide, load, save, size_report
from sqs_pyro.compression.finetune.input_scales import InputScales
from sqs_pyro.data.next_token_loader import NextTokenLoader
from sqs_pyro.inference.guides.windows import EqualMass, OutlierAware, PerWeight
from sqs_pyro.kernels import packed_network
from sqs_pyro.packing import CodedTensor
from sqs_pyro.packing.layouts import pack_tensor

SALIENCIES = ("gate", "magnitude", "activation")
WINDOWS = {
    "none": PerWeight(),
    "equal mass, 256": EqualMass(256),
    "outlier-aware, 256 + 2 x 8": OutlierAware(256, 8),
}
GROUPS = ("layer", "channel")
COMPONENTS = 16
Evidence = dict[str, dict[str, Tensor]]  # gate logits and input scales by name of the weight


def model_of(net: nn.Module, names: list[str], num_data: int | None = None) -> BayesianNetwork:
    return BayesianNetwork(net, num_data=num_data, include=[f"^{name.replace('.', '[.]')}$" for name in names])


def evidence(net: nn.Module, names: list[str], sequences: Tensor, steps: int, cache: Path) -> Evidence:
    """Gate logits after SVI on the language model's own loss, and how large the inputs are."""
    if cache.exists():
        return torch.load(cache, weights_only=True)
    loader = NextTokenLoader(sequences, 4, shuffle=True)
    model = model_of(copy.deepcopy(net), names, len(sequences))
    guide = SpikeGMMGuide(model, COMPONENTS, stage="dense", initial_gate=2.0, estimator="straight_through")
    scales = InputScales(model.net.train(), names)  # in training mode, as it watches; the network has no dropout
    for site in guide.site_guides().values():
        site.latent_unconstrained.requires_grad_(False)
    optimizer = pyro.optim.Adam(lambda name: {"lr": 0.1 if "gate_logit" in name else 0.0})
    svi = pyro.infer.SVI(model, guide, optimizer, loss=SQSELBO(kl_weight=1e-4))
    step = 0
    while step < steps:
        for x, y in loader:
            loss = svi.step(x, y) / len(sequences)
            step += 1
            print(f"  gates, step {step}/{steps}: loss {loss:.2f}", flush=True)
            if step == steps:
                break
    logits = {name: site.gate_logit.detach() for name, site in guide.site_guides().items()}
    found = {"gate_logits": logits, "input_scales": scales.scales()}
    pyro.clear_param_store()
    torch.save(found, cache)
    return found


@torch.no_grad()
def coded(
    net: nn.Module, known: Evidence, cell: tuple[str, str, Any], zeros: float, every: int
) -> dict[str, CodedTensor]:
    """The most probable weights of each ``every``-th layer."""
    saliency, windows, groups = cell
    names = list(known["gate_logits"])[::every]
    guide = SpikeGMMGuide(
        model_of(net, names),
        COMPONENTS,
        WINDOWS[windows],
        groups=groups,
        stage="dense",
        estimator="straight_through",
    )
    for name, site in guide.site_guides().items():
        site.gate_logit_unconstrained.copy_(known["gate_logits"][name])
    saliencies = guide.saliencies(saliency, known["input_scales"])
    guide.prune(PruningSchedule(1 - zeros, 1, scope="layer").masks(saliencies, 1))
    guide.hold_gates_open()
    guide.start_coding()
    return guide.harden()


def bits_a_weight(weights: dict[str, CodedTensor]) -> float:
    size = sum(pack_tensor(value, "entropy").num_bytes for value in weights.values())
    return 8 * size / sum(value.mask.numel() for value in weights.values())


def zeros_for(net: nn.Module, known: Evidence, cell: tuple[str, str, Any], bits: float) -> float:
    """The share of zeros at which every tenth layer takes ``bits``, by bisection."""
    low, high = 0.0, 0.9
    for _ in range(6):
        zeros = (low + high) / 2
        above = bits_a_weight(coded(net, known, cell, zeros, 10)) > bits
        low, high = (zeros, high) if above else (low, zeros)
    return (low + high) / 2


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--packages", type=Path)
    parser.add_argument("--foreign", type=Path, required=True)
    parser.add_argument("--bits", type=float, default=3.0)
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--tokens", type=int, default=10240)
    parser.add_argument("--dir", type=Path, default=Path("runs/language_model_ablation"))
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    args.dir.mkdir(parents=True, exist_ok=True)
    net, tokenizer = language_model(args.packages)
    judges = texts(tokenizer, [args.foreign], args.tokens)
    sequences = calibration(net, tokenizer, 72, [], args.dir / "calibration-72.pt").view(-1, LENGTH // 2)
    names = [f"{name}.weight" for name in compressed_layers(net)]
    known = evidence(net, names, sequences, args.steps, args.dir / "evidence.pt")
    base = judged(net, judges)
    target = Path(__file__).with_suffix(".json")
    rows = json.loads(target.read_text())["rows"] if target.exists() else []
    for saliency, windows, groups in product(SALIENCIES, WINDOWS, GROUPS):
        cell = (saliency, windows, groups)
        method = f"{saliency}, windows {windows}, a codebook a {groups}"
        if any(row["method"] == method for row in rows):
            continue
        start = time.perf_counter()
        zeros = zeros_for(net, known, cell, args.bits)
        path = args.dir / "cell.safetensors"
        save(packed_network(net, coded(net, known, cell, zeros, 1), layout="entropy"), path)
        size = size_report(path)
        rows.append(
            {
                "method": method,
                "saliency": saliency,
                "windows": windows,
                "groups": groups,
                "bits": size.bits_per_weight,
                "zero_rate": 1 - size.nonzero_rate,
                **judged(load(path, net), judges),
                "seconds": time.perf_counter() - start,
            }
        )
        print(shown(rows[-1], base), flush=True)
        document = {
            "network": "SmolLM2-135M-Instruct",
            "window": LENGTH,
            "foreign_sha256": digest(args.foreign),
            "fp32": base,
            "rows": rows,
        }
        write_figures(target, document)


if __name__ == "__main__":
    main()
