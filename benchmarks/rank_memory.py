"""The memory that a rank takes beside what `sqs plan` says: a Llama of 0.1 billion random weights, streamed.

A rank's own memory is read from /proc every ten milliseconds; what it has before, libraries and all, is taken off.
One layer is coded, that of the most inputs, where memory is at its peak; the others are left, for time.

Writes ``rank_memory.json`` beside this file.

    python benchmarks/rank_memory.py [--ranks 1 2]
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from figures import write_figures

from sqs_pyro.compression.blockwise.memory_plan import plan_memory
from sqs_pyro.integrations.checkpoint import compress_checkpoint
from sqs_pyro.ranks import Ranks, started
from sqs_pyro.runs.bookkeeping import machine

COMMON = {"num_attention_heads": 16, "num_key_value_heads": 4, "num_hidden_layers": 8}
SMALL = {"vocab_size": 64, "hidden_size": 64, "intermediate_size": 96}
LARGE = {"vocab_size": 4000, "hidden_size": 1024, "intermediate_size": 2816}
SEQUENCES, LENGTH = 8, 256
# Few values and rounds, for time: what is held at once is the same.
RECIPE = {
    "allocation": "even",
    "bits": 1.5,
    "num_components": 3,
    "rounds": 1,
    "batch_size": 2,
    "units": 4,
    "embedding": False,
    "head": False,
    "layers": {"*": {"skip": True}, "*.0.mlp.down_proj": {"skip": False}},
}
#: What was freed goes back at once.
THRESHOLDS = {"MALLOC_MMAP_THRESHOLD_": "200000", "MALLOC_TRIM_THRESHOLD_": "200000"}


def resident() -> int:
    """Bytes of this process."""
    return os.sysconf("SC_PAGE_SIZE") * int(Path("/proc/self/statm").read_text().split()[1])


def compress(place: Path, sizes: dict[str, int], here: Ranks) -> int:
    """Compress a random network on all ranks; return by how many bytes this one grew at most."""
    from transformers import LlamaConfig, LlamaForCausalLM

    checkpoint = place / str(sizes["hidden_size"])
    if here.leads:
        torch.manual_seed(0)
        LlamaForCausalLM(LlamaConfig(**COMMON, **sizes)).save_pretrained(checkpoint, max_shard_size="50MB")
    here.wait()
    sequences = torch.randint(sizes["vocab_size"], (SEQUENCES, LENGTH), generator=torch.Generator().manual_seed(0))
    before = most = resident()
    ended = threading.Event()

    def watch() -> None:
        nonlocal most
        while not ended.is_set():
            most = max(most, resident())
            time.sleep(0.01)

    watching = threading.Thread(target=watch)
    watching.start()
    compress_checkpoint(checkpoint, sequences, RECIPE, directory=place / f"blocks-{sizes['hidden_size']}")
    ended.set()
    watching.join()
    return most - before


def measure(place: Path) -> None:
    """Compress a small network, so that all libraries are there, and then the large one."""
    torch.set_num_threads(1)
    with started() as here:
        compress(place, SMALL, here)
        every = json.dumps(here.gathered(compress(place, LARGE, here)))
        if here.leads:
            (place / "figures").write_text(every)


def started_on(ranks: int) -> list[int]:
    """Start this script on ranks, by torchrun; return bytes of each."""
    with tempfile.TemporaryDirectory() as place:
        torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
        environment = {**os.environ, **THRESHOLDS, "OMP_NUM_THREADS": "1"}
        subprocess.run([*torchrun, __file__, "--measured", place], check=True, env=environment)
        return json.loads(Path(place, "figures").read_text())


def main() -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--out", type=Path, default=Path(__file__).with_suffix(".json"))
    parser.add_argument("--measured", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.measured is not None:
        measure(args.measured)
        return
    with torch.device("meta"):
        net = LlamaForCausalLM(LlamaConfig(**COMMON, **LARGE))
    rows: list[dict[str, Any]] = []
    with ThreadPoolExecutor() as threads:
        every = list(threads.map(started_on, args.ranks))  # at once: it is not time that is measured
    for ranks, measured in zip(args.ranks, every, strict=True):
        plan = plan_memory(net, SEQUENCES, LENGTH, RECIPE, ranks=ranks)
        rows.append({"ranks": ranks, "planned": plan.peak, "measured": measured, "moments": plan.moments})
        print(f"{ranks} ranks: {max(measured) / 1e9:.2f} GB, planned {plan.peak / 1e9:.2f} GB", flush=True)
    write_figures(args.out, {"parameters": plan.parameters, "recipe": RECIPE, "rows": rows, "machine": machine()})


if __name__ == "__main__":
    main()
