"""Run a recipe with several seeds and sum up what was measured on the packed files.

The baseline is trained once and kept; every run is a directory `DIR/<name>-seed<N>`, and a finished one is
not run again. Writes ``<name>.json`` beside this file, with every seed's figures and their means, and prints the
table.

    python benchmarks/seeds.py recipes/fashion_mnist_resnet20.yaml [--seeds 0 1 2] [--dir runs/benchmarks]
"""

import argparse
import json
import statistics
from pathlib import Path
from typing import Any

from sqs_pyro.reporting.terminal import progress_display
from sqs_pyro.runs import load_recipe, run

FIGURES = {
    "baseline.accuracy": "{:.2%}",
    "compressed.accuracy": "{:.2%}",
    "accuracy_drop": "{:.2%}",
    "compressed.nll": "{:.4f}",
    "compressed.ece": "{:.2%}",
    "size.file_bytes": "{:,.0f}",
    "size.ratio": "{:.2f}",
    "size.bits_per_weight": "{:.3f}",
    "nonzero_rate": "{:.4f}",
    "seconds": "{:.0f}",
}


def figure(metrics: dict[str, Any], key: str) -> float:
    """A number of ``metrics.json`` by its dotted key."""
    value: Any = metrics
    for part in key.split("."):
        value = value[part]
    return float(value)


def metrics_of(recipe: Path, seed: int, directory: Path) -> dict[str, Any]:
    """The metrics of one seed's run, which is made if it is not there."""
    name = load_recipe(recipe).name
    out = directory / f"{name}-seed{seed}"
    finished = out / "metrics.json"
    if finished.exists():
        return json.loads(finished.read_text())
    with progress_display() as progress:
        changed = load_recipe(recipe, [f"seed={seed}"])
        return run(changed, out, baselines_dir=directory / "baselines", progress=progress)


def main() -> None:
    """Run, sum up, write and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe", type=Path)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--dir", type=Path, default=Path("runs/benchmarks"))
    args = parser.parse_args()
    recipe = load_recipe(args.recipe)
    by_seed = {seed: metrics_of(args.recipe, seed, args.dir) for seed in args.seeds}
    columns = {key: [figure(metrics, key) for metrics in by_seed.values()] for key in FIGURES}
    result = {
        "recipe": args.recipe.name,
        "seeds": args.seeds,
        "versions": next(iter(by_seed.values()))["versions"],
        "mean": {key: statistics.fmean(values) for key, values in columns.items()},
        "by_seed": columns,
    }
    target = Path(__file__).with_name(f"{recipe.name}.json")
    target.write_text(json.dumps(result, indent=2) + "\n")
    print(f"{'':<22}" + "".join(f"{f'seed {seed}':>12}" for seed in args.seeds) + f"{'mean':>12}")
    for key, form in FIGURES.items():
        cells = [*columns[key], result["mean"][key]]  # type: ignore[index]
        print(f"{key:<22}" + "".join(f"{form.format(cell):>12}" for cell in cells))


if __name__ == "__main__":
    main()
