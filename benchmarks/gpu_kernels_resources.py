"""What the GPU kernels take of a GPU, by compiling them ahead of time: no GPU takes part, no time is measured.

A line for each kernel, architecture and width of codes: registers of a thread, bytes of shared memory of a block,
spilled bytes, bytes of the cubin, and for Triton's kernels machine instructions. The weight is 4096 x 4096, x is
bfloat16, of as many rows as stated. Writes ``benchmarks/gpu_kernels_resources.json``::

    python benchmarks/gpu_kernels_resources.py
"""

import itertools
import re
import subprocess
from pathlib import Path
from typing import Any

import torch
import triton
from figures import write_figures

from sqs_pyro.kernels.gpu import cuda
from sqs_pyro.kernels.gpu.resources import SHARED_LIMIT, blank, compiled_cuda, compiled_triton, launches

SHAPE = 4096, 4096
PLAIN = [("dense", bits, 1) for bits in range(1, 9)]
GROUPED = [("dense", 4, SHAPE[0]), ("dense", 4, SHAPE[0] * SHAPE[1] // 128)]  # of outputs, of 128 weights
WEIGHTS = [*PLAIN, *GROUPED, ("bitmap", 8, 1)]


def main() -> None:
    rows = []
    for architecture, (form, bits, groups), count in itertools.product(SHARED_LIMIT, WEIGHTS, (1, 16, 64, 128)):
        for launch in launches(blank(SHAPE, bits, form, groups), count, torch.bfloat16):
            name = launch.kernel.__name__
            if name == "finish" and (form, bits, groups, count) != ("dense", 4, 1, 1):
                continue  # it is always the same
            what = {
                "architecture": f"sm_{architecture}",
                "form": form,
                "bits": bits,
                "tables": groups,
                "rows": count,
            }
            rows.append({"kernel": name, **what, **compiled_triton(launch, architecture)})
            print(rows[-1], flush=True)
    compiler = subprocess.run(
        [cuda.nvcc_command("90")[0], "--version"], capture_output=True, text=True, check=True
    ).stdout
    for architecture in ("80", "90a", "100"):
        for name, found in compiled_cuda(architecture).items():
            rows.append({"kernel": f"dense.cu: {name}", "architecture": f"sm_{architecture}", **found})
    release = re.search(r"release (\S+),", compiler)
    made = {"triton": triton.__version__, "nvcc": release.group(1) if release else compiler.strip()}
    write_figures(Path(__file__).with_suffix(".json"), {"compilers": made, "rows": rows})
    print("\n".join(table(rows)))


def table(rows: list[dict[str, Any]]) -> list[str]:
    """The lines of docs/gpu.md's table: sm_90, one codebook, 1 and 16 and 64 rows."""
    lines = [
        "| kernel | bits | rows of x | registers of a thread | shared memory of a block |",
        "|---|---|---|---|---|",
    ]
    for row in rows:
        registers, shared = row["registers"], f"{row['shared_bytes'] / 1024:.1f} KB"
        if row["architecture"] == "sm_90" and row["tables"] == 1 and row["kernel"] != "decode_rows":
            form = ", bitmap" if row["form"] == "bitmap" else ""
            lines.append(
                f"| Triton, `{row['kernel']}`{form} | {row['bits']} | {row['rows']} | {registers} | {shared} |"
            )
        elif row["architecture"] == "sm_90a" and "bf16" in row["kernel"]:
            bits, count = (part.split()[0] for part in row["kernel"].split(", ")[1:])
            lines.append(f"| CUDA C++ | {bits} | up to {count} | {registers} | {shared} |")
    return lines


if __name__ == "__main__":
    main()
