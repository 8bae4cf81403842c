"""How far the KL's bounds, and the paper's dominant value, are from the KL of a trained network.

Compresses a recipe's network as `sqs compress` does (the baseline is trained once and kept, the compression's last
checkpoint too, so that a second call only reports) and writes ``bounds.json`` beside this file and
``docs/images/bounds.png``.

    python benchmarks/bounds.py recipes/fashion_mnist_resnet20.yaml [--temperatures 0.05 1] [--dir runs/benchmarks]
"""

import argparse
from pathlib import Path

import torch
from figures import write_figures

from sqs_pyro import compress, elbo_report
from sqs_pyro.data import load_data
from sqs_pyro.reporting.bounds_plot import write_bounds_picture
from sqs_pyro.reporting.printed import print_report
from sqs_pyro.reporting.tables import bounds_tables
from sqs_pyro.reporting.terminal import progress_display
from sqs_pyro.runs import load_recipe
from sqs_pyro.runs.images import give_weights, untrained_network

EXAMPLES, SAMPLES, PARTICLES = 1024, 16, 8
PICTURE = Path(__file__).parents[1] / "docs" / "images" / "bounds.png"


def main() -> None:
    """Compress, report, write and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe", type=Path)
    parser.add_argument("--temperatures", type=float, nargs="+", default=[0.05, 0.2, 1.0, 3.0])
    parser.add_argument("--dir", type=Path, default=Path("runs/benchmarks"))
    parser.add_argument("--set", dest="changes", nargs="*", default=[], metavar="KEY=VALUE")
    args = parser.parse_args()
    recipe = load_recipe(args.recipe, args.changes)
    data = load_data(recipe.data, recipe.baseline.seed)
    net = untrained_network(recipe, data)
    with progress_display() as progress:
        give_weights(recipe, net, data, args.dir / "baselines", progress)
        data = load_data(recipe.data, recipe.seed)
        result = compress(
            net,
            data.train,
            recipe.compression,
            seed=recipe.seed,
            checkpoint=args.dir / f"{recipe.name}-bounds.pt",
            progress=lambda record: progress("compression", record.step, record.total_steps, record.stage),
        )
    x, y = (torch.cat(parts)[:EXAMPLES] for parts in zip(*_some(data.train), strict=True))
    torch.manual_seed(recipe.seed)
    report = elbo_report(
        result.model,
        result.guide,
        x,
        y,
        temperatures=args.temperatures,
        num_samples=SAMPLES,
        num_particles=PARTICLES,
    ).to_dict()
    report = {"recipe": args.recipe.name, "changes": args.changes, "num_examples": len(y), **report}
    write_figures(Path(__file__).with_suffix(".json"), report)
    write_bounds_picture(PICTURE, report)
    _print(report)


def _some(train: object) -> list[tuple[torch.Tensor, torch.Tensor]]:
    batches, count = [], 0
    for x, y in train:  # type: ignore[attr-defined]
        batches.append((x, y))
        count += len(y)
        if count >= EXAMPLES:
            break
    return batches


def _print(report: dict[str, object]) -> None:
    print_report(bounds_tables(report), width=160)


if __name__ == "__main__":
    main()
