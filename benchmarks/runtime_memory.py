"""A language model at equal memory: what weights take where they are multiplied with, beside other methods.

SmolLM2-135M-Instruct, calibration and judges of language_model.py. ``runtime_bits`` bounds how many bits a code
of ours takes in memory; the file has as many ``bits`` as so few values can take. Memory is what codes, tables and
scales of the compressed layers take in the network that is loaded from its file; of the others codes, scales and
zero points as each keeps them. Embedding, head and, with ``--blocks``, other blocks stay as they are for all.

    python benchmarks/runtime_memory.py --foreign TEXT ... [--further TEXT ...] [--blocks 3 15 26]
        [--groups 192] [--methods sqs rtn gptq awq] [--packages DIRECTORY] [--autoround PYTHON] [--out FILE]

``--methods`` are those of blockwise compression, ours if left out, and others with each of the groups.
``PYTHON`` has AutoRound (autoround_weights.py says how); the rest is as in language_model.py. Writes
``runtime_memory.json`` beside this file, or ``--out``.
"""

import argparse
import math
from pathlib import Path
from typing import Any

from language_model import Table, changed_keys, others, ours
from other_methods import Method, autoround, compressed_layers, hqq, nf4, rounded
from torch import nn

from sqs_pyro import load
from sqs_pyro.kernels.runtime import runtime_weights
from sqs_pyro.networks.architectures import block_paths

#: Six in a hundred weights; an error in one of them is read by several heads of queries.
KEYS_AND_VALUES = ("*.k_proj", "*.v_proj")


def other_methods(args: argparse.Namespace, cache: Path) -> dict[str, Method]:
    """Return those of each width; groups divide 576 and 1536, in sizes at which memory is at least ours."""
    given = (args.autoround, cache)
    keys = {"packages": args.packages, "iterations": args.iterations, "blocks": args.blocks}
    found: dict[int, dict[str, Method]] = {
        2: {
            "round to nearest, 2 bits, groups of 32": rounded(2, 32),
            "AutoRound, 2 bits, groups of 32": autoround(*given, 2, 32, **keys),
        },
        3: {
            "round to nearest, 3 bits, groups of 64": rounded(3, 64),
            "AutoRound, 3 bits, groups of 64": autoround(*given, 3, 64, **keys),
        },
        4: {
            "NF4, bitsandbytes, blocks of 64": nf4(64),
            "NF4, scales quantised again": nf4(64, double=True),
            "round to nearest, 4 bits, groups of 192": rounded(4, 192),
            "HQQ, 4 bits, groups of 192": hqq(4, 192),
            "AutoRound, 4 bits, groups of 192": autoround(*given, 4, 192, **keys),
        },
    }
    return {name: method for bits in args.runtime_bits for name, method in found[bits].items()}


def recipes(args: argparse.Namespace, left: list[str]) -> dict[str, dict[str, Any]]:
    """Return each width for all layers not left alone, by each of the methods."""
    found: dict[str, dict[str, Any]] = {}
    skipped = {f"{path}.*": {"skip": True} for path in left}
    for bits in args.runtime_bits:
        for method in args.methods:
            if method == "sqs":
                found |= own_recipes(args, bits, skipped)
                continue
            rounding = {"method": method, "runtime_bits": bits, "layers": skipped}
            names = {f"{method}, {bits} bits, groups of {size}": size for size in args.groups}
            found |= {name: {**rounding, "group_size": size} for name, size in names.items()}
    return found


def own_recipes(args: argparse.Namespace, bits: int, skipped: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Return a width of ours: as it is, with groups, with more for keys and values."""
    keys = {"runtime_bits": bits, "bits": bits, **changed_keys(args.changes)}
    wider = {pattern: {"runtime_bits": bits + 1} for pattern in KEYS_AND_VALUES}
    found = {f"runtime_bits {bits}": {**keys, "layers": skipped}}
    for size in args.groups:
        grouped = {**keys, "bits": bits + 16 / size, "group_size": size, "layers": skipped}
        found[f"runtime_bits {bits}, groups of {size}"] = grouped
    found[f"runtime_bits {bits}, keys and values {bits + 1}"] = {**keys, "layers": wider | skipped}
    return found


def memory_bits(path: Path, net: nn.Module) -> float:
    """Return bits a weight that compressed layers take in memory, everything beside the codes included."""
    found = runtime_weights(load(path, net))
    if any(weight.decoded_bytes for weight in found):
        raise SystemExit("Weights are decoded here, as there are no compiled kernels: install a C++ compiler.")
    return 8 * sum(weight.packed_bytes for weight in found) / sum(math.prod(weight.shape) for weight in found)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--packages", type=Path)
    parser.add_argument("--foreign", type=Path, nargs="+", required=True)
    parser.add_argument("--further", nargs="*", default=[])
    parser.add_argument("--autoround", type=Path, metavar="PYTHON", help="of an environment with auto-round")
    parser.add_argument("--iterations", type=int, default=200, help="of AutoRound on each block")
    parser.add_argument("--runtime-bits", type=int, nargs="*", default=[4, 3], choices=[2, 3, 4])
    parser.add_argument("--methods", nargs="*", default=["sqs"], choices=["sqs", "rtn", "gptq", "awq"])
    parser.add_argument("--groups", type=int, nargs="*", default=[], help="inputs that share a scale, of ours")
    parser.add_argument("--blocks", type=int, nargs="*", default=[], help="which; all if left out")
    parser.add_argument("--tokens", type=int, default=16384)
    parser.add_argument("--sequences", type=int, default=250)
    parser.add_argument("--set", dest="changes", action="append", default=[], metavar="KEY=VALUE")
    parser.add_argument("--dir", type=Path, default=Path("runs/language_model"))
    parser.add_argument("--out", type=Path, default=Path(__file__).with_suffix(".json"))
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    table = Table.begun(args)
    net = table.net
    table.about.update(blocks=args.blocks or "all", autoround_iterations=args.iterations)
    left = [path for i, path in enumerate(block_paths(net)) if args.blocks and i not in args.blocks]
    layers = {
        name: layer
        for name, layer in compressed_layers(net).items()
        if not name.startswith(tuple(f"{path}." for path in left))
    }
    for row in others(net, layers, table.judges, other_methods(args, table.cache)):
        table.add(row if "missing" in row else {**row, "memory_bits": row["bits"]})
    for name, keys in recipes(args, left).items():
        place = "-".join([name, *map(str, args.blocks)])
        row = ours(net, table.sequences, keys, table.judges, args.dir, place)
        memory = memory_bits(args.dir / f"{place}.safetensors", net)
        table.add({**row, "method": f"blockwise, {name}", "recipe": keys, "memory_bits": memory})


if __name__ == "__main__":
    main()
