"""Greedy, posterior mean and Bayesian average of one compressed network, over temperatures and numbers of draws.

Temperatures (of gates and codes; of codes alone, with hard gates; of plain temperature scaling) are chosen
on the validation split, figures are those of the test split. A compression's checkpoint is kept in DIR, so that a
sweep needs no new training; ``--posterior runs/{seed}.pt`` takes state dicts "model", "guide" and "hard" of a
compression that was made elsewhere. Writes ``averaging_<name>.json`` and ``.png`` beside this file.

    python benchmarks/averaging.py recipes/digits.yaml [--seeds 0 1 2] [--dir runs/averaging] [--set KEY=VALUE]
"""

import argparse
import copy
import itertools
import math
import statistics
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from figures import write_figures
from sklearn.metrics import roc_auc_score
from torch import Tensor, nn

from sqs_pyro import BayesianNetwork, SpikeGMMGuide, compress, pack_ensemble, size_report
from sqs_pyro.data import Data, DataRecipe, ShiftedLoader, load_data, parse_shift
from sqs_pyro.data.shifts import Resized
from sqs_pyro.evaluation.averaging import AveragedNetwork, averaged_network, mean_network
from sqs_pyro.evaluation.calibration import fit_temperature
from sqs_pyro.evaluation.classification import predict, summarise
from sqs_pyro.kernels import packed_network
from sqs_pyro.runs import load_recipe
from sqs_pyro.runs.images import give_weights, untrained_network
from sqs_pyro.runs.recipe import RunRecipe

TEMPERATURES = (0.05, 0.1, 0.2, 0.35, 0.5, 0.7, 1.0, 2.0)
MODES = ("gates and codes", "codes")
SAMPLES = (1, 2, 5, 10, 20, 50)
HARD_GATES = 1e-3  # a gate temperature at which every gate is 0 or 1
SHIFTS = ("rotation:15", "rotation:45", "noise:0.5", "noise:1")
OTHER_DATA = {"digits": "fashion_mnist", "fashion_mnist": "digits"}


@dataclass(frozen=True)
class Limits:
    """What of the data is used where: `examples` for choices, curves and shifts, everything for final figures.

    And what is tried: `temperatures` of each of the `modes`; draws have the shipped network's statistics of batch
    norm, or their own, of `batch_norm_batches` minibatches, if that is not 0.
    """

    examples: int
    sweep_samples: int
    final_samples: int
    curve_samples: int
    temperatures: tuple[float, ...]
    modes: tuple[str, ...]
    batch_norm_batches: int


@dataclass(frozen=True)
class Posterior:
    """What of a compression is measured; names as in its result."""

    network: nn.Module
    hard: nn.Module
    model: BayesianNetwork
    guide: SpikeGMMGuide


def first(loader: Iterable[Any], examples: int) -> Iterator[tuple[Tensor, Tensor]]:
    """The first examples of a loader."""
    for x, y in loader:
        yield x[:examples], y[:examples]
        examples -= len(y)
        if examples <= 0:
            return


def compressed(recipe: RunRecipe, directory: Path, baselines: Path) -> tuple[Posterior, Data]:
    """The recipe's compression: out of its checkpoint, or made anew."""
    data = load_data(recipe.data, recipe.baseline.seed)
    net = untrained_network(recipe, data)
    give_weights(recipe, net, data, baselines, lambda *_: None)
    data = load_data(recipe.data, recipe.seed)
    checkpoint = directory / f"{recipe.name}-seed{recipe.seed}.pt"
    metadata = {"recipe": recipe.model_dump(mode="json")}
    result = compress(
        net, data.train, recipe.compression, seed=recipe.seed, checkpoint=checkpoint, metadata=metadata
    )
    return Posterior(result.network, result.hard, result.model, result.guide), data


def restored(recipe: RunRecipe, path: Path) -> tuple[Posterior, Data]:
    """The result of a compression whose state dicts somebody has kept."""
    data = load_data(recipe.data, recipe.seed)
    net, section = untrained_network(recipe, data), recipe.compression
    state = torch.load(path, map_location="cpu", weights_only=True)
    model = BayesianNetwork(copy.deepcopy(net), include=section.include, exclude=section.exclude)
    guide = SpikeGMMGuide(
        model, section.num_components, section.windows.build(), groups=section.groups, estimator="straight_through"
    )
    of_network = {name[4:]: value for name, value in state["model"].items() if name.startswith("net.")}
    model.net.load_state_dict(of_network)  # the prior's parameters are not needed for draws
    guide.load_state_dict(state["guide"])
    guide.resume("frozen", draws=0)
    net.load_state_dict(state["hard"])
    metadata = {"recipe": recipe.model_dump(mode="json")}
    packed = packed_network(net.eval(), guide.harden(), metadata=metadata)
    return Posterior(packed, net, model, guide), data


def figures(log_p: Tensor, y: Tensor) -> dict[str, float]:
    return asdict(summarise(log_p, y))


def temperatures_of(mode: str, temperature: float) -> dict[str, float | None]:
    return {"temperature": temperature, "gate_temperature": HARD_GATES if mode == "codes" else None}


def average_of(
    result: Posterior, data: Data, limits: Limits, samples: int, **temperatures: float | None
) -> AveragedNetwork:
    """The average of so many draws, with the shipped network's statistics of batch norm or with their own."""
    if not limits.batch_norm_batches:
        return averaged_network(result.hard, result.guide, samples, **temperatures)
    own = {"batch_norm_batches": limits.batch_norm_batches, "loader": data.train}
    return averaged_network(result.model.net, result.guide, samples, **own, **temperatures)  # type: ignore[arg-type]


def sweep(result: Posterior, data: Data, limits: Limits) -> list[dict[str, Any]]:
    """Average and mean at every temperature, on validation and test data."""
    rows = []
    for mode, temperature in itertools.product(limits.modes, limits.temperatures):
        chosen = temperatures_of(mode, temperature)
        predictors: dict[str, nn.Module] = {
            "average": average_of(result, data, limits, limits.sweep_samples, **chosen),
            "mean": mean_network(result.hard, result.guide, **chosen),
        }
        row: dict[str, Any] = {"mode": mode, "temperature": temperature}
        for name, predictor in predictors.items():
            for part in ("validation", "test"):
                row[f"{name}.{part}"] = figures(
                    *predict(predictor, list(first(getattr(data, part), limits.examples)))
                )
        rows.append(row)
        print(f"  {mode}, T = {temperature}: validation NLL {row['average.validation']['nll']:.4f}", flush=True)
    return rows


def best(rows: list[dict[str, Any]], predictor: str) -> dict[str, Any]:
    """The row of the smallest NLL on validation data."""
    return min(rows, key=lambda row: row[f"{predictor}.validation"]["nll"])


def curve(average: AveragedNetwork, loader: list[tuple[Tensor, Tensor]]) -> list[dict[str, Any]]:
    """The average over the first S draws, for each S: every draw is evaluated once."""
    total, rows = torch.tensor(-math.inf), []
    for s in range(average.num_draws):
        draw = {name.replace("/", "."): stacked[s] for name, stacked in average.named_buffers(recurse=False)}
        log_p, y = predict(AveragedNetwork(average.net, [draw]), loader)
        total = torch.logaddexp(total, log_p)
        if s + 1 in SAMPLES:
            rows.append({"samples": s + 1, **figures(total - math.log(s + 1), y)})
    return rows


def outside(data: Data, limits: Limits) -> dict[str, list[tuple[Tensor, Tensor]]]:
    """Inputs of none of the classes: another data set in the network's shape, and noise."""
    loaders = {"uniform": ShiftedLoader(data.test, parse_shift("uniform"))}
    if data.name in OTHER_DATA:
        other = load_data(DataRecipe(name=OTHER_DATA[data.name])).test
        loaders[OTHER_DATA[data.name]] = ShiftedLoader(other, Resized(data.input_shape))
    return {name: list(first(loader, limits.examples)) for name, loader in loaders.items()}


def entropy(log_p: Tensor) -> Tensor:
    return torch.special.entr(log_p.exp()).sum(-1)


def shifted_predictions(predictor: nn.Module, data: Data, limits: Limits) -> dict[str, tuple[Tensor, Tensor]]:
    """Log-probabilities and labels on test data, shifted test data, and inputs of none of the classes."""
    loaders = {
        shift: list(first(ShiftedLoader(data.test, parse_shift(shift)), limits.examples)) for shift in SHIFTS
    }
    loaders |= {"test": list(first(data.test, limits.examples))} | outside(data, limits)
    return {name: predict(predictor, loader) for name, loader in loaders.items()}


def scaled(log_p: Tensor, temperature: float) -> Tensor:
    return (log_p / temperature).log_softmax(-1)


def under_shift(predicted: dict[str, tuple[Tensor, Tensor]], temperature: float) -> dict[str, Any]:
    """Figures on shifted inputs, and how well entropy tells other inputs from the test data (AUROC)."""
    found: dict[str, Any] = {
        shift: figures(scaled(predicted[shift][0], temperature), predicted[shift][1]) for shift in SHIFTS
    }
    inside = entropy(scaled(predicted["test"][0], temperature))
    for name in predicted.keys() - {"test", *SHIFTS}:
        other = entropy(scaled(predicted[name][0], temperature))
        is_other = torch.cat([torch.zeros_like(inside), torch.ones_like(other)])
        found[f"auroc {name}"] = float(roc_auc_score(is_other, torch.cat([inside, other])))
    return found


def file_sizes(result: Posterior, temperatures: dict[str, float | None]) -> list[dict[str, int]]:
    """Bytes of one file of S draws, beside S files and the greedy network's."""
    rows = []
    for samples in (5, 20):
        torch.manual_seed(samples)
        ensemble = pack_ensemble(result, samples, **temperatures)  # type: ignore[arg-type]
        draws = [result.guide.draw(**temperatures) for _ in range(2)]  # type: ignore[arg-type]
        one = statistics.fmean(
            size_report(packed_network(result.hard, draw, metadata=result.network.packed_metadata)).total  # type: ignore[arg-type]
            for draw in draws
        )
        rows.append(
            {
                "samples": samples,
                "one_file": size_report(ensemble).total,
                "separate_files": round(samples * one),
                "greedy_file": size_report(result.network).total,
            }
        )
    return rows


def measure(result: Posterior, data: Data, limits: Limits) -> dict[str, Any]:
    """Everything of one seed."""
    validation, test = list(first(data.validation, limits.examples)), data.test
    rows = sweep(result, data, limits)
    at = {
        name: temperatures_of(best(rows, name)["mode"], best(rows, name)["temperature"])
        for name in ("average", "mean")
    }
    many = average_of(result, data, limits, max(limits.curve_samples, limits.final_samples), **at["average"])
    stacked = dict(many.named_buffers(recurse=False))
    draws = [{n.replace("/", "."): v[s] for n, v in stacked.items()} for s in range(limits.final_samples)]
    predictors: dict[str, nn.Module] = {
        "greedy": result.hard,
        "posterior mean": mean_network(result.hard, result.guide, **at["mean"]),
        "average": AveragedNetwork(many.net, draws),
    }
    found: dict[str, Any] = {}
    for name, predictor in predictors.items():
        (log_p, y), shifted = predict(predictor, test), shifted_predictions(predictor, data, limits)
        fitted = fit_temperature(*predict(predictor, validation))
        for label, scale in ((name, 1.0), (f"{name}, scaled", fitted)):
            found[label] = figures(scaled(log_p, scale), y) | {
                "scale": scale,
                "shifted": under_shift(shifted, scale),
            }
            print(f"  {label}: NLL {found[label]['nll']:.4f}", flush=True)
    return {
        "predictors": found,
        "chosen": {"average": best(rows, "average"), "mean": best(rows, "mean")},
        "temperatures": rows,
        "samples": curve(many, list(first(test, limits.examples))),
        "files": file_sizes(result, at["average"]),
    }


def picture(path: Path, title: str, seeds: list[dict[str, Any]]) -> None:
    """NLL and ECE over the temperature and over the number of draws, mean over seeds."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 6), layout="constrained")
    axes = figure.subplots(2, 2)
    modes = dict.fromkeys(row["mode"] for row in seeds[0]["temperatures"])
    temperatures = sorted({row["temperature"] for row in seeds[0]["temperatures"]})
    samples = [point["samples"] for point in seeds[0]["samples"]]
    for line, key in enumerate(("nll", "ece")):
        for mode, style in zip(modes, ("-", "--"), strict=False):
            for name, colour in (("average", "C0"), ("mean", "C1")):
                values = [
                    statistics.fmean(
                        row[f"{name}.test"][key]
                        for seed in seeds
                        for row in seed["temperatures"]
                        if (row["mode"], row["temperature"]) == (mode, temperature)
                    )
                    for temperature in temperatures
                ]
                axes[line, 0].plot(temperatures, values, style, color=colour, label=f"{name}, T of {mode}")
        curve_values = [statistics.fmean(seed["samples"][i][key] for seed in seeds) for i in range(len(samples))]
        axes[line, 1].plot(samples, curve_values, color="C0", label="average, T chosen on validation")
        for column in (0, 1):
            for name, colour in (("greedy", "k"), ("greedy, scaled", "C3")):
                level = statistics.fmean(seed["predictors"][name][key] for seed in seeds)
                axes[line, column].axhline(level, color=colour, linestyle=":", label=name)
            axes[line, column].set_xscale("log")
            axes[line, column].set_ylabel("NLL, nats" if key == "nll" else "ECE")
        greedy = statistics.fmean(seed["predictors"]["greedy"][key] for seed in seeds)
        axes[line, 0].set_ylim(0, 4 * greedy)
    axes[1, 0].set_xlabel("evaluation temperature T")
    axes[1, 1].set_xlabel("draws S")
    axes[0, 0].legend(fontsize=7)
    axes[0, 1].legend(fontsize=7)
    figure.suptitle(title)
    figure.savefig(path, dpi=110)


def table(seeds: list[dict[str, Any]]) -> None:
    print(f"{'':<24}{'accuracy':>10}{'NLL':>9}{'ECE':>8}{'Brier':>9}{'entropy':>9}")
    for name in seeds[0]["predictors"]:
        mean = {
            key: statistics.fmean(seed["predictors"][name][key] for seed in seeds)
            for key in ("accuracy", "nll", "ece", "brier", "entropy")
        }
        print(
            f"{name:<24}{mean['accuracy']:>10.2%}{mean['nll']:>9.4f}{mean['ece']:>8.2%}{mean['brier']:>9.4f}"
            f"{mean['entropy']:>9.3f}"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe", type=Path)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--dir", type=Path, default=Path("runs/averaging"))
    parser.add_argument("--baselines", type=Path)
    parser.add_argument("--posterior", metavar="PATTERN", help="state dicts to load; {seed} is filled in")
    parser.add_argument("--set", dest="changes", action="append", default=[], metavar="KEY=VALUE")
    parser.add_argument("--examples", type=int, default=2000, help="for choices, curves and shifts")
    parser.add_argument("--sweep-samples", type=int, default=8)
    parser.add_argument("--final-samples", type=int, default=20)
    parser.add_argument("--curve-samples", type=int, default=max(SAMPLES))
    parser.add_argument("--temperatures", type=float, nargs="+", default=TEMPERATURES)
    parser.add_argument("--modes", nargs="+", choices=MODES, default=MODES)
    parser.add_argument("--batch-norm-batches", type=int, default=0, help="0: the shipped network's statistics")
    args = parser.parse_args()
    limits = Limits(
        args.examples,
        args.sweep_samples,
        args.final_samples,
        args.curve_samples,
        tuple(args.temperatures),
        tuple(args.modes),
        args.batch_norm_batches,
    )
    seeds = []
    for seed in args.seeds:
        recipe = load_recipe(args.recipe, [*args.changes, f"seed={seed}"])
        print(f"{recipe.name}, seed {seed}", flush=True)
        if args.posterior is not None:
            result, data = restored(recipe, Path(args.posterior.format(seed=seed)))
        else:
            result, data = compressed(recipe, args.dir, args.baselines or args.dir / "baselines")
        torch.manual_seed(seed)
        seeds.append({"seed": seed, **measure(result, data, limits)})
        document = {"recipe": args.recipe.name, "changes": args.changes, "limits": asdict(limits), "seeds": seeds}
        target = Path(__file__).with_name(f"averaging_{recipe.name}.json")
        write_figures(target, document)
    picture(target.with_suffix(".png"), f"{recipe.name}, mean of {len(seeds)} seeds, test data", seeds)
    table(seeds)


if __name__ == "__main__":
    main()
