"""Draws of a posterior: Pyro's Predictive, one ``functional_call`` after the other, and ``vmap``, interleaved.

Processor time of a minibatch through S drawn networks, relative to the loop; one thread. Writes ``draws.json``.

    python benchmarks/draws.py [--repeats 3]
"""

import argparse
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import pyro
import torch
from figures import write_figures
from torch import Tensor

from sqs_pyro import BayesianNetwork, SpikeGMMGuide
from sqs_pyro.evaluation.averaging import averaged_network
from sqs_pyro.networks.registry import build_network

CASES = (
    ("digits_net", {}, (1, 8, 8), 50),
    ("digits_net", {}, (1, 8, 8), 500),
    ("resnet20", {"in_channels": 1}, (1, 28, 28), 50),
)
SAMPLES = 10


def predictive(model: BayesianNetwork, guide: SpikeGMMGuide, x: Tensor) -> Tensor:
    """The average as Pyro makes it: the model traced once a draw."""
    with pyro.get_param_store().scope():
        draws = pyro.infer.Predictive(guide, num_samples=SAMPLES, return_sites=None)()
        logits = pyro.infer.Predictive(model, posterior_samples=draws, return_sites=("logits",))(x)["logits"]
    return logits.log_softmax(-1).logsumexp(0)


def seconds(work: Callable[[], object]) -> float:
    start = time.process_time()
    work()
    return time.process_time() - start


@torch.no_grad()
def measure(name: str, options: dict, shape: tuple[int, ...], batch: int, repeats: int) -> dict[str, float]:
    net = build_network(name, **options).eval()
    model = BayesianNetwork(net, num_data=batch).eval()
    guide = SpikeGMMGuide(model, 4, evaluation_temperature=1.0, estimator="straight_through").eval()
    x = torch.randn(batch, *shape)
    ways: dict[str, Callable[[], object]] = {"Predictive": lambda: predictive(model, guide, x)}
    for at_once in (1, 2, 5, 10):
        average = averaged_network(net, guide, SAMPLES, draws_at_once=at_once)
        ways["loop" if at_once == 1 else f"vmap {at_once}"] = lambda average=average: average(x)  # type: ignore[misc]
    spent: dict[str, list[float]] = {way: [] for way in ways}
    for _ in range(repeats + 1):
        for way, work in ways.items():
            spent[way].append(seconds(work))
    loop = statistics.median(spent["loop"][1:])
    return {way: statistics.median(values[1:]) / loop for way, values in spent.items()} | {"loop seconds": loop}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=3)
    args = parser.parse_args()
    torch.set_num_threads(1)
    found = {}
    for name, options, shape, batch in CASES:
        row = measure(name, options, shape, batch, args.repeats)
        found[f"{name}, batch {batch}"] = row
        print(
            f"{name}, batch {batch}: " + ", ".join(f"{way} {value:.2f}" for way, value in row.items()), flush=True
        )
    document = {"samples": SAMPLES, "torch": torch.__version__, "relative processor time": found}
    write_figures(Path(__file__).with_suffix(".json"), document)


if __name__ == "__main__":
    main()
