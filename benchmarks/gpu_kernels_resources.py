"""What the GPU kernels take of a GPU, by compiling them ahead of time: no GPU takes part, no time is measured.

A line for each kernel, architecture and width of codes: registers of a thread, bytes of shared memory of a block,
spilled bytes, bytes of the cubin, and for Triton's kernels machine instructions. The weight is 4096 x 4096, x is
bfloat16, of as many rows as stated. Writes ``benchmarks/gpu_kernels_resources.json``::

    python benchmarks/gpu_kernels_resources.py
"""

import re
import subprocess
from pathlib import Path

import torch
import triton

from sqs_pyro.kernels.gpu import cuda
from sqs_pyro.kernels.gpu.resources import SHARED_LIMIT, blank, compiled_cuda, compiled_triton, launches
from sqs_pyro.runs.directory import write_json

SHAPE = 4096, 4096
WEIGHTS = [("dense", bits) for bits in range(1, 9)] + [("bitmap", 8)]


def main() -> None:
    rows = []
    for architecture in SHARED_LIMIT:
        for form, bits in WEIGHTS:
            seen = set()
            for count in (1, 16, 64, 128):
                for launch in launches(blank(SHAPE, bits, form), count, torch.bfloat16):
                    name = launch.kernel.__name__
                    if name != "finish" or (architecture, bits, form) == (architecture, 4, "dense"):
                        key = (name, launch.constants.get("BM"))
                        if key in seen:
                            continue
                        seen.add(key)
                        what = {"architecture": f"sm_{architecture}", "form": form, "bits": bits, "rows": count}
                        rows.append({"kernel": name, **what, **compiled_triton(launch, architecture)})
                        print(rows[-1])
    compiler = subprocess.run([cuda._nvcc(), "--version"], capture_output=True, text=True, check=True).stdout
    for architecture in ("80", "90a", "100"):
        for name, found in compiled_cuda(architecture).items():
            rows.append({"kernel": f"dense.cu: {name}", "architecture": f"sm_{architecture}", **found})
    release = re.search(r"release (\S+),", compiler)
    made = {"triton": triton.__version__, "nvcc": release.group(1) if release else compiler.strip()}
    write_json(Path(__file__).with_suffix(".json"), {"compilers": made, "rows": rows})


if __name__ == "__main__":
    main()
