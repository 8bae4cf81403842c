"""Symbols of the same weights under three coders: frequencies, mixed contexts, and DeepCABAC of ISO/IEC 15938-17.

For every packed file: the bytes of the streams (and tables) of layouts ``entropy`` and ``adaptive`` without
codebooks, scales and manifest; and of nncodec's stream of the same whole numbers (sign and rank of each weight's
codeword, 0 a zero), headers included, the best of its scan orders. nncodec has been decoded to the same numbers.

    python benchmarks/standard_coder.py --nncodec NNC/bin/python NAME=PACKED.safetensors ...

A NAME may end in ``:PREFIX``, then only tensors whose names begin so. nncodec wants an older NumPy than this
project, so it runs in an environment of its own: ``python -m venv NNC && NNC/bin/pip install nncodec``. Writes
``standard_coder.json`` beside this file.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

SCAN_ORDERS = range(4)


def nncodec_bytes(arrays: dict[str, np.ndarray]) -> dict[str, Any]:
    """Return the bytes of nncodec's smallest stream of whole numbers; runs in nncodec's own environment."""
    from nncodec import nnc

    sizes, seconds = {}, 0.0
    with tempfile.TemporaryDirectory() as directory:
        for order in SCAN_ORDERS:
            stream = nnc.compress(
                arrays,
                bitstream_path=f"{directory}/stream.nnc",
                use_dq=False,
                scan_order=order,
                return_bitstream=True,
            )
            began = time.process_time()
            decoded = nnc.decompress(stream)
            seconds = time.process_time() - began
            assert all(np.array_equal(decoded[name], value) for name, value in arrays.items())
            sizes[order] = len(stream)
    best = min(sizes, key=lambda order: sizes[order])
    weights = sum(value.size for value in arrays.values())
    return {"bytes": sizes[best], "scan_order": best, "decoded_per_second": weights / seconds}


def measured(coded: dict[str, Any], layout: str) -> dict[str, Any]:
    """Return the bytes that a layout's streams and tables take, and how fast they are read."""
    from sqs_pyro.packing import pack_tensor

    packed = {name: pack_tensor(value, layout) for name, value in coded.items()}
    began = time.process_time()
    unpacked = {name: value.unpack() for name, value in packed.items()}
    seconds = time.process_time() - began
    assert all(bool((unpacked[name].dense() == value.dense()).all()) for name, value in coded.items())
    parts = [item for value in packed.values() for item in value.parts.items()]
    size = sum(part.numel() for name, part in parts if name not in ("codebook", "scales"))
    return {"bytes": size, "decoded_per_second": sum(value.numel for value in packed.values()) / seconds}


def whole_numbers(coded: Any) -> np.ndarray:
    """Return sign and rank of each weight's codeword, int32 of the weight's shape."""
    from sqs_pyro.packing.mixing import Values

    values = Values.of(coded.codebook.numpy())
    groups = np.arange(coded.codes.numel()) // (coded.codes.numel() // coded.num_groups)
    place = values.place[groups, coded.codes.reshape(-1).numpy()]
    numbers = np.where(place % 2, -1, 1) * (place // 2 + 1) * coded.mask.reshape(-1).numpy()
    return numbers.astype(np.int32).reshape(coded.shape)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="+", metavar="NAME=FILE")
    parser.add_argument("--nncodec", required=True)
    parser.add_argument("--out", type=Path, default=Path(__file__).with_suffix(".json"))
    args = parser.parse_args()
    import torch
    from figures import write_figures

    from sqs_pyro.packing import canonical, read_packed

    torch.set_num_threads(1)
    rows = []
    for each in args.files:
        title, _, path = each.partition("=")
        title, _, prefix = title.partition(":")
        tensors = read_packed(path).tensors.items()
        coded = {name: canonical(value.unpack()) for name, value in tensors if name.startswith(prefix)}
        weights = sum(value.codes.numel() for value in coded.values())
        row: dict[str, Any] = {"weights": title, "number": weights}
        row |= {layout: measured(coded, layout) for layout in ("entropy", "adaptive")}
        with tempfile.TemporaryDirectory() as directory:
            np.savez(f"{directory}/numbers.npz", **{name: whole_numbers(value) for name, value in coded.items()})
            command = [args.nncodec, __file__, f"{directory}/numbers.npz"]
            said = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        row["nncodec"] = json.loads(said.splitlines()[-1])
        rows.append(row)
        sizes = {name: row[name]["bytes"] for name in ("entropy", "nncodec", "adaptive")}
        shares = {name: f"{size:,} ({size / sizes['entropy'] - 1:+.1%})" for name, size in sizes.items()}
        print(f"{title:<40}{weights:>12,}  {shares}", flush=True)
        write_figures(args.out, {"rows": rows})


if __name__ == "__main__":
    if len(sys.argv) == 2 and sys.argv[1].endswith(".npz"):
        with np.load(sys.argv[1]) as numbers:
            print(json.dumps(nncodec_bytes({name: numbers[name] for name in numbers})))
    else:
        main()
