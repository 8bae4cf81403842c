"""Memory of a rank that trains a guide of a network whose sites are divided among ranks, beside what is planned.

Linear layers with random weights under ``shard_sites``, Adam, the estimator of the stage ``coded`` and a minibatch
of four examples on each rank; processes of one thread that gloo connects. A rank first does a step of a small
network, so that libraries are there. From then on it counts its highest resident memory (VmHWM), until guide and
optimizer are made and over all steps. The allocator is told to return what is freed
(``MALLOC_MMAP_THRESHOLD_``): what is measured is what is held. Linux only. Writes ``sharded_memory.json`` beside
this file.

    python benchmarks/sharded_memory.py [--ranks 1 2 4] [--layers 48] [--width 2048] [--components 4] [--steps 2]
"""

import argparse
import json
import os
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
from figures import write_figures
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh

from sqs_pyro import SQSELBO, BayesianNetwork, SpikeGMMGuide
from sqs_pyro.inference.guides.site_rows import planned_bytes
from sqs_pyro.models import shard_sites
from sqs_pyro.packing import CodedTensor
from sqs_pyro.ranks import Ranks, started
from sqs_pyro.runs.bookkeeping import machine

EXAMPLES = 4


def resident(what: str) -> int:
    """Return bytes of memory of this process, of a line of its status."""
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith(f"{what}:"))


def rounded(weight: Tensor, components: int) -> CodedTensor:
    """Return evenly distributed weights as codes of an even grid, which spares K-means."""
    largest = float(weight.abs().max())
    step = 2 * largest / components
    codes = ((weight + largest) / step).floor_().clamp_(0, components - 1).to(torch.uint8)
    codebook = (torch.arange(components) + 0.5) * step - largest
    return CodedTensor(codes, torch.ones_like(codes, dtype=torch.bool), codebook[None])


def trained(layers: int, width: int, components: int, steps: int, ranks: Ranks) -> tuple[int, float, float]:
    """Return the highest resident memory until the guide is made, seconds of the last step, and its loss."""
    torch.manual_seed(0)
    parts = [(nn.Linear(width, width, bias=False), nn.Tanh()) for _ in range(layers)]
    net = nn.Sequential(*(module for pair in parts for module in pair))
    x, y = torch.randn(ranks.size, EXAMPLES, width)[ranks.rank], torch.arange(EXAMPLES)
    model = BayesianNetwork(net, num_data=1000)
    coded = {name: rounded(weight, components) for name, weight in model.site_values().items()}
    shard_sites(model, init_device_mesh("cpu", (ranks.size,)))
    guide = SpikeGMMGuide(model, components, estimator="straight_through", coded=coded)
    del coded
    loss = SQSELBO()(model, guide)
    optimizer = torch.optim.Adam([p for p in loss.parameters() if p.requires_grad], lr=1e-4)
    made, seconds, value = resident("VmHWM"), 0.0, 0.0
    for _ in range(steps):
        begun = time.perf_counter()
        optimizer.zero_grad()
        objective = loss(x, y)
        objective.backward()
        optimizer.step()
        seconds, value = time.perf_counter() - begun, objective.item()
    return made, seconds, value


def measure(given: argparse.Namespace) -> None:
    """Print what one rank has measured."""
    with started() as ranks:
        trained(2, 64, given.components, 2, ranks)
        before = resident("VmRSS")
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # VmHWM begins anew
        made, seconds, loss = trained(given.layers, given.width, given.components, given.steps, ranks)
        times = os.times()
        figures = {"made": made - before, "peak": resident("VmHWM") - before, "seconds": seconds, "loss": loss}
        figures |= {"user": times.user, "system": times.system}
        print(json.dumps(figures))


def on_ranks(size: int) -> list[dict[str, Any]]:
    """Return what each of so many ranks has measured."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    common = {"WORLD_SIZE": size, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "OMP_NUM_THREADS": 1}
    common |= {"MALLOC_MMAP_THRESHOLD_": 2**16}
    processes = []
    for rank in range(size):
        own = {**common, "RANK": rank, "LOCAL_RANK": rank}
        environment = {**os.environ, **{name: str(value) for name, value in own.items()}}
        command = [sys.executable, __file__, "--rank", *sys.argv[1:]]
        processes.append(subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True))
    printed = [process.communicate()[0] for process in processes]
    if any(process.returncode for process in processes):
        sys.exit("A rank has failed, and says above why.")
    return [json.loads(each.splitlines()[-1]) for each in printed]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--layers", type=int, default=48)
    parser.add_argument("--width", type=int, default=2048)
    parser.add_argument("--components", type=int, default=4)
    parser.add_argument("--steps", type=int, default=2)
    parser.add_argument("--out", type=Path, default=Path(__file__).with_suffix(".json"))
    parser.add_argument("--rank", action="store_true", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.rank:
        measure(given)
        return
    rows = []
    for size in given.ranks:
        shapes = [torch.Size([given.width, given.width])] * given.layers
        planned = planned_bytes(shapes, size, given.components)
        found = on_ranks(size)
        peak = max(each["peak"] for each in found)
        rows.append(
            {
                "ranks": size,
                "planned_bytes": planned,
                "peak_bytes": peak,
                "of_plan": peak / planned,
                "peak_bytes_by_rank": [each["peak"] for each in found],
                "peak_bytes_until_made": max(each["made"] for each in found),
                "seconds_a_step": max(each["seconds"] for each in found),
                "loss_by_rank": [each["loss"] for each in found],
            }
        )
        print(json.dumps(rows[-1]), flush=True)
    weights = given.layers * given.width**2
    settings = {"weights": weights, "layers": given.layers, "width": given.width, "components": given.components}
    write_figures(given.out, {**settings, "examples": EXAMPLES, "machine": machine(), "ranks": rows})


if __name__ == "__main__":
    main()
