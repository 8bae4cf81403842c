"""Do gates say what a weight is worth? Inclusion probabilities beside the loss when single weights are removed.

*Inferred*: a convolutional network of 6,152 weights on scikit-learn's digits, trained, then inferred with the
default guide (spike-and-slab prior, natural gradients, β = 1, no schedule). Weights are drawn at random from every
layer and set to zero one at a time; what the NLL gains, in nats over all training or all validation images, is
measured

* in the network of posterior means, from E θ = λ w to zero;
* in draws of q, from w to zero, averaged: what evidence is about, as λ is not in it.

*Compressed*: `compress` of the same network, with gates that learn beside a schedule (`gate_learning_rate`).
Weights are drawn from those that the hard network has kept and go from their codewords to zero.

Figures are Spearman's correlations over all drawn weights, the mean of those within layers, and the AUROC by which
a score finds weights that gain more than a nat, with 95 % intervals of t over seeds. Under one λ₀ evidence has the
ranks of λ.

    python benchmarks/gates.py [--seeds 0 1 2 3 4] [--epochs 160] [--weights 40] [--draws 8]
"""

import argparse
import statistics
from collections.abc import Iterator, Mapping, Sequence
from copy import deepcopy
from functools import partial
from pathlib import Path
from typing import Any

import pyro
import torch
from figures import write_figures
from scipy.stats import mannwhitneyu, spearmanr
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F

from sqs_pyro import SQSELBO, BayesianNetwork, SpikeGMMGuide, compress
from sqs_pyro.compression.baseline import BaselineRecipe, train_baseline
from sqs_pyro.data import Data, DataRecipe, load_data
from sqs_pyro.inference import NaturalGradient
from sqs_pyro.models import scale_matched_prior
from sqs_pyro.networks.digits import DigitsNet
from sqs_pyro.reporting.paired import paired_difference

DATA = DataRecipe(name="digits", batch_size=128, validation=273, augment=False)  # 1,024 to train on
PARTS = ("train", "validation")
INCLUSION = 0.1
COMPRESSION = {
    "epochs": 12,
    "nonzero_rate": 0.25,
    "num_components": 4,
    "kl_weight": 0.03,
    "kl_every": 1,
    "gate_learning_rate": 0.05,
    "initial_gate": 2.0,
}

Sites = Mapping[str, Tensor]
Place = tuple[str, int]  # name of a site, and index of a weight in it


def trained(seed: int, data: Data) -> nn.Module:
    torch.manual_seed(seed)
    net = DigitsNet(width=8)
    train_baseline(net, data.train, None, BaselineRecipe(epochs=20, seed=seed))
    return net.eval()  # batch norms keep their statistics: inference and removal see one function of the weights


def inferred(net: nn.Module, data: Data, epochs: int) -> SpikeGMMGuide:
    """Return the posterior; norms and biases of the network are learned with it."""
    pyro.clear_param_store()
    steps = epochs * len(data.train)
    model = BayesianNetwork(net, scale_matched_prior(INCLUSION), num_data=len(data.train) * DATA.batch_size)
    guide = SpikeGMMGuide(model)
    optimizer = NaturalGradient(guide, 0.03, 0.02, steps=steps, gates_from=steps // 5)
    svi = pyro.infer.SVI(model, guide, optimizer, loss=SQSELBO())
    for _ in range(epochs):
        for x, y in data.train:
            svi.step(x, y)
    return guide


def images(data: Data, part: str) -> tuple[Tensor, Tensor]:
    batches = list(getattr(data, part))
    return torch.cat([x for x, _ in batches]), torch.cat([y for _, y in batches])


def places(kept: Sites, per_layer: int, seed: int) -> Iterator[Place]:
    """Draw as many weights of every layer, of those that are kept."""
    generator = torch.Generator().manual_seed(seed)
    for name, mask in kept.items():
        among = mask.flatten().nonzero()[:, 0]
        yield from ((name, i) for i in among[torch.randperm(len(among), generator=generator)[:per_layer]].tolist())


@torch.no_grad()
def removal(
    net: nn.Module, weights: Sites, present: Sites, chosen: Sequence[Place], data: Data
) -> dict[str, Tensor]:
    """Return by part of the data what the NLL gains when a chosen weight is zero instead of its present value."""
    found = {}
    for part in PARTS:
        x, y = images(data, part)

        def nll(changed: Sites, x: Tensor = x, y: Tensor = y) -> float:
            logits = functional_call(net, dict(changed), (x,)).double()
            return float(F.cross_entropy(logits, y, reduction="sum"))

        whole = nll(weights)
        gains = []
        for name, i in chosen:
            value = weights[name].clone()
            own = float(value.view(-1)[i])
            losses = []
            for one in (0.0, float(present[name].flatten()[i])):
                value.view(-1)[i] = one
                losses.append(whole if one == own else nll({**weights, name: value}))
            gains.append(losses[0] - losses[1])
        found[part] = torch.tensor(gains, dtype=torch.float64)
    return found


def correlations(
    scores: Mapping[str, Sites], gains: Mapping[str, Tensor], chosen: Sequence[Place]
) -> dict[str, Any]:
    """Return by score and loss how well the one tells the other."""
    names = [name for name, _ in chosen]
    layers = [torch.tensor([name == layer for name in names]) for layer in dict.fromkeys(names)]
    found: dict[str, Any] = {}
    for score, sites in scores.items():
        values = torch.stack([sites[name].flatten()[i] for name, i in chosen])
        for loss, gain in gains.items():
            within = [float(spearmanr(values[own], gain[own]).statistic) for own in layers]
            found.setdefault(score, {})[loss] = {
                "all": float(spearmanr(values, gain).statistic),
                "within layers": statistics.fmean(within),
                "more than a nat": auroc(values[gain > 1], values[gain <= 1]),
            }
    return found


def auroc(above: Tensor, below: Tensor) -> float:
    """Return the probability that one of the first is larger than one of the others."""
    return float(mannwhitneyu(above, below).statistic) / (len(above) * len(below))


def of_inference(net: nn.Module, seed: int, data: Data, args: argparse.Namespace) -> dict[str, Any]:
    guide = inferred(net, data, args.epochs)
    mean, gates = guide.mean(), guide.inclusion_probabilities()
    sites = {
        name: (site.latent.detach(), site.latent_scale.detach()) for name, site in guide.site_guides().items()
    }
    latent = {name: w.reshape(mean[name].shape) for name, (w, _) in sites.items()}
    width = {name: s.reshape(mean[name].shape) for name, (_, s) in sites.items()}
    chosen = list(places({name: torch.ones_like(value) for name, value in mean.items()}, args.weights, seed))
    gains = {f"means, {part}": gain for part, gain in removal(net, mean, mean, chosen, data).items()}
    drawn = [removal(net, draw, latent, chosen, data) for draw in guide.draw_weights(args.draws)]
    gains |= {f"draws, {part}": torch.stack([each[part] for each in drawn]).mean(0) for part in PARTS}
    scores = {
        "λ": gates,
        "evidence": guide.evidence(),
        "|w|": {name: w.abs() for name, w in latent.items()},
        "|w|/s": {name: w.abs() / width[name] for name, w in latent.items()},
        "λ|w|": {name: value.abs() for name, value in mean.items()},
        "|w|, trained": {name: value.abs() for name, value in guide.model.site_values().items()},
    }
    at = torch.stack([gates[name].flatten()[i] for name, i in chosen])
    return {
        "correlations": correlations(scores, gains, chosen),
        "gain by gate": {
            name: {loss: float(gain[own].mean()) for loss, gain in gains.items()} | {"weights": int(own.sum())}
            for name, own in {"λ > 0.9": at > 0.9, "λ < 0.5": at < 0.5}.items()
        },
        "open": guide.nonzero_rate(),
        "accuracy": accuracy(net, mean, data),
    }


def of_compression(kind: str, net: nn.Module, seed: int, data: Data, args: argparse.Namespace) -> dict[str, Any]:
    recipe = {**COMPRESSION, "prior": {"kind": kind, "inclusion": INCLUSION}}
    result = compress(net, data.train, recipe, seed=seed)
    hard = {name: coded.dense() for name, coded in result.guide.harden(torch.float32).items()}
    chosen = list(places({name: value != 0 for name, value in hard.items()}, args.weights, seed))
    net = result.unrounded.eval()
    scores = {
        "λ": result.guide.inclusion_probabilities(),
        "|w|": {name: value.abs() for name, value in hard.items()},
    }
    gains = {f"hard, {part}": gain for part, gain in removal(net, hard, hard, chosen, data).items()}
    return {"correlations": correlations(scores, gains, chosen), "accuracy": accuracy(net, hard, data)}


@torch.no_grad()
def accuracy(net: nn.Module, weights: Sites, data: Data) -> float:
    x, y = images(data, "test")
    return float((functional_call(net, dict(weights), (x,)).argmax(-1) == y).double().mean())


def intervals(seeds: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Return mean and 95 % interval over seeds, by score, loss and kind of figure."""
    found = [seed["correlations"] for seed in seeds]
    return {
        score: {
            loss: {
                kind: vars(paired_difference([f[score][loss][kind] for f in found], [0.0] * len(found)))
                for kind in kinds
            }
            for loss, kinds in losses.items()
        }
        for score, losses in found[0].items()
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    parser.add_argument("--epochs", type=int, default=160, help="of inference")
    parser.add_argument("--weights", type=int, default=40, help="of each layer")
    parser.add_argument("--draws", type=int, default=8)
    parser.add_argument("--out", type=Path, default=Path(__file__).with_suffix(".json"))
    args = parser.parse_args()
    pyro.enable_validation(False)
    rows: dict[str, list[dict[str, Any]]] = {"inferred": [], "compressed, normal": [], "compressed, learned": []}
    for seed in args.seeds:
        data = load_data(DATA, seed)
        net = trained(seed, data)
        for name, found in rows.items():
            kind, own = name.partition(", ")[2], deepcopy(net)
            how = partial(of_compression, kind) if kind else of_inference
            found.append(how(own, seed, data, args))
            print(f"seed {seed}, {name}: {found[-1]}", flush=True)
        write_figures(
            args.out, {name: {"over seeds": intervals(found), "by seed": found} for name, found in rows.items()}
        )


if __name__ == "__main__":
    main()
