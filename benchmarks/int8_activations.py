"""What 8-bit integers instead of bfloat16 in products would cost a packed language model.

SmolLM2-135M-Instruct, a packed file of it, perplexity as in language_model.py. Inputs of every packed linear layer
are rounded to 255 levels of each token's own range, then codewords to 255 levels of each layer's, too: what
instructions for 8-bit products would compute, at twice the speed of bfloat16. Rounded numbers are multiplied in
float32.

    python benchmarks/int8_activations.py --packed FILE --foreign TEXT [--packages DIRECTORY] [--tokens 20480]

Writes ``int8_activations.json`` beside this file.
"""

import argparse
from pathlib import Path
from typing import Any

import torch
from figures import write_figures
from language_model import judged, texts
from packaged_weights import language_model
from torch import Tensor, nn

from sqs_pyro import load, size_report
from sqs_pyro.kernels.modules import PackedLinear

LEVELS = 127


def rounded(values: Tensor, largest: Tensor) -> Tensor:
    step = largest.clamp_min(1e-30) / LEVELS
    return (values / step).round() * step


def round_input(module: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return (rounded(inputs[0], inputs[0].abs().amax(-1, keepdim=True)),)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--packed", type=Path, required=True)
    parser.add_argument("--foreign", type=Path, required=True)
    parser.add_argument("--packages", type=Path)
    parser.add_argument("--tokens", type=int, default=20480)
    args = parser.parse_args()
    net, tokenizer = language_model(args.packages)
    judges = texts(tokenizer, [args.foreign], args.tokens)
    packed = load(args.packed, net)
    layers = [module for module in packed.modules() if isinstance(module, PackedLinear)]
    document: dict[str, Any] = {"bits": size_report(args.packed).bits_per_weight}
    document["as it is"] = judged(packed, judges)
    for layer in layers:
        layer.register_forward_pre_hook(round_input)
    document["inputs in 8 bits"] = judged(packed, judges)
    for layer in layers:
        table = layer.packed_weight.table.view(torch.float32)
        layer.packed_weight.table = rounded(table, table.abs().max()).view(torch.uint8)
    document["inputs and codewords in 8 bits"] = judged(packed, judges)
    print(document)
    write_figures(Path(__file__).with_suffix(".json"), document)


if __name__ == "__main__":
    main()
