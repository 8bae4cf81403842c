"""What a step of SQS training costs beside a plain fine-tune step of the same network.

``inference`` is a step of SVI with the guide as it is by default: draws of q, the KL of all weights at every step,
natural gradients. ``dense``, ``coded`` and ``frozen`` are the steps of compression, straight-through.

Times are taken interleaved in one process (plain, inference, dense, ..., plain, ...); the ratio of medians is the
result. Peak memory is that of a process of its own for each variant. Writes ``step_cost.json`` beside this file.

    python benchmarks/step_cost.py [--batch-size 128] [--rounds 40] [--threads 2]
"""

import argparse
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from figures import write_figures
from pyro.infer import SVI
from torch.nn import functional as F

from sqs_pyro.compression.finetune.loop import Driver
from sqs_pyro.compression.finetune.recipe import CompressionRecipe
from sqs_pyro.inference import SQSELBO, NaturalGradient
from sqs_pyro.inference.guides.spike_gmm import SpikeGMMGuide
from sqs_pyro.models import BayesianNetwork
from sqs_pyro.networks.registry import build_network

VARIANTS = ("plain", "inference", "dense", "coded", "frozen")
STEPS_AN_EPOCH = 400  # of the schedule that a driver follows; a variant runs inside one stage of it


class Batches:
    """The same minibatch again and again: what is timed is the step, not the data."""

    def __init__(self, batch_size: int) -> None:
        generator = torch.Generator().manual_seed(0)
        self.x = torch.randn(batch_size, 1, 28, 28, generator=generator)
        self.y = torch.randint(10, (batch_size,), generator=generator)
        self.dataset = range(batch_size * STEPS_AN_EPOCH)

    def __len__(self) -> int:
        return STEPS_AN_EPOCH


def plain_step(batches: Batches) -> Callable[[], None]:
    """A fine-tune step with the optimiser the driver uses for weights."""
    net = build_network("resnet20", in_channels=1).train()
    recipe = CompressionRecipe()
    sgd = torch.optim.SGD(
        net.parameters(),
        lr=recipe.learning_rate,
        momentum=recipe.momentum,
        weight_decay=recipe.weight_decay,
        nesterov=True,
        fused=True,
    )

    def step() -> None:
        sgd.zero_grad(set_to_none=True)
        F.cross_entropy(net(batches.x), batches.y).backward()
        sgd.step()

    return step


def sqs_step(stage: str, batches: Batches, recipe: CompressionRecipe) -> Callable[[], None]:
    """The driver's step in the middle of a stage, everything included: schedule, masks, KL, optimisers."""
    model = BayesianNetwork(build_network("resnet20", in_channels=1), num_data=len(batches.dataset))
    guide = SpikeGMMGuide(
        model,
        recipe.num_components,
        temperature=recipe.temperature,
        refresh_every=recipe.refresh_every,
        stage="dense",
        estimator="straight_through",
    )
    driver = Driver(model, guide, recipe, batches)
    first = {"dense": driver.coding_step // 2, "coded": driver.coding_step, "frozen": driver.freeze_step}
    if stage == "frozen":
        guide.start_coding()
    driver.step = first[stage]

    def step() -> None:
        driver._train_step(batches.x, batches.y)

    return step


def inference_step(batches: Batches) -> Callable[[], None]:
    """A step of SVI on the ELBO of the posterior."""
    model = BayesianNetwork(build_network("resnet20", in_channels=1), num_data=len(batches.dataset))
    guide = SpikeGMMGuide(model)
    svi = SVI(model, guide, NaturalGradient(guide, 0.01, 0.001), loss=SQSELBO())

    def step() -> None:
        svi.step(batches.x, batches.y)

    return step


def make(variant: str, batches: Batches, recipe: CompressionRecipe) -> Callable[[], None]:
    """The step of a variant."""
    if variant in ("plain", "inference"):
        return {"plain": plain_step, "inference": inference_step}[variant](batches)
    return sqs_step(variant, batches, recipe)


def interleaved(batches: Batches, recipe: CompressionRecipe, rounds: int) -> dict[str, list[float]]:
    """Milliseconds of every step, by variant; the first rounds warm up and are left out."""
    steps = {variant: make(variant, batches, recipe) for variant in VARIANTS}
    times: dict[str, list[float]] = {variant: [] for variant in VARIANTS}
    for i in range(rounds + 3):
        for variant, step in steps.items():
            start = time.perf_counter()
            step()
            if i >= 3:
                times[variant].append(1e3 * (time.perf_counter() - start))
    return times


def peak_memory(variant: str, args: argparse.Namespace) -> float:
    """Peak resident memory of a process that runs a few steps of one variant, in MiB."""
    command = [sys.executable, __file__, "--peak-of", variant, "--batch-size", str(args.batch_size)]
    command += ["--components", str(args.components), "--kl-every", str(args.kl_every)]
    return float(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def main() -> None:
    """Measure and write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--components", type=int, default=16)
    parser.add_argument("--kl-every", type=int, default=CompressionRecipe().kl_every)
    parser.add_argument("--rounds", type=int, default=40)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--peak-of", choices=VARIANTS, help=argparse.SUPPRESS)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    recipe = CompressionRecipe(num_components=args.components, kl_every=args.kl_every)
    batches = Batches(args.batch_size)
    if args.peak_of:
        step = make(args.peak_of, batches, recipe)
        for _ in range(5):
            step()
        # Not getrusage: its high-water mark is inherited from the process that forked this one.
        high_water = re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())
        print(int(high_water.group(1)) / 1024 if high_water else float("nan"))
        return
    times = interleaved(batches, recipe, args.rounds)
    medians = {variant: statistics.median(values) for variant, values in times.items()}
    means = {variant: statistics.fmean(values) for variant, values in times.items()}
    peaks = {variant: peak_memory(variant, args) for variant in VARIANTS}
    result = {
        "network": "resnet20, 1x28x28",
        "batch_size": args.batch_size,
        "num_components": args.components,
        "kl_every": args.kl_every,
        "threads": args.threads,
        "torch": torch.__version__,
        "rounds": args.rounds,
        "variants": {
            variant: {
                "median_ms": round(medians[variant], 2),
                "ratio_of_medians": round(medians[variant] / medians["plain"], 3),
                "ratio_of_means": round(means[variant] / means["plain"], 3),
                "peak_memory_mib": round(peaks[variant], 1),
            }
            for variant in VARIANTS
        },
    }
    write_figures(Path(__file__).with_suffix(".json"), result)
    print(f"{'variant':<8} {'ms':>8} {'ratio':>7} {'of means':>9} {'peak MiB':>9}")
    for variant, row in result["variants"].items():  # type: ignore[attr-defined]
        print(
            f"{variant:<8} {row['median_ms']:>8.1f} {row['ratio_of_medians']:>7.2f} "
            f"{row['ratio_of_means']:>9.2f} {row['peak_memory_mib']:>9.0f}"
        )


if __name__ == "__main__":
    main()
