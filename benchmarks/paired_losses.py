"""Would the differences of a finished study hold for other seeds *and* other test images?

Every packed file of the study is evaluated on the same test images, which gives losses of a variant less those of
the reference by seed and image. A paired t-test of seeds takes the images for given; here both are drawn at random
(:func:`sqs_pyro.reporting.paired.crossed_difference`).

    python benchmarks/paired_losses.py runs/priors [--references "spike + Normal" "no prior"]
"""

import argparse
from pathlib import Path
from typing import Any

import torch
from figures import write_figures
from torch import Tensor

from sqs_pyro import load
from sqs_pyro.data import load_data
from sqs_pyro.evaluation.classification import predict
from sqs_pyro.reporting.paired import crossed_difference, holm, paired_difference
from sqs_pyro.studies.recipe import Cell, cells, load_study


def losses(cell: Cell, study: Path) -> dict[str, Tensor]:
    """NLL ``[N]``, and whether the most probable class is right ``[N]``, of a packed file's test images."""
    log_p, y = predict(
        load(study / "runs" / cell.directory / "packed.safetensors"), load_data(cell.recipe.data).test
    )
    return {
        "nll": -log_p.double().gather(1, y[:, None])[:, 0],
        "accuracy": (log_p.argmax(1) == y).double(),
    }


def compared(found: dict[str, dict[str, Tensor]], reference: str) -> list[dict[str, Any]]:
    rows = []
    for variant in found:
        if variant != reference:
            row: dict[str, Any] = {"variant": variant, "reference": reference}
            for figure in ("nll", "accuracy"):
                ours, theirs = found[variant][figure], found[reference][figure]
                seeds = paired_difference(ours.mean(1).tolist(), theirs.mean(1).tolist())
                both = crossed_difference(ours.numpy(), theirs.numpy())
                row[figure] = {"seeds": vars(seeds), "seeds and images": vars(both)}
            rows.append(row)
    for figure in ("nll", "accuracy"):
        for chance in ("seeds", "seeds and images"):
            adjusted = holm([row[figure][chance]["p"] for row in rows])
            for row, p in zip(rows, adjusted, strict=True):
                row[figure][chance] = row[figure][chance] | {"p_holm": p}
    return rows


def table(rows: list[dict[str, Any]]) -> None:
    for row in rows:
        shown = [f"{row['variant']} - {row['reference']}"]
        for figure in ("nll", "accuracy"):
            for chance, found in row[figure].items():
                low, high = found["interval"]
                stars = "*" * sum(found[p] < 0.05 for p in ("p", "p_holm"))
                shown.append(f"{figure} by {chance} {found['mean']:+.4f}±{(high - low) / 2:.4f}{stars}")
        print("  ".join(shown), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("study", type=Path, help="directory of a finished study of classifiers")
    parser.add_argument("--references", nargs="+", default=["spike + Normal", "no prior"])
    parser.add_argument("--out", type=Path, default=Path(__file__).with_suffix(".json"))
    args = parser.parse_args()
    by_seed: dict[str, list[dict[str, Tensor]]] = {}
    for cell in cells(load_study(args.study / "study.yaml")):
        by_seed.setdefault(cell.variant, []).append(losses(cell, args.study))
    found = {
        variant: {figure: torch.stack([seed[figure] for seed in seeds]) for figure in seeds[0]}  # [S, N]
        for variant, seeds in by_seed.items()
    }
    rows = [row for reference in args.references for row in compared(found, reference)]
    seeds, images = next(iter(found.values()))["nll"].shape
    write_figures(args.out, {"seeds": seeds, "images": images, "rows": rows})
    table(rows)


if __name__ == "__main__":
    main()
