"""Between data and beyond them: one guide, a mixture of guides from several starts, and one file of its draws.

A sine with a gap: 80 points on [-h - 1.5, -h] and [h, h + 1.5], noise 0.1, 16 tanh units; h is 0.7 (narrow) or 2
(wide). Figures are the sd of the function, averaged over places within the data, in the gap, and up to 1.3 beyond:
of the members of a mixture (their mean), of the mixture, and of 40 of its draws packed while it is dense, with 16
and 64 components, and after ``start_coding()``; with the size of the files. Writes ``mixture.json``.

    python benchmarks/mixture.py [--seeds 3] [--members 4] [--steps 800]
"""

import argparse
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from figures import write_figures
from torch import Tensor, nn

from sqs_pyro import SQSELBO, BayesianNetwork, SpikeAndSlab, pack_ensemble, save, size_report
from sqs_pyro.inference import GuideMixture
from sqs_pyro.inference.natural_gradient import NaturalGradient

GAPS = {"narrow": 0.7, "wide": 2.0}
DRAWS = 400


def fitted(gap: float, members: int, steps: int) -> GuideMixture:
    side = torch.linspace(gap, gap + 1.5, 40)
    x = torch.cat([-side, side]).unsqueeze(1)
    y = torch.sin(2 * x[:, 0]) + 0.1 * torch.randn(80)
    net = nn.Sequential(nn.Linear(1, 16), nn.Tanh(), nn.Linear(16, 1))
    prior = SpikeAndSlab(torch.tensor(0.9), dist.Normal(0.0, 1.0))
    model = BayesianNetwork(net, prior, lambda out: dist.Normal(out[:, 0], 0.1), num_data=80, include=".*")
    mixture = GuideMixture.restarts(model, members)
    for member in mixture.members:
        svi = pyro.infer.SVI(model, member, NaturalGradient(member, steps=steps), SQSELBO())
        for _ in range(steps):
            svi.step(x, y)
    return mixture


def by_place(function: Callable[[Tensor], Tensor], gap: float) -> dict[str, float]:
    """Return the sd over draws, ``[S, places, 1]``, averaged over the places of each kind."""
    x = torch.linspace(-gap - 2.8, gap + 2.8, 200)
    sd = function(x.unsqueeze(1)).squeeze(-1).std(0)
    size = x.abs()
    where = {"within": (size >= gap) & (size <= gap + 1.5), "gap": size < gap, "beyond": size > gap + 1.5}
    return {name: float(sd[chosen].mean()) for name, chosen in where.items()}


def drawn(guide: Any, mixture: GuideMixture) -> Callable[[Tensor], Tensor]:
    sites = ("logits",)
    return lambda x: pyro.infer.Predictive(
        mixture.model, guide=guide, num_samples=DRAWS, parallel=True, return_sites=sites
    )(x)["logits"]


def packed(mixture: GuideMixture, gap: float) -> dict[str, float]:
    ensemble = pack_ensemble(mixture, 40, seed=0)
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / "mixture.safetensors"
        save(ensemble, path)
        return by_place(ensemble.each, gap) | {"bytes": size_report(path).total}


def measure(gap: float, options: argparse.Namespace) -> dict[str, dict[str, float]]:
    mixture = fitted(gap, options.members, options.steps)
    each = [by_place(drawn(member, mixture), gap) for member in mixture.members]
    found = {
        "one guide": {place: sum(own[place] for own in each) / len(each) for place in each[0]},
        "mixture": by_place(drawn(mixture, mixture), gap),
        "packed, 16": packed(mixture, gap),
    }
    finer = GuideMixture.restarts(mixture.model, options.members, num_components=64)
    for own, member in zip(finer.members, mixture.members, strict=True):
        for name, site in own.site_guides().items():
            trained = member.site_guides()[name]
            site.latent, site.latent_scale = trained.latent.detach(), trained.latent_scale.detach()
            site.gate_logit = trained.gate_logit.detach()
    found["packed, 64"] = packed(finer, gap)
    mixture.start_coding()
    return found | {"packed, coded": packed(mixture, gap)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--members", type=int, default=4)
    parser.add_argument("--steps", type=int, default=800)
    parser.add_argument("--out", type=Path, default=Path(__file__).with_suffix(".json"))
    options = parser.parse_args()
    pyro.enable_validation(False)
    rows = []
    for name, gap in GAPS.items():
        for seed in range(options.seeds):
            pyro.set_rng_seed(seed)
            found = measure(gap, options)
            rows.append({"gap": name, "seed": seed} | found)
            print(
                name,
                seed,
                {way: {k: round(v, 3) for k, v in own.items()} for way, own in found.items()},
                flush=True,
            )
            write_figures(options.out, {"rows": rows})


if __name__ == "__main__":
    main()
