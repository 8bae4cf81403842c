"""What a file of ratio 32 is worth that is drawn from, beside what else fits into as many bytes.

ResNet-20 on Fashion-MNIST under the learned prior, as in recipes/fashion_mnist_rate_distortion.yaml: the packed
network as it is, scaled by a temperature, and the average of ten networks drawn by the file's widths; the same of
a network that was trained under its widths. Peers: Laplace's approximation of the packed network's last layer,
whose variances are counted as 16-bit numbers; dropout before it; and two networks of ratio 64, an ensemble in as
many bytes. Compression differs by seed, the fp32 network is one. Temperatures and rates of dropout are chosen on
validation data; AUROCs are of 2,000 test images turned or with noise, and of scikit-learn's digits.
``drawn_file.json`` beside this file, or ``--out``, keeps what it has of other seeds and kinds.

    python benchmarks/drawn_file.py [--seeds 0 1 2 3 4] [--kinds packed trained ensemble peers] [--root DIR]
        [--packed 'runs/study/runs/a-rate-a-layer-seed{seed}/packed.safetensors']
        [--precision float32] [--out FILE]
"""

import argparse
import copy
import json
import math
import statistics
import tempfile
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from figures import write_figures
from safetensors.torch import load_file
from torch import nn

from sqs_pyro import compress, load, save, size_report
from sqs_pyro.data import Data, DataRecipe, ShiftedLoader, load_data, parse_shift
from sqs_pyro.data.shifts import Resized
from sqs_pyro.evaluation.averaging import average_of_packed
from sqs_pyro.evaluation.calibration import TemperatureScaled, fit_temperature
from sqs_pyro.evaluation.classification import evaluate, predict
from sqs_pyro.evaluation.peers.dropout import MCDropout
from sqs_pyro.evaluation.peers.ensemble import deep_ensemble
from sqs_pyro.evaluation.peers.laplace import laplace
from sqs_pyro.evaluation.predictive.classes import evaluate_uncertainty
from sqs_pyro.kernels.placing import unpack_weights
from sqs_pyro.networks.registry import build_network
from sqs_pyro.reporting.paired import paired_difference

HERE = Path(__file__).parent
WEIGHTS = HERE.parent / "recipes/weights/fashion_mnist_resnet20.safetensors"
FIGURES = HERE / "drawn_file.json"
SHIFTS = ("rotation:45", "noise:0.5")
DRAWS, MINIBATCHES = 10, 16
DROPOUT = (0.05, 0.1, 0.2, 0.3, 0.5)
COMPRESSION = {
    "epochs": 4,
    "learning_rate": 0.05,
    "layout": "entropy",
    "num_components": 8,
    "prior": {"kind": "learned"},
    "allocation": "rate_distortion",
    "evaluate_every": 4,
}


def compressed(data: Data, seed: int, **options: Any) -> tuple[nn.Module, int]:
    """The packed network as loaded from its file, and the file's bytes."""
    net = build_network("resnet20", in_channels=1)
    net.load_state_dict(load_file(WEIGHTS))
    result = compress(net, data.train, {**COMPRESSION, **options}, seed=seed)
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / "packed.safetensors"
        save(result.network, path)
        return load(path, net), size_report(path).total


def scaled(net: nn.Module, data: Data) -> nn.Module:
    """At the temperature that suits half of the validation data, which is enough for one number."""
    return TemperatureScaled(net, fit_temperature(*predict(net, list(islice(data.validation, 20)))))


def peers(net: nn.Module, size: int, data: Data) -> Iterator[tuple[str, nn.Module, int]]:
    """What else a packed network's posterior could be, at no or few bytes: name, predictor and bytes."""
    plain = unpack_weights(copy.deepcopy(net), torch.float32).eval()
    of_last_layer = laplace(plain, data.train, DRAWS, structure="diag")
    variances = sum(parameter.numel() for parameter in plain.fc.parameters())
    yield "Laplace of the last layer", of_last_layer, size + 2 * variances
    validation = list(islice(data.validation, 20))
    masked = [dropped(plain, rate) for rate in DROPOUT]
    yield "dropout before the last layer", min(masked, key=lambda each: evaluate(each, validation).nll), size


def dropped(net: nn.Module, rate: float) -> MCDropout:
    """Draw the features that the last layer sees."""
    net = copy.deepcopy(net)
    net.fc = nn.Sequential(nn.Dropout(rate), net.fc)
    return MCDropout(net, DRAWS)


def fashion_mnist(root: str | None, seed: int) -> Data:
    """Its order follows the seed, and compression differs by nothing else."""
    return load_data(DataRecipe(name="fashion_mnist", batch_size=128, validation=5000, root=root), seed)


def predictors(
    kind: str, seed: int, root: str | None, packed: str | None, precision: str
) -> Iterator[tuple[str, nn.Module, int]]:
    """Name, predictor and bytes."""
    data = fashion_mnist(root, seed)
    options = {"precision": precision, "target_ratio": 64 if kind == "ensemble" else 32}
    if kind == "ensemble":
        seeds = [10 * seed + i for i in (1, 2)]
        made = [compressed(fashion_mnist(root, member), member, **options) for member in seeds]
        members, sizes = zip(*made, strict=True)
        yield "two files of ratio 64", deep_ensemble(lambda i: unpack_weights(members[i]), 2), sum(sizes)
        return
    estimator = "one_hot" if kind == "trained" else "straight_through"
    if packed is None:
        net, size = compressed(data, seed, estimator=estimator, **options)
    else:
        file = Path(packed.format(seed=seed))
        net, size = load(file), size_report(file).total
    if kind == "peers":
        yield from peers(net, size, data)
        return
    average = average_of_packed(net, DRAWS)
    name = "trained under widths" if kind == "trained" else "packed"
    yield name, net, size
    yield f"{name}, scaled", scaled(net, data), size
    yield f"{name}, average of {DRAWS}", average, size


def measure(kind: str, seed: int, root: str | None, packed: str | None, precision: str) -> dict[str, Any]:
    data = fashion_mnist(root, seed)
    digits = load_data(DataRecipe(name="digits")).test
    others = {text: list(islice(ShiftedLoader(data.test, parse_shift(text)), MINIBATCHES)) for text in SHIFTS}
    others["digits"] = list(ShiftedLoader(digits, Resized(data.input_shape)))
    found = {}
    for name, predictor, size in predictors(kind, seed, root, packed, precision):
        own = evaluate_uncertainty(predictor, data.test, others)
        found[name] = {**own.to_dict(), "bytes": size}
        print(f"  {name}: accuracy {own.figures.accuracy:.4f}, NLL {own.figures.nll:.4f}", flush=True)
    return found


def table(seeds: dict[str, dict[str, Any]]) -> None:
    names = dict.fromkeys(name for found in seeds.values() for name in found)
    print(f"| | seeds | accuracy, % | NLL | ECE, % | {' | '.join((*SHIFTS, 'digits'))} | bytes |")
    print("|---" * (6 + len(SHIFTS) + 1) + "|")
    for name in names:
        rows = [found[name] for found in seeds.values() if name in found]

        def mean(key: str, rows: list[dict[str, Any]] = rows) -> float:
            return statistics.fmean(row[key] for row in rows)

        found = [statistics.fmean(row["entropy_auroc"][key] for row in rows) for key in (*SHIFTS, "digits")]
        aurocs = " | ".join(f"{value:.3f}" for value in found)
        print(
            f"| {name} | {len(rows)} | {100 * mean('accuracy'):.2f} | {mean('nll'):.4f} | "
            f"{100 * mean('ece'):.2f} | {aurocs} | {round(mean('bytes')):,} |"
        )


def differences(seeds: dict[str, dict[str, Any]]) -> None:
    """What the average has more than its packed network, with 95 % intervals over seeds."""
    average = f"packed, average of {DRAWS}"
    pairs = [(found["packed"], found[average]) for found in seeds.values() if average in found]

    def of(figures: Callable[[dict[str, Any]], float]) -> str:
        greedy, averaged = ([figures(pair[i]) for pair in pairs] for i in (0, 1))
        found = paired_difference(averaged, greedy)
        low, high = found.interval or (math.nan, math.nan)
        return f"{found.mean:+.4f} ({low:+.4f} to {high:+.4f})"

    for key in ("accuracy", "nll", "ece"):
        print(key, of(lambda row, key=key: row[key]))
    for key in (*SHIFTS, "digits"):
        print("AUROC,", key, of(lambda row, key=key: row["entropy_auroc"][key]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    parser.add_argument(
        "--kinds", nargs="+", default=["packed"], choices=["packed", "trained", "ensemble", "peers"]
    )
    parser.add_argument("--root", help="where Fashion-MNIST is")
    parser.add_argument("--packed", help="files that were packed before, by {seed}: of kinds packed and peers")
    parser.add_argument("--precision", default="bfloat16", choices=["bfloat16", "float32"], help="of training")
    parser.add_argument("--out", type=Path, default=FIGURES)
    args = parser.parse_args()
    for seed in args.seeds:
        for kind in args.kinds:
            print(f"seed {seed}, {kind}", flush=True)
            found = measure(kind, seed, args.root, args.packed, args.precision)
            seeds = json.loads(args.out.read_text())["seeds"] if args.out.exists() else {}
            seeds[str(seed)] = seeds.get(str(seed), {}) | found
            write_figures(args.out, {"seeds": {key: seeds[key] for key in sorted(seeds)}})
    seeds = json.loads(args.out.read_text())["seeds"]
    table(seeds)
    differences(seeds)


if __name__ == "__main__":
    torch.set_num_threads(1)  # several of them side by side
    main()
