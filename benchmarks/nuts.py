"""Posteriors of small networks beside NUTS: every method infers the same model.

All weights are sites with priors N(0, 1/fan-in), all biases with N(0, 1): functions of size one before any datum.
The noise of regression is known (Friedman's function, the sine), or that of what MAP leaves unexplained on
left-out fifths of the training part (diabetes); it is the same number for every method. METHODS is all of them,
functions from a problem to a ``Predictive``.

* five splits of scikit-learn's diabetes, and of Friedman's first function (200 points), standardised by their
  training part, 20 tanh units;
* classification with 20 features of which 3 count, 120 points, 10 tanh units;
* a sine with a gap: 120 points on [-2.2, -0.7] and [0.7, 2.2], noise 0.1, 32 tanh units.

NLL is of the mixture of all draws, nats an example; coverage the share of test points within the central 90 % of
that mixture. Of the sine it is the share of places within the data where the truth is less than two sd of the
function from its mean; sd is that of the function, averaged over places. Seconds are of a core that others share.

    python benchmarks/nuts.py [--methods MAP NUTS ...] [--problems sine ...] [--warmup 200] [--draws 200]
"""

import argparse
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from figures import write_figures
from pyro import poutine
from pyro.infer import MCMC, NUTS, SVI, Predictive, TraceMeanField_ELBO
from pyro.infer.autoguide import AutoNormal, init_to_value
from pyro.optim import ClippedAdam
from sklearn.datasets import load_diabetes, make_friedman1
from sklearn.utils import shuffle
from torch import Tensor, nn
from torch.nn import functional as F

from sqs_pyro import SQSELBO, BayesianNetwork, SpikeAndSlab, SpikeGMMGuide
from sqs_pyro.inference import GuideMixture, NaturalGradient
from sqs_pyro.models import Bernoulli, Gaussian, LearnedSlab

SPLITS = range(5)
GAP = ("within", "gap", "beyond")


@dataclass(frozen=True)
class Problem:
    """Data ``[N, features]`` and ``[N]``, and a test part; ``noise`` is a standard deviation, None of classes."""

    name: str
    units: int
    train: tuple[Tensor, Tensor]
    test: tuple[Tensor, Tensor]
    noise: float | None

    def network(self) -> nn.Module:
        torch.manual_seed(0)
        features = self.train[0].shape[1]
        return nn.Sequential(nn.Linear(features, self.units), nn.Tanh(), nn.Linear(self.units, 1))

    def model(self, prior: Any = None) -> BayesianNetwork:
        """The Bayesian network that every method infers; a prior of its own has the scales of `slab`."""
        likelihood = Bernoulli() if self.noise is None else Gaussian(self.noise)
        return BayesianNetwork(self.network(), prior or slab, likelihood, len(self.train[1]), include=".*")


def slab(name: str, weight: Tensor) -> dist.TorchDistribution:
    """N(0, 1/fan-in) of weights, N(0, 1) of biases."""
    return dist.Normal(0.0, weight.shape[1] ** -0.5 if weight.dim() > 1 else 1.0)


# ---- problems ----


def diabetes(split: int) -> Problem:
    return standardised("diabetes", *load_diabetes(return_X_y=True), split)


def friedman(split: int) -> Problem:
    return standardised("friedman", *make_friedman1(200, noise=1.0, random_state=split), split, noise=1.0)


def standardised(name: str, features: Any, targets: Any, split: int, noise: float | None = None) -> Problem:
    """A fifth is for the test; noise that is not given is estimated."""
    x, y = (torch.tensor(values).float() for values in shuffle(features, targets, random_state=split))
    train, test = slice(None, int(0.8 * len(y))), slice(int(0.8 * len(y)), None)
    unit = float(y[train].std())
    x, y = ((v - v[train].mean(0)) / v[train].std(0) for v in (x, y))
    noise = noise_of(x[train], y[train]) if noise is None else noise / unit
    return Problem(name, 20, (x[train], y[train]), (x[test], y[test]), noise)


def noise_of(x: Tensor, y: Tensor, noise: float = 0.7) -> float:
    """The standard deviation of what MAP of four fifths leaves in the fifth, with this very noise."""
    folds = torch.arange(len(y)) % 5
    for _ in range(3):  # to the fixed point
        left = []
        for fold in range(5):
            part = Problem("fold", 20, (x[folds != fold], y[folds != fold]), (x, y), noise)
            plain = Plain(part)
            left.append(y[folds == fold] - plain.output(maximum(plain), x[folds == fold]))
        noise = float(torch.cat(left).std())
    return noise


def sparse_classes(split: int) -> Problem:
    generator = torch.Generator().manual_seed(100 + split)
    x = torch.randn(1120, 20, generator=generator)
    logits = 2 * x[:, 0] - 2 * x[:, 1] + 1.5 * x[:, 2]
    y = torch.bernoulli(logits.sigmoid(), generator=generator)
    return Problem("sparse_classes", 10, (x[:120], y[:120]), (x[120:], y[120:]), noise=None)


def sine(split: int) -> Problem:
    generator = torch.Generator().manual_seed(split)
    x = torch.cat([torch.linspace(-2.2, -0.7, 60), torch.linspace(0.7, 2.2, 60)])[:, None]
    y = truth(x) + 0.1 * torch.randn(len(x), generator=generator)
    places = torch.linspace(-3.5, 3.5, 281)[:, None]
    return Problem("sine", 32, (x, y), (places, truth(places)), noise=0.1)


def truth(x: Tensor) -> Tensor:
    return torch.sin(2 * x[:, 0])


#: Each with the splits it has.
PROBLEMS: dict[str, tuple[Callable[[int], Problem], range]] = {
    "diabetes": (diabetes, SPLITS),
    "friedman": (friedman, SPLITS),
    "sparse_classes": (sparse_classes, range(1)),
    "sine": (sine, range(1)),
}


# ---- methods ----


class Plain:
    """The same model as a plain Pyro program with one site of all weights, five times as fast as the network."""

    def __init__(self, problem: Problem) -> None:
        self.problem, self.network = problem, problem.model()
        self.start = self.network.site_values()
        self.scales = self.joined({name: prior.base_dist.scale for name, prior in self.network.priors.items()})

    def joined(self, tensors: dict[str, Tensor]) -> Tensor:
        return torch.cat([tensors[name].expand(own.shape).flatten() for name, own in self.start.items()])

    def split(self, weights: Tensor) -> dict[str, Tensor]:
        parts = weights.split([own.numel() for own in self.start.values()])
        return {name: part.view_as(own) for part, (name, own) in zip(parts, self.start.items(), strict=True)}

    def output(self, weights: Tensor, x: Tensor) -> Tensor:
        first, bias, last, offset = self.split(weights).values()
        return F.linear(torch.tanh(F.linear(x, first, bias)), last, offset)[:, 0]

    def model(self) -> None:
        weights = pyro.sample("weights", dist.Normal(0.0, self.scales).to_event(1))
        pyro.factor("obs", self.log_likelihood(weights))

    def log_likelihood(self, weights: Tensor) -> Tensor:
        """Return it up to a constant."""
        x, y = self.problem.train
        output = self.output(weights, x)
        if self.problem.noise is None:
            return -F.binary_cross_entropy_with_logits(output, y, reduction="sum")
        return -(output - y).square().sum() / (2 * self.problem.noise**2)

    def potential(self, sites: dict[str, Tensor]) -> Tensor:
        """Return minus the logarithm of the joint density, up to a constant."""
        return (sites["weights"] / self.scales).square().sum() / 2 - self.log_likelihood(sites["weights"])

    def check(self) -> None:
        """Differences of its potential are those of the Bayesian network."""
        ways = []
        for factor in (1.0, 2.0):
            values = {name: factor * value for name, value in self.start.items()}
            trace = poutine.trace(poutine.condition(self.network, data=values)).get_trace(*self.problem.train)
            ways.append(self.potential({"weights": self.joined(values)}) + trace.log_prob_sum())
        torch.testing.assert_close(*ways, rtol=1e-4, atol=1e-2)

    def predictive(self, rows: Tensor) -> Predictive:
        """Return what the Bayesian network predicts with weights ``[S, all]``."""
        draws = [self.split(row) for row in rows]
        return Predictive(self.network, {name: torch.stack([d[name] for d in draws]) for name in draws[0]})


def maximum(plain: Plain) -> Tensor:
    weights = plain.joined(plain.start).clone().requires_grad_()
    optimizer = torch.optim.LBFGS([weights], max_iter=2000, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = plain.potential({"weights": weights})
        loss.backward()
        return loss

    optimizer.step(closure)
    return weights.detach()


def maximum_a_posteriori(problem: Problem, options: argparse.Namespace) -> Predictive:
    plain = Plain(problem)
    plain.check()
    return plain.predictive(maximum(plain)[None])


def auto_normal(problem: Problem, options: argparse.Namespace) -> Predictive:
    plain = Plain(problem)
    start = init_to_value(values={"weights": plain.joined(plain.start)})
    guide = AutoNormal(plain.model, init_loc_fn=start, init_scale=0.01)
    by_svi(plain.model, guide, (), options.steps, TraceMeanField_ELBO())
    return plain.predictive(torch.stack([guide()["weights"] for _ in range(options.draws)]).detach())


def nuts(problem: Problem, options: argparse.Namespace) -> Predictive:
    plain = Plain(problem)
    kernel = NUTS(potential_fn=plain.potential, max_tree_depth=9)
    start = {"weights": maximum(plain)}
    run = MCMC(kernel, options.draws, options.warmup, initial_params=start, disable_progbar=True)
    run.run()
    divergent = sum(map(len, run.diagnostics()["divergences"].values()))
    print(f"  NUTS: {divergent} divergences, step {kernel.step_size:.4f}", flush=True)
    return plain.predictive(run.get_samples()["weights"])


def spike_gmm(problem: Problem, options: argparse.Namespace) -> Predictive:
    """Of the network itself, a spike beside the slab, and half as many steps as AutoNormal takes."""

    def prior(name: str, weight: Tensor) -> SpikeAndSlab:
        return SpikeAndSlab(0.5, slab(name, weight))

    model = problem.model(prior)
    pyro.clear_param_store()
    guide = SpikeGMMGuide(model)
    by_natural_gradients(model, guide, problem, options.steps // 2)
    return Predictive(model, guide=guide, num_samples=options.draws)


def mixture_of_guides(problem: Problem, options: argparse.Namespace) -> Predictive:
    """Four guides, each in half as many steps as AutoNormal takes; the widths of slabs are learned.

    Two start with all gates open and two with gates where the prior has them.
    """
    model = problem.model(LearnedSlab(0.5, lambda name, weight: float(slab(name, weight).scale)))
    pyro.clear_param_store()
    starts = [GuideMixture.restarts(model, 2, initial_gate=gate) for gate in (5.0, 0.0)]
    mixture = GuideMixture([member for start in starts for member in start.members])
    for member in mixture.members:
        model.prior.hold()
        by_natural_gradients(model, member, problem, options.steps // 2, then=model.prior.learn)
    return Predictive(model, guide=mixture, num_samples=options.draws)


def by_natural_gradients(
    model: BayesianNetwork,
    guide: SpikeGMMGuide,
    problem: Problem,
    steps: int,
    then: Callable[[], None] = lambda: None,
) -> None:
    """All data at every step; gates move after a tenth of the steps, and what is done then comes after a fifth."""
    svi = SVI(model, guide, NaturalGradient(guide, 0.5, 0.2, steps=steps, gates_from=steps // 10), SQSELBO())
    for step in range(steps):
        if step == steps // 5:
            then()
        svi.step(*problem.train)


def by_svi(model: Any, guide: Any, data: tuple[Tensor, ...], steps: int, loss: Any) -> None:
    """Adam, whose rate falls a hundredfold, with all data at every step."""
    pyro.clear_param_store()
    svi = SVI(model, guide, ClippedAdam({"lr": 0.01, "lrd": 0.01 ** (1 / steps)}), loss)
    for _ in range(steps):
        svi.step(*data)


#: From a problem and the options of the command line to what predicts.
METHODS: dict[str, Callable[[Problem, argparse.Namespace], Predictive]] = {
    "MAP": maximum_a_posteriori,
    "AutoNormal": auto_normal,
    "SpikeGMMGuide": spike_gmm,
    "GuideMixture": mixture_of_guides,
    "NUTS": nuts,
}


# ---- figures ----


def figures(problem: Problem, predictive: Predictive) -> dict[str, float]:
    x, y = problem.test
    with torch.no_grad():
        drawn = predictive(x)["logits"].reshape(-1, len(x)).double()  # [S, N]
    if problem.name == "sine":
        return of_function(x[:, 0], y, drawn)
    return of_classes(y, drawn) if problem.noise is None else of_numbers(y, drawn, problem.noise)


def of_numbers(y: Tensor, mean: Tensor, noise: float) -> dict[str, float]:
    mixture = torch.distributions.Normal(mean, noise)
    log_p = mixture.log_prob(y).logsumexp(0) - math.log(len(mean))
    rank = mixture.cdf(y).mean(0)  # of y among draws from the mixture, exactly
    inside = (rank > 0.05) & (rank < 0.95)
    return {"nll": -float(log_p.mean()), "coverage": float(inside.double().mean())}


def of_classes(y: Tensor, logits: Tensor) -> dict[str, float]:
    p = logits.sigmoid().mean(0)
    log_p = torch.distributions.Bernoulli(p).log_prob(y.double())
    return {"nll": -float(log_p.mean()), "accuracy": float(((p > 0.5) == (y > 0.5)).double().mean())}


def of_function(x: Tensor, y: Tensor, drawn: Tensor) -> dict[str, float]:
    mean, sd = drawn.mean(0), drawn.std(0, correction=0)
    place = x.abs()
    where = dict(zip(GAP, ((place >= 0.7) & (place <= 2.2), place < 0.7, place > 2.2), strict=True))
    covered = ((y - mean).abs() < 2 * sd)[where["within"]]
    return {"coverage": float(covered.double().mean())} | {
        f"sd_{name}": float(sd[chosen].mean()) for name, chosen in where.items()
    }


def measured(options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    for name in options.problems:
        make, splits = PROBLEMS[name]
        for split in splits:
            problem = make(split)
            for method in options.methods:
                torch.manual_seed(split)
                start = time.perf_counter()
                found = figures(problem, METHODS[method](problem, options))
                row = {"problem": name, "split": split, "method": method, **found}
                row |= {"noise": problem.noise, "seconds": round(time.perf_counter() - start, 1)}
                print(
                    "  ".join(f"{k} {v:.3f}" if isinstance(v, float) else f"{v}" for k, v in row.items()),
                    flush=True,
                )
                yield row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", maxsplit=1)[0])
    parser.add_argument("--problems", nargs="+", default=list(PROBLEMS), choices=PROBLEMS)
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=METHODS)
    parser.add_argument("--steps", type=int, default=5000, help="of SVI")
    parser.add_argument("--warmup", type=int, default=200, help="of NUTS")
    parser.add_argument("--draws", type=int, default=200)
    parser.add_argument("--out", type=Path, default=Path(__file__).with_suffix(".json"))
    options = parser.parse_args()
    pyro.enable_validation(False)
    rows = []
    for row in measured(options):  # written at once: whoever stops it keeps what there is
        rows.append({key: round(value, 4) if isinstance(value, float) else value for key, value in row.items()})
        write_figures(options.out, {"rows": rows})


if __name__ == "__main__":
    main()
