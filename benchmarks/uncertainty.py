"""What peers' uncertainty is worth on one network and one data set: every row by the same function.

A small convolutional network with dropout on scikit-learn's digits: as trained, scaled by a temperature, and by
the peers of sqs_pyro.evaluation.peers; then compressed, as one packed network and as the average of its
posterior's draws. Temperatures are chosen on validation data, figures are of the test data, AUROCs of the
predictive entropy against shifted test images. Writes ``uncertainty_digits.json`` beside this file.

    python benchmarks/uncertainty.py [--seeds 0 1 2] [--epochs 20] [--samples 20]
"""

import argparse
import statistics
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from figures import write_figures
from torch import nn

from sqs_pyro import compress, size_report
from sqs_pyro.compression.baseline import BaselineRecipe, train_baseline
from sqs_pyro.data import Data, DataRecipe, ShiftedLoader, load_data, parse_shift
from sqs_pyro.evaluation.averaging import averaged_network, choose_temperature
from sqs_pyro.evaluation.calibration import TemperatureScaled, fit_temperature
from sqs_pyro.evaluation.classification import predict
from sqs_pyro.evaluation.peers.auto_normal import auto_normal
from sqs_pyro.evaluation.peers.dropout import MCDropout
from sqs_pyro.evaluation.peers.ensemble import deep_ensemble
from sqs_pyro.evaluation.peers.laplace import laplace
from sqs_pyro.evaluation.peers.swag import swag
from sqs_pyro.evaluation.predictive.classes import evaluate_uncertainty
from sqs_pyro.networks.digits import DigitsNet

SHIFTS = ("rotation:45", "noise:1", "uniform")
MEMBERS = 5
WIDTH = 16
COMPRESSION = {"epochs": 10, "num_components": 4, "nonzero_rate": 0.25}


def trained(seed: int, epochs: int) -> nn.Module:
    """The network of one seed: its first weights, its order of data."""
    torch.manual_seed(seed)
    net = DigitsNet(width=WIDTH)
    net.fc = nn.Sequential(nn.Dropout(0.2), net.fc)
    data = load_data(DataRecipe(name="digits", batch_size=64, validation=300), seed)
    train_baseline(net, data.train, None, BaselineRecipe(epochs=epochs, seed=seed))
    return net.eval()


def scaled(net: nn.Module, data: Data) -> nn.Module:
    return TemperatureScaled(net, fit_temperature(*predict(net, data.validation)))


def fp32_bytes(net: nn.Module) -> int:
    return sum(4 * tensor.numel() for tensor in net.state_dict().values() if tensor.is_floating_point())


def predictors(seed: int, epochs: int, samples: int, data: Data) -> Iterator[tuple[str, nn.Module, int | None]]:
    """Name, predictor, and bytes of what it has to keep (None: not known)."""
    net = trained(seed, epochs)
    one = fp32_bytes(net)
    yield "MAP", net, one
    yield "MAP, scaled", scaled(net, data), one
    yield "MC dropout", MCDropout(net, samples), one
    members = deep_ensemble(lambda number: trained(100 * seed + number, epochs), MEMBERS)
    yield f"deep ensemble of {MEMBERS}", members, MEMBERS * one
    yield "SWAG", swag(net, data.train, samples, epochs=10, learning_rate=0.03, seed=seed), samples * one
    if find_spec("laplace") is not None:
        yield "Laplace, last layer", laplace(net, data.train, samples, seed=seed), None
    normal = auto_normal(net, data.train, samples, epochs=epochs, seed=seed)
    yield "AutoNormal", normal, 2 * one
    result = compress(net, data.train, COMPRESSION, seed=seed)
    packed = size_report(result.network).total
    yield "packed", result.network, packed
    yield "packed, scaled", scaled(result.network, data), packed
    temperature = choose_temperature(result.hard, result.guide, data.validation, (0.1, 0.5, 1.0))
    yield "packed, average", averaged_network(result.hard, result.guide, samples, temperature=temperature), None


def measure(seed: int, epochs: int, samples: int) -> dict[str, Any]:
    data = load_data(DataRecipe(name="digits", batch_size=64, validation=300), seed)
    others = {text: ShiftedLoader(data.test, parse_shift(text)) for text in SHIFTS}
    found: dict[str, Any] = {}
    for name, predictor, size in predictors(seed, epochs, samples, data):
        own = evaluate_uncertainty(predictor, data.test, others)
        found[name] = {**own.to_dict(), "bytes": size}
        print(f"  {name}: NLL {own.figures.nll:.4f}", flush=True)
    return {"seed": seed, "predictors": found}


def table(seeds: list[dict[str, Any]]) -> None:
    print(
        f"| | accuracy, % | NLL | ECE, % | Brier | AURC, % | {' | '.join(f'AUROC, {s}' for s in SHIFTS)} | bytes |"
    )
    print("|---" * (7 + len(SHIFTS)) + "|")
    for name in seeds[0]["predictors"]:
        rows = [seed["predictors"][name] for seed in seeds]
        mean = {key: statistics.fmean(row[key] for row in rows) for key in ("accuracy", "nll", "ece", "brier")}
        area = statistics.fmean(row["risk_coverage_area"] for row in rows)
        aurocs = [statistics.fmean(row["entropy_auroc"][shift] for row in rows) for shift in SHIFTS]
        sizes = [row["bytes"] for row in rows]
        size = "" if None in sizes else f"{round(statistics.fmean(sizes)):,}"
        print(
            f"| {name} | {100 * mean['accuracy']:.2f} | {mean['nll']:.4f} | {100 * mean['ece']:.2f} | "
            f"{mean['brier']:.4f} | {100 * area:.3f} | {' | '.join(f'{a:.3f}' for a in aurocs)} | {size} |"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("--samples", type=int, default=20)
    args = parser.parse_args()
    seeds = []
    for seed in args.seeds:
        print(f"seed {seed}", flush=True)
        seeds.append(measure(seed, args.epochs, args.samples))
    write_figures(Path(__file__).with_name("uncertainty_digits.json"), {"seeds": seeds})
    table(seeds)


if __name__ == "__main__":
    main()
