"""The guide's posterior of linear regression beside the exact one: a sum over all models.

12 features, 60 rows, a spike-and-slab prior (inclusion 0.3, slab and noise N(0, 1)), 20 data sets of orthogonal
features and 20 of correlated ones (pairwise correlation 0.5). The exact posterior sums 4,096 models. Where
features are orthogonal it is of the guide's own family; where not, mean field has an error of its own, and
coordinate ascent of the same family (Carbonetto and Stephens 2012) says how large. The ELBO is computed in closed
form from what was fitted, and may not be above the evidence.

    python benchmarks/exact_posterior.py [--steps 500] [--data-sets 20]
"""

import argparse
import itertools
import math
import statistics
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import pyro
import torch
from figures import write_figures
from torch import Tensor, nn

from sqs_pyro import SQSELBO, BayesianNetwork, SpikeAndSlab, SpikeGMMGuide
from sqs_pyro.inference import NaturalGradient
from sqs_pyro.models import Gaussian

ROWS, FEATURES, INCLUSION = 60, 12, 0.3
TRUTH = torch.tensor([1.0, -0.6, 0.35, 0.2] + [0.0] * 8, dtype=torch.float64)


def data(seed: int, correlation: float) -> tuple[Tensor, Tensor]:
    """Return features ``[60, 12]``, orthogonal or of this correlation, and targets ``[60]``."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(ROWS, FEATURES, generator=generator, dtype=torch.float64)
    if correlation:
        common = torch.randn(ROWS, 1, generator=generator, dtype=torch.float64)
        x = math.sqrt(1 - correlation) * x + math.sqrt(correlation) * common
    else:
        x = torch.linalg.qr(x)[0] * math.sqrt(ROWS)
    return x, x @ TRUTH + torch.randn(ROWS, generator=generator, dtype=torch.float64)


def exact(x: Tensor, y: Tensor) -> tuple[Tensor, float]:
    """Return inclusion probabilities ``[12]`` and the log evidence, by all models."""
    models = torch.tensor(list(itertools.product([False, True], repeat=x.shape[1])))
    gram, moment = x.T @ x, x.T @ y
    logs = []
    for chosen in models:
        size = int(chosen.sum())
        factor = torch.linalg.cholesky(gram[chosen][:, chosen] + torch.eye(size, dtype=x.dtype))
        fit = (
            moment[chosen] @ torch.cholesky_solve(moment[chosen, None], factor)[:, 0]
            if size
            else moment.new_zeros(())
        )
        prior = size * math.log(INCLUSION) + (x.shape[1] - size) * math.log(1 - INCLUSION)
        logs.append(0.5 * fit - factor.diagonal().log().sum() + prior)
    joint = torch.stack(logs)
    constant = -0.5 * len(y) * math.log(2 * math.pi) - 0.5 * float(y @ y)
    return joint.softmax(0) @ models.to(x.dtype), float(joint.logsumexp(0)) + constant


def elbo(x: Tensor, y: Tensor, gates: Tensor, latent: Tensor, square: Tensor) -> float:
    """Return the ELBO of ``(1-λ) δ₀ + λ N(w, s²)`` in closed form."""
    mean, variance = gates * latent, gates * (square + (1 - gates) * latent.square())
    residual = (y - x @ mean).square().sum() + x.square().sum(0) @ variance
    gate = torch.special.xlogy(gates, gates / INCLUSION) + torch.special.xlogy(
        1 - gates, (1 - gates) / (1 - INCLUSION)
    )
    slab = 0.5 * (square + latent.square() - 1 - square.log())
    return float(-0.5 * len(y) * math.log(2 * math.pi) - 0.5 * residual - (gate + gates * slab).sum())


def coordinate_ascent(x: Tensor, y: Tensor, rounds: int = 500) -> tuple[Tensor, Tensor, Tensor]:
    """Return λ, w and s² where no coordinate alone can raise the ELBO."""
    gram, moment = x.T @ x, x.T @ y
    square = 1 / (gram.diagonal() + 1)
    gates, latent = torch.full_like(square, INCLUSION), torch.zeros_like(square)
    for _ in range(rounds):
        for i in range(len(square)):
            latent[i] = square[i] * (moment[i] - gram[i] @ (gates * latent) + gram[i, i] * gates[i] * latent[i])
            evidence = 0.5 * square[i].log() + 0.5 * latent[i].square() / square[i]
            gates[i] = (math.log(INCLUSION / (1 - INCLUSION)) + evidence).sigmoid()
    return gates, latent, square


def fitted(x: Tensor, y: Tensor, steps: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return λ, w and s² of the library's guide after natural-gradient steps on its ELBO."""
    x, y = x.float(), y.float()[:, None]
    net = nn.Linear(FEATURES, 1, bias=False)
    net.weight.data = torch.linalg.lstsq(x, y).solution.T.contiguous()
    prior = SpikeAndSlab(INCLUSION, pyro.distributions.Normal(0.0, 1.0))
    model = BayesianNetwork(net, prior, Gaussian(1.0), num_data=ROWS)
    guide = SpikeGMMGuide(model)
    svi = pyro.infer.SVI(model, guide, NaturalGradient(guide, steps=steps), loss=SQSELBO())
    for _ in range(steps):
        svi.step(x, y)
    site = guide.site_guides()["weight"]
    return tuple(v.detach()[0].double() for v in (site.gates(), site.latent, site.latent_scale.square()))


def row(kind: str, seed: int, steps: int) -> dict[str, Any]:
    pyro.enable_validation(False)
    torch.set_num_threads(1)
    torch.manual_seed(seed)
    x, y = data(seed, correlation=0.5 if kind == "correlated" else 0.0)
    inclusion, evidence = exact(x, y)
    found: dict[str, Any] = {"features": kind, "seed": seed, "evidence": evidence}
    for method, (gates, *rest) in {
        "guide": fitted(x, y, steps),
        "coordinate ascent": coordinate_ascent(x, y),
    }.items():
        error = (gates - inclusion).abs()
        found[method] = {
            "largest_error": float(error.max()),
            "mean_error": float(error.mean()),
            "elbo": elbo(x, y, gates, *rest),
        }
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", maxsplit=1)[0])
    parser.add_argument("--steps", type=int, default=500)
    parser.add_argument("--data-sets", type=int, default=20)
    parser.add_argument("--jobs", type=int, default=2)
    options = parser.parse_args()
    kinds, rows, summary = ("orthogonal", "correlated"), [], {}
    cases = [(kind, seed, options.steps) for kind in kinds for seed in range(options.data_sets)]
    with ProcessPoolExecutor(options.jobs) as executor:
        for found in executor.map(row, *zip(*cases, strict=True)):
            rows.append(found)
            print(found, flush=True)
    for kind in kinds:
        mine = [r for r in rows if r["features"] == kind]
        summary[kind] = {
            method: {
                "largest_error": max(r[method]["largest_error"] for r in mine),
                "mean_of_largest_errors": statistics.mean(r[method]["largest_error"] for r in mine),
                "mean_error": statistics.mean(r[method]["mean_error"] for r in mine),
                "closest_to_evidence": max(r[method]["elbo"] - r["evidence"] for r in mine),
                "farthest_from_evidence": min(r[method]["elbo"] - r["evidence"] for r in mine),
            }
            for method in ("guide", "coordinate ascent")
        }
        print(kind, summary[kind])
    write_figures(Path(__file__).with_suffix(".json"), {"steps": options.steps, "summary": summary, "rows": rows})


if __name__ == "__main__":
    main()
