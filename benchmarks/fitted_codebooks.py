"""What fitting codebooks costs beside an earlier version: K-means of a layer, and a linear layer coded.

``--before`` names a checkout of the other version, which is measured in turn with this one, in processes of their
own. Medians of the rounds are the result, in seconds of the processor on one thread; what is fitted must be the
same, bit for bit. Writes ``fitted_codebooks.json`` beside this file.

    python benchmarks/fitted_codebooks.py --before DIRECTORY [--rounds 7]
"""

import argparse
import hashlib
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from figures import write_figures

import sqs_pyro
from sqs_pyro.compression.blockwise.laplace import LayerLikelihood
from sqs_pyro.compression.blockwise.sequential_coding import fit
from sqs_pyro.distributions.kmeans import kmeans_1d

ROOT = Path(__file__).parent.parent
KMEANS = ((1, 288, 8), (1, 4608, 16), (1, 200_000, 16), (64, 288, 8))  # groups, weights of each, components
CODED = ((64, 64, 4.0), (576, 192, 3.0), (576, 192, 6.0))  # outputs and inputs of a linear layer, bits a weight


def layer(outputs: int, inputs: int) -> LayerLikelihood:
    random = torch.Generator().manual_seed(0)
    x = torch.randn(2 * inputs, inputs, generator=random) + torch.randn(2 * inputs, 1, generator=random)
    mean, importance = torch.randn(outputs, inputs, generator=random), torch.rand(outputs, generator=random)
    return LayerLikelihood(mean, x.T @ x, 0.5 + importance)


def measure() -> dict[str, Any]:
    """Seconds of the processor of each fit, and a digest of what was fitted."""
    torch.set_num_threads(1)
    seconds, digest = {}, hashlib.sha256()

    def timed(name: str, work: Callable[[], tuple[torch.Tensor, ...]]) -> None:
        work()  # loads what is loaded once
        start = time.process_time()
        found = work()
        seconds[name] = time.process_time() - start
        for tensor in found:
            digest.update(tensor.contiguous().numpy().tobytes())

    for groups, weights, components in KMEANS:
        values = torch.randn(groups, weights, generator=torch.Generator().manual_seed(0))
        mask = (values.abs() > 0.5).float()
        name = f"K-means of {groups} x {weights}, K = {components}"
        timed(name, lambda v=values, m=mask, k=components: _clustering(kmeans_1d(v, k, m)))
    for outputs, inputs, bits in CODED:
        own = layer(outputs, inputs)
        timed(f"{outputs} x {inputs} coded at {bits:g} bits", lambda own=own, b=bits: _coding(fit(own, bits=b)))
    return {"seconds": seconds, "sha256": digest.hexdigest(), "tree": str(Path(sqs_pyro.__file__).parent.parent)}


def _clustering(found: Any) -> tuple[torch.Tensor, ...]:
    return found.loc, found.scale, found.mixing


def _coding(found: Any) -> tuple[torch.Tensor, ...]:
    return found.symbols, found.codewords


def in_process(tree: Path) -> dict[str, Any]:
    environment = {**os.environ, "PYTHONPATH": str(tree), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, __file__, "--one"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    found = json.loads(done.stdout)
    assert Path(found.pop("tree")).resolve() == tree.resolve()
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--before", type=Path, help="checkout of the version to compare with")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--one", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        print(json.dumps(measure()))
        return
    if options.before is None:
        parser.error("--before is needed")
    rounds = [(in_process(options.before), in_process(ROOT)) for _ in range(options.rounds)]
    assert len({found["sha256"] for pair in rounds for found in pair}) == 1, "other codebooks than before"
    figures = {}
    for name in rounds[0][0]["seconds"]:
        before, after = (statistics.median(pair[i]["seconds"][name] for pair in rounds) for i in (0, 1))
        figures[name] = {"before": before, "after": after, "ratio": before / after}
        print(f"{name:32s} {before:8.4f} -> {after:8.4f} s, {before / after:.2f} times as fast")
    result = {"torch": torch.__version__, "threads": 1, "rounds": options.rounds, "sha256": rounds[0][0]["sha256"]}
    write_figures(Path(__file__).with_suffix(".json"), {**result, "seconds": figures})


if __name__ == "__main__":
    main()
