"""Does the posterior contract at the theorem's rate beyond fully connected networks? d² to the truth over n.

Three small networks, each with a sparse truth of a few values: fully connected (two hidden layers), convolutional
(two convolutions, pooling) and attention (one head, four tokens). Inputs are uniform on [-1, 1], targets are the
truth's outputs with Gaussian noise of known σ, and every (n, seed) has data of its own. `BayesianNetwork`,
`SpikeGMMGuide`, `NaturalGradient` and `SQSELBO` infer all weights, biases included; then

    E_q d²(P_θ, P_0),   d²(P_θ, P_0) = E_x [1 - exp(-(f_θ(x) - f_0(x))² / 8σ²)]   (squared Hellinger distance)

by draws of q and inputs of a test sample. Of each data set there are

* `truth`: gates and latents start at the truth, so that optimisation is not what limits;
* `trained`: start at networks trained on the same data from random weights with an L1 penalty, the better of two
  (one a penalty) by the ELBO;
* `tempered`: as `truth`, with the likelihood to the power of a half: the posterior that `bound` is about;
* `Gaussian`: as `truth`, but the prior has no spike;
* `hard`, `trained, hard`: the most probable network of the first two with K = 4 codewords a layer;
* `oracle`: maximum likelihood on the true support.

All of a cell (network, n) are copies in one stacked network, as many as seeds and ways, whose likelihood and KL
are sums: each is inferred as it would be alone. Slopes are of log d² over log n by least squares, with 95 %
intervals of Student's t over data sets. `--out` keeps each cell: the command goes on where it was interrupted.

    python benchmarks/contraction.py [--networks attention ...] [--sizes 100 1000] [--seeds 5] [--steps 400]
        [--out runs/contraction]
"""

import argparse
import json
import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyro
import torch
from figures import write_figures
from scipy.stats import linregress, t
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F

from sqs_pyro import SQSELBO, BayesianNetwork, SpikeAndSlab, SpikeGMMGuide
from sqs_pyro.atomic import write_text
from sqs_pyro.inference import NaturalGradient
from sqs_pyro.models import Gaussian

NOISE, INCLUSION, SLAB = 0.3, 0.05, 2.0
SIZES = (100, 300, 1000, 3000, 10000)
CODEWORDS, DRAWS, BATCH = 4, 20, 256
#: Nats a unit of weight, in √n, of each network that is trained: without a penalty most gates stay open.
PENALTIES = (1.0, 0.3)
#: Ways of inference from one data set, in the order of the copies.
WAYS = ("truth", "tempered", "Gaussian", *["trained"] * len(PENALTIES))
#: What a figure and a slope is made of.
CURVES = ("truth", "trained", "tempered", "hard", "trained, hard", "Gaussian", "oracle")


# ---- networks: C copies side by side, inputs [B, C, ...], outputs [B, C] ----


class Map(nn.Module):
    """C linear maps of ``[C, B, in]``; the last row of a weight ``[C, in + 1, out]`` is the bias."""

    def __init__(self, copies: int, inputs: int, outputs: int, bias: bool = True) -> None:
        super().__init__()
        self.bias = bias
        self.weight = nn.Parameter(torch.zeros(copies, inputs + bias, outputs))

    def forward(self, x: Tensor) -> Tensor:
        return (F.pad(x, (0, 1), value=1.0) if self.bias else x) @ self.weight


class FullyConnected(nn.Module):
    """Two hidden layers of 12 tanh units."""

    inputs = (8,)

    def __init__(self, copies: int) -> None:
        super().__init__()
        self.first, self.second, self.last = Map(copies, 8, 12), Map(copies, 12, 12), Map(copies, 12, 1)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.second(self.first(x.transpose(0, 1)).tanh()).tanh()
        return self.last(hidden)[..., 0].T


class Convolutional(nn.Module):
    """Kernels of 5 and 3 on 12 places, as products with the windows that they see."""

    inputs = (12,)

    def __init__(self, copies: int) -> None:
        super().__init__()
        self.first, self.second, self.last = Map(copies, 5, 6), Map(copies, 3 * 6, 6), Map(copies, 6, 1)

    def forward(self, x: Tensor) -> Tensor:
        windows = x.transpose(0, 1).unfold(2, 5, 1)  # [C, B, 8, 5]
        hidden = self.first(windows.flatten(1, 2)).tanh().unflatten(1, windows.shape[1:3])  # [C, B, 8, 6]
        pooled = hidden.unflatten(2, (4, 2)).mean(3)
        windows = pooled.unfold(2, 3, 1).flatten(3)  # [C, B, 2, 6 * 3]
        hidden = self.second(windows.flatten(1, 2)).tanh().unflatten(1, windows.shape[1:3])
        return self.last(hidden.mean(2))[..., 0].T


class Attention(nn.Module):
    """One head of width 4 over 4 tokens of 5 numbers, and a layer behind it."""

    inputs = (4, 5)

    def __init__(self, copies: int) -> None:
        super().__init__()
        self.query, self.key = Map(copies, 5, 4, bias=False), Map(copies, 5, 4, bias=False)
        self.value = Map(copies, 5, 4, bias=False)
        self.mixed, self.last = Map(copies, 4, 4), Map(copies, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        copies, examples = x.shape[1], x.shape[0]
        tokens = x.transpose(0, 1).flatten(1, 2)  # [C, B * 4, 5]
        query, key, value = (
            part(tokens).view(copies, examples, 4, 4) for part in (self.query, self.key, self.value)
        )
        attended = (query @ key.mT / 2).softmax(-1) @ value
        hidden = self.mixed(attended.flatten(1, 2)).tanh().view(copies, examples, 4, 4)
        return self.last(hidden.mean(2))[..., 0].T


#: Weights of the truth that are not zero: by site the (input, output) of each. The last input is the bias.
Entries = Mapping[str, Mapping[tuple[int, int], float]]
NETWORKS: dict[str, tuple[type[nn.Module], Entries]] = {
    "fully connected": (
        FullyConnected,
        {
            "first": {(0, 0): 2, (1, 0): -2, (8, 0): 1, (1, 1): 1, (2, 1): 2, (3, 1): -1, (4, 2): -2},
            "second": {(0, 0): 2, (1, 0): -1, (1, 1): 1, (2, 1): 2},
            "last": {(0, 0): 1, (1, 0): -1},
        },
    ),
    "convolutional": (
        Convolutional,
        {
            "first": {(0, 0): 1, (1, 0): -2, (2, 0): 1, (1, 1): 2, (4, 1): 2},
            "second": {(0, 0): 2, (4, 0): -2, (18, 0): 1, (3, 1): 2, (2, 1): 2},  # 3 * channel + place
            "last": {(0, 0): 2, (1, 0): -2},
        },
    ),
    "attention": (
        Attention,
        {
            "query": {(0, 0): 4, (1, 1): 4},
            "key": {(2, 0): 4, (0, 1): -4},
            "value": {(3, 0): 2, (4, 1): 2, (3, 1): -1},
            "mixed": {(0, 0): 2, (0, 1): 2, (1, 1): 1},
            "last": {(0, 0): 2, (1, 0): -2},
        },
    ),
}

Weights = dict[str, Tensor]


def true_weights(name: str) -> Weights:
    """Return the weights of a truth, one copy of each, by the parameters' names."""
    make, entries = NETWORKS[name]
    weights = {key: torch.zeros_like(value) for key, value in make(1).state_dict().items()}
    for site, values in entries.items():
        for (i, o), value in values.items():
            weights[f"{site}.weight"][0, i, o] = value
    return weights


def copied(weights: Weights, copies: int) -> Weights:
    return {name: value.expand(copies, -1, -1).clone() for name, value in weights.items()}


def outputs(name: str, weights: Weights, x: Tensor) -> Tensor:
    """Return ``f(x)``, ``[B, C]``, of weights of C copies; inputs ``[B, C, ...]``, or ``[B, 1, ...]`` for all."""
    copies = next(iter(weights.values())).shape[0]
    return functional_call(NETWORKS[name][0](copies), weights, (x.expand(-1, copies, *x.shape[2:]),))


def data(name: str, n: int, seeds: int) -> tuple[Tensor, Tensor]:
    """Return inputs ``[n, seeds, ...]`` and targets ``[n, seeds]``; other n have other data."""
    generator = torch.Generator().manual_seed(n)
    x = uniform(name, n, seeds, generator)
    clean = outputs(name, copied(true_weights(name), seeds), x)
    return x, clean + NOISE * torch.randn(clean.shape, generator=generator)


def uniform(name: str, n: int, copies: int, generator: torch.Generator) -> Tensor:
    shape = NETWORKS[name][0].inputs  # type: ignore[attr-defined]
    return 2 * torch.rand(n, copies, *shape, generator=generator) - 1


# ---- distances, rates and slopes ----


def squared_hellinger(mean: Tensor, true_mean: Tensor, noise: float) -> Tensor:
    """Return ``1 - ∫ √(p q)`` of two normal laws of the same standard deviation, elementwise."""
    return -torch.expm1(-(mean.double() - true_mean.double()).square() / (8 * noise**2))


def theorem_rate(n: float, sparsity: int, layers: int, width: int, inputs: int) -> float:
    """Return ``r_n`` of docs/theory.md: L hidden layers of N units, p inputs, s weights that are not zero."""
    return sparsity / n * ((layers + 1) * math.log(width) + math.log(inputs * math.sqrt(n / sparsity)))


@dataclass(frozen=True)
class Slope:
    """Of log d² over log n, with the ends of its interval."""

    slope: float
    interval: tuple[float, float]


def slope_of(sizes: Sequence[float], distances: Sequence[float], level: float = 0.95) -> Slope:
    """Fit ``log d² = a + b log n`` to one distance a data set; the interval is Student's t, n - 2 degrees."""
    fit = linregress(np.log(sizes), np.log(distances))
    half = float(t.ppf(0.5 + level / 2, len(sizes) - 2)) * float(fit.stderr)
    return Slope(float(fit.slope), (float(fit.slope) - half, float(fit.slope) + half))


def bound(name: str, n: int, x: Tensor) -> float:
    """Return ``½ ∫ KL(P_0, P_θ) dq + KL(q‖p) / n`` of a q around the truth, which bounds E d² of `tempered`.

    Gates of q are open on the support and closed elsewhere, widths those of the tempered posterior's curvature.
    """
    truth = true_weights(name)
    support = {site: value != 0 for site, value in truth.items()}
    widths, generator = {}, torch.Generator().manual_seed(0)
    for site, value in truth.items():
        curvature = torch.zeros_like(value)
        for index in support[site].nonzero().tolist():
            moved = {key: other.clone() for key, other in truth.items()}
            moved[site][tuple(index)] += 1e-2
            change = (outputs(name, moved, x) - outputs(name, truth, x)) / 1e-2
            curvature[tuple(index)] = change.square().mean() / NOISE**2
        widths[site] = support[site] * (0.5 * n * curvature + SLAB**-2).rsqrt()
    drawn = {
        site: value + widths[site] * torch.randn(100, *value.shape[1:], generator=generator)
        for site, value in truth.items()
    }
    nats = ((outputs(name, drawn, x) - outputs(name, truth, x)).square() / (2 * NOISE**2)).mean()
    kl = 0.0
    for site, value in truth.items():
        ratio = (widths[site] / SLAB).square()
        slab = 0.5 * (ratio + (value / SLAB).square() - 1 - ratio.log()) - math.log(INCLUSION)
        kl += float(torch.where(support[site], slab, -math.log1p(-INCLUSION)).sum())
    return 0.5 * float(nats) + kl / n


# ---- inference ----


def trained(name: str, x: Tensor, y: Tensor, penalties: Tensor, steps: int = 800) -> Weights:
    """Return networks trained from random weights, with an L1 penalty of each copy, ``[C]`` in nats."""
    n, copies = y.shape
    net = NETWORKS[name][0](copies)
    for weight in net.parameters():
        nn.init.normal_(weight, std=weight.shape[1] ** -0.5)
    optimizer = torch.optim.Adam(net.parameters(), lr=0.02)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.02, total_steps=steps)
    for _ in range(steps):
        rows = slice(None) if n <= BATCH else torch.randint(n, (BATCH,))
        fit = (net(x[rows]) - y[rows]).square().mean(0).sum() / (2 * NOISE**2)
        loss = fit + sum((p.abs().sum((1, 2)) * penalties).sum() for p in net.parameters()) / n
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return {key: value.detach() for key, value in net.state_dict().items()}


def oracle(name: str, x: Tensor, y: Tensor) -> Weights:
    """Return the maximum of the likelihood with the true support, from the truth, for every seed."""
    truth = copied(true_weights(name), y.shape[1])
    free = {site: value.clone().requires_grad_() for site, value in truth.items()}
    optimizer = torch.optim.LBFGS(free.values(), max_iter=100, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimizer.zero_grad()
        on_support = {site: value * (truth[site] != 0) for site, value in free.items()}
        loss = (outputs(name, on_support, x) - y).square().mean(0).sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    return {site: value.detach() * (truth[site] != 0) for site, value in free.items()}


def inferred(
    name: str, start: Weights, x: Tensor, y: Tensor, ways: Sequence[str], steps: int
) -> tuple[BayesianNetwork, SpikeGMMGuide]:
    """Return the posterior of every copy; a way for each says its prior and its noise."""
    n, copies = y.shape
    net = NETWORKS[name][0](copies)
    net.load_state_dict(start)
    inclusion = torch.tensor([1 - 1e-6 if way == "Gaussian" else INCLUSION for way in ways])
    # A Gaussian likelihood to the power of a half is, up to a constant, one of twice the variance.
    noise = torch.tensor([NOISE * math.sqrt(2) if way == "tempered" else NOISE for way in ways])

    def prior(site: str, weight: Tensor) -> SpikeAndSlab:
        slab = pyro.distributions.Normal(torch.zeros_like(weight), SLAB)
        return SpikeAndSlab(inclusion[:, None, None].expand_as(weight), slab)

    pyro.clear_param_store()
    model = BayesianNetwork(net, prior, Gaussian(noise), num_data=n, include=".*")
    components = {site: min(CODEWORDS, value[0].numel()) for site, value in model.site_values().items()}
    guide = SpikeGMMGuide(model, components, groups="channel", init_scale=0.02)  # a codebook for each copy
    rate = math.sqrt(min(1.0, BATCH / n))
    optimizer = NaturalGradient(guide, 0.1 * rate, 0.05 * rate, steps=steps, gates_from=steps // 4)
    svi = pyro.infer.SVI(model, guide, optimizer, loss=SQSELBO())
    for _ in range(steps):
        rows = slice(None) if n <= BATCH else torch.randint(n, (BATCH,))
        svi.step(x[rows], y[rows])
    return model, guide


@torch.no_grad()
def elbos(model: BayesianNetwork, guide: SpikeGMMGuide, x: Tensor, y: Tensor) -> Tensor:
    """Return the ELBO of each copy under the noise of the data and the spike-and-slab prior, ``[C]``."""
    predicted = pyro.infer.Predictive(model, guide=guide, num_samples=5)(x)["logits"]
    log_p = torch.distributions.Normal(predicted, NOISE).log_prob(y).mean(0).sum(0)
    for site in guide.site_guides().values():
        gate, square = site.gates(), site.latent_scale.square()
        slab = 0.5 * ((square + site.latent.square()) / SLAB**2 - 1 - (square / SLAB**2).log())
        kl = torch.special.xlogy(gate, gate / INCLUSION)
        kl += torch.special.xlogy(1 - gate, (1 - gate) / (1 - INCLUSION)) + gate * slab
        log_p = log_p - kl.sum((1, 2))
    return log_p


def kept(guide: SpikeGMMGuide) -> Tensor:
    """Return how many gates are open, ``[C]``."""
    return torch.stack([(site.gates() > 0.5).sum((1, 2)) for site in guide.site_guides().values()]).sum(0)


# ---- a cell ----


@torch.no_grad()
def apart(name: str, weights: Weights, x: Tensor, true_mean: Tensor) -> Tensor:
    """Return d² of each copy from the truth, ``[C]``."""
    return squared_hellinger(outputs(name, weights, x), true_mean, NOISE).mean(0)


def cell(name: str, n: int, seeds: int, steps: int) -> dict[str, Any]:
    """Return the distances of all seeds and ways, by way a list over seeds."""
    torch.manual_seed(n)
    begun = time.process_time()
    x, y = data(name, n, seeds)
    # Copies are in the order of ways, and of seeds within each.
    ways = [way for way in WAYS for _ in range(seeds)]
    copies_x, copies_y = x.repeat(1, len(WAYS), *[1] * (x.dim() - 2)), y.repeat(1, len(WAYS))
    cold = WAYS.index("trained") * seeds
    penalties = math.sqrt(n) * torch.tensor(PENALTIES).repeat_interleave(seeds)
    found = trained(name, copies_x[:, cold:], copies_y[:, cold:], penalties)
    truth = true_weights(name)
    start = {site: torch.cat([copied(truth, cold)[site], value]) for site, value in found.items()}
    model, guide = inferred(name, start, copies_x, copies_y, ways, steps)

    places = uniform(name, 2000, 1, torch.Generator().manual_seed(0))
    true_mean = outputs(name, truth, places)
    drawn = guide.draw_weights(DRAWS)
    distance = torch.stack([apart(name, draw, places, true_mean) for draw in drawn]).mean(0)
    evidence, gates = elbos(model, guide, copies_x, copies_y), kept(guide)
    guide.start_coding()
    coded = {site: value.dense() for site, value in guide.harden(torch.float32).items()}
    hard = apart(name, coded, places, true_mean)

    row: dict[str, Any] = {"network": name, "n": n, "steps": steps, "bound": bound(name, n, places)}
    row["oracle"] = apart(name, oracle(name, x, y), places, true_mean).tolist()
    row["start of trained"] = apart(name, found, places, true_mean).view(-1, seeds).tolist()
    by_way = {way: torch.tensor([w == way for w in ways]).nonzero()[:, 0].view(-1, seeds) for way in set(ways)}
    for way in dict.fromkeys(WAYS):
        chosen = by_way[way].gather(0, evidence[by_way[way]].argmax(0, keepdim=True))[0]  # the best restart
        row[way] = distance[chosen].tolist()
        row[f"{way}, open"] = gates[chosen].tolist()
        if way in ("truth", "trained"):
            row[f"{way}, elbo"] = evidence[chosen].tolist()
            row["hard" if way == "truth" else "trained, hard"] = hard[chosen].tolist()
    return row | {"seconds": time.process_time() - begun}


# ---- the study ----


def summary_of(name: str, cells: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Return a network's mean distances by way, in the order of sizes, and their slopes."""
    weights = true_weights(name).values()
    sparsity = sum(int((w != 0).sum()) for w in weights)
    sizes = [row["n"] for row in cells]
    found: dict[str, Any] = {
        "weights": sum(w.numel() for w in weights),
        "sparsity": sparsity,
        "sizes": sizes,
        "s / 4n": [sparsity / (4 * n) for n in sizes],
        "bound": [row["bound"] for row in cells],
        "bound_slope": slope_of(sizes, [row["bound"] for row in cells]).slope,
        # Optimisation has reached what inference from the truth has, to ten nats.
        "trained, as good as truth": [
            sum(ours > best - 10 for ours, best in zip(row["trained, elbo"], row["truth, elbo"], strict=True))
            for row in cells
        ],
        "open": {way: [float(np.mean(row[f"{way}, open"])) for row in cells] for way in dict.fromkeys(WAYS)},
    }
    if name == "fully connected":
        rates = [theorem_rate(n, sparsity, layers=2, width=12, inputs=8) for n in sizes]
        found |= {"r_n": rates, "r_n_slope": slope_of(sizes, rates).slope}
    for way in CURVES:
        every = [(row["n"], distance) for row in cells for distance in row[way]]
        fit = slope_of(*zip(*every, strict=True))
        found[way] = {
            "mean": [float(np.mean(row[way])) for row in cells],
            "slope": fit.slope,
            "interval": fit.interval,
        }
    return found


def picture(path: Path, summaries: Mapping[str, Mapping[str, Any]], cells: Sequence[Mapping[str, Any]]) -> None:
    """d² over n of each network, a dot a data set, beside what theory says."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(13, 5), layout="constrained")
    for axis, (name, summary) in zip(
        figure.subplots(1, len(summaries), squeeze=False)[0], summaries.items(), strict=True
    ):
        sizes = summary["sizes"]
        for i, way in enumerate(CURVES):
            style = {"truth": "-o", "trained": "-s", "oracle": ":"}.get(way, "--")
            label = f"{way}: {summary[way]['slope']:.2f}"
            axis.plot(sizes, summary[way]["mean"], style, color=f"C{i}", label=label, markersize=4)
            if way in ("truth", "trained"):
                dots = [(row["n"], d) for row in cells if row["network"] == name for d in row[way]]
                axis.scatter(*zip(*dots, strict=True), s=6, color=f"C{i}", alpha=0.5)
        axis.plot(sizes, summary["s / 4n"], color="0.6", linewidth=1, label="s / 4n")
        axis.plot(sizes, summary["bound"], "k-.", label=f"bound: {summary['bound_slope']:.2f}")
        if "r_n" in summary:
            axis.plot(sizes, summary["r_n"], "k:", label=f"$r_n$: {summary['r_n_slope']:.2f}")
        axis.set(
            xscale="log",
            yscale="log",
            xlabel="n",
            title=f"{name}, {summary['sparsity']} of {summary['weights']} weights",
        )
        axis.set_ylabel("squared Hellinger distance to the truth")
        axis.legend(fontsize=7, ncols=3, loc="upper center", bbox_to_anchor=(0.5, -0.13), title="slopes")
    figure.savefig(path, dpi=110)


def kept_cell(directory: Path, name: str, n: int, options: argparse.Namespace) -> dict[str, Any]:
    """Return a cell of these seeds and steps from the directory, or measure it and keep it there."""
    path = directory / f"{name.replace(' ', '_')}-{n}-{options.seeds}-{options.steps}.json"
    if path.is_file():
        return dict(json.loads(path.read_text(encoding="utf-8")))
    row = cell(name, n, options.seeds, options.steps)
    write_text(path, json.dumps(row))
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", maxsplit=1)[0])
    parser.add_argument("--networks", nargs="+", choices=NETWORKS, default=list(NETWORKS))
    parser.add_argument("--sizes", nargs="+", type=int, default=list(SIZES))
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, default=Path("runs/contraction"), help="where cells are kept")
    parser.add_argument("--figures", type=Path, default=Path(__file__).with_suffix(".json"))
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    pyro.enable_validation(False)
    options.out.mkdir(parents=True, exist_ok=True)
    cells, pairs = [], [(name, n) for n in options.sizes for name in options.networks]
    for done, (name, n) in enumerate(pairs, 1):
        cells.append(kept_cell(options.out, name, n, options))
        means = ", ".join(f"{way} {np.mean(cells[-1][way]):.2g}" for way in CURVES)
        print(f"[{done}/{len(pairs)}] {name}, n = {n}, {cells[-1]['seconds']:.0f} s: {means}", flush=True)
    summaries = {
        name: summary_of(name, [row for row in cells if row["network"] == name]) for name in options.networks
    }
    for name, summary in summaries.items():
        for way in CURVES:
            low, high = summary[way]["interval"]
            print(f"{name}, {way}: slope {summary[way]['slope']:.2f} [{low:.2f}, {high:.2f}]")
    write_figures(options.figures, {"summary": summaries, "cells": cells})
    picture(options.figures.with_suffix(".png"), summaries, cells)


if __name__ == "__main__":
    main()
