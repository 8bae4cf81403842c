"""Would the differences of a finished study hold for other seeds *and* other test images?

Every packed file of the study is evaluated on the same test images, which gives losses d[s, i] of a variant less
those of the reference by seed and image. A paired t-test of seeds takes the images for given; here both are drawn
at random (two crossed effects, Satterthwaite's degrees of freedom f):

    Var(d̄) = V_s + V_i - V_r,   V_s = var_s(d̄[s]) / S,   V_i = var_i(d̄[i]) / N,   V_r = residual variance / SN,
    f = Var(d̄)² / (V_s² / (S - 1) + V_i² / (N - 1)).

    python benchmarks/paired_losses.py runs/priors [--references "spike + Normal" "no prior"]
"""

import argparse
from pathlib import Path
from typing import Any

import torch
from figures import write_figures
from scipy.stats import t as students_t
from torch import Tensor

from sqs_pyro import load
from sqs_pyro.data import load_data
from sqs_pyro.evaluation.classification import predict
from sqs_pyro.reporting.paired import holm, paired_difference
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


def crossed(d: Tensor) -> dict[str, Any]:
    """Mean, interval and p of differences ``[S, N]``."""
    seeds, images = d.shape
    mean, by_seed, by_image = d.mean(), d.mean(1), d.mean(0)
    residual = (d - by_seed[:, None] - by_image + mean).square().sum() / ((seeds - 1) * (images - 1))
    of_seeds, of_images = by_seed.var() / seeds, by_image.var() / images
    # What is left of sampling the variances may not make the sum smaller than one of its parts.
    variance = torch.maximum(
        of_seeds + of_images - residual / (seeds * images), torch.maximum(of_seeds, of_images)
    )
    freedom = float(variance**2 / (of_seeds**2 / (seeds - 1) + of_images**2 / (images - 1)))
    error = float(variance.sqrt())
    half = students_t.ppf(0.975, freedom) * error
    return {
        "mean": float(mean),
        "interval": [float(mean) - half, float(mean) + half],
        "p": 2 * float(students_t.sf(abs(float(mean)) / error, freedom)),
    }


def compared(found: dict[str, dict[str, Tensor]], reference: str) -> list[dict[str, Any]]:
    rows = []
    for variant in found:
        if variant != reference:
            row: dict[str, Any] = {"variant": variant, "reference": reference}
            for figure in ("nll", "accuracy"):
                ours, theirs = found[variant][figure], found[reference][figure]
                seeds = paired_difference(ours.mean(1).tolist(), theirs.mean(1).tolist())
                row[figure] = {"seeds": vars(seeds), "seeds and images": crossed(ours - theirs)}
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
