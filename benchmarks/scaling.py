"""How long blockwise compression takes on 1 to 1,024 ranks, by a model of time, and how right that model is.

The model is :mod:`sqs_pyro.compression.blockwise.time_plan`: counts of work over throughputs of a machine. Here:

* ``curves``: seconds by part, efficiency beside one rank, and planned memory of a rank; each number of ranks with
  as many units, and with as large a batch as lets it divide 128 sequences of 512 tokens;
* ``checks``: what the model says of runs that ``ranks.py`` measured, one of which its throughputs are from;
* ``measured``: of this machine, what an E-step takes for an input of one row, compiled and by torch's calls, how
  many costs of symbols it compares, and how fast a product reads H.

Writes ``scaling.json`` beside this file.

    python benchmarks/scaling.py
"""

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from figures import write_figures
from torch import nn

from sqs_pyro.compression.blockwise import sequential_coding
from sqs_pyro.compression.blockwise.laplace import LayerLikelihood
from sqs_pyro.compression.blockwise.machines import MACHINES
from sqs_pyro.compression.blockwise.memory_plan import plan_memory
from sqs_pyro.compression.blockwise.sequential_coding import code_sequentially, improve
from sqs_pyro.compression.blockwise.time_plan import TimePlan, plan_time
from sqs_pyro.kernels.coding import chain_coding, conditional_coding
from sqs_pyro.runs.bookkeeping import machine

HERE = Path(__file__).parent
NETWORKS = HERE.parent / "recipes" / "networks"
SEQUENCES, LENGTH, RANKS = 128, 512, [2**n for n in range(11)]
SMOLLM2 = {
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "vocab_size": 49152,
    "tie_word_embeddings": True,
}
#: Of each network its sizes, and whether it is streamed: the last is in no device's memory as a whole.
SUBJECTS: dict[str, tuple[dict[str, Any], bool]] = {
    "SmolLM2-135M": (SMOLLM2, False),
    "Llama-3-8B": (json.loads((NETWORKS / "llama-3-8b" / "config.json").read_text()), False),
    "Llama-3-70B": (json.loads((NETWORKS / "llama-3-70b" / "config.json").read_text()), True),
}
#: What ranks.py measured: the file, its network, and its sequences of 256 tokens.
MEASURED: dict[str, tuple[dict[str, Any], int]] = {
    "ranks.json": (SMOLLM2 | {"num_hidden_layers": 2}, 48),
    "ranks_synthetic.json": (
        SMOLLM2
        | {"hidden_size": 1152, "intermediate_size": 3072, "num_hidden_layers": 2, "vocab_size": 1000}
        | {"tie_word_embeddings": False},
        16,
    ),
}


def network(sizes: dict[str, Any]) -> nn.Module:
    """A Llama on the meta device."""
    from transformers import LlamaConfig, LlamaForCausalLM

    with torch.device("meta"):
        return LlamaForCausalLM(LlamaConfig(**sizes))


def curve(net: nn.Module, streamed: bool, name: str) -> list[dict[str, Any]]:
    """A row for each number of ranks."""
    rows: list[dict[str, Any]] = []
    for ranks in RANKS:
        recipe = {
            "bits": 3.2,
            "allocation": "even" if streamed else "importance",
            "units": max(8, ranks),
            "batch_size": min(8, max(1, SEQUENCES // ranks)),
        }
        plan = plan_time(net, SEQUENCES, LENGTH, recipe, MACHINES[name], streamed=streamed, ranks=ranks)
        memory = plan_memory(net, SEQUENCES, LENGTH, recipe, streamed=streamed, ranks=ranks).peak
        alone = rows[0]["seconds"] if rows else plan.seconds
        row = {"ranks": ranks, "seconds": plan.seconds, "efficiency": alone / (ranks * plan.seconds)}
        rows.append({**row, "parts": plan.parts, "sent": vars(plan.sent), "memory": memory})
    return rows


def checks(file: str) -> list[dict[str, Any]]:
    """What the model says of the runs in a file, and what was measured."""
    sizes, sequences = MEASURED[file]
    document = json.loads((HERE / file).read_text())
    recipe, found = {"bits": 3.2, "embedding": False, "head": False}, []
    for row in document["ranks"]:
        plan = plan_time(
            network(sizes), sequences, 256, recipe, MACHINES["cpu"], streamed=False, ranks=row["ranks"]
        )
        # A rank's own clock of its processor does not run while it waits, for messages or for the others.
        planned = _as_phases(plan)
        measured, waiting = dict(row["phases"]), row["phases"].get("waiting", 0.0)
        if document.get("clock") == "processor":
            for each in ("waiting", "communication"):
                planned.pop(each, None), measured.pop(each, None)
        total = sum(measured.values())
        error = sum(planned.values()) / total - 1
        found.append({"ranks": row["ranks"], "planned": planned, "measured": measured, "error": error})
        print(f"{file}, {row['ranks']} ranks: {sum(planned.values()):.1f} s planned, {total:.1f} s measured "
              f"({waiting:.1f} s waiting): {error:+.1%}")  # fmt: skip
    return found


def _as_phases(plan: TimePlan) -> dict[str, float]:
    parts = plan.parts
    coding, other, messages = parts["coding"] + parts.pop("steps"), parts.pop("serial"), parts.pop("messages")
    return {**parts, "coding": coding, "other": other, "communication": messages}


def measured() -> dict[str, float]:
    """What an input of an E-step of one row takes, seconds; costs that it compares, and bytes of H that a product
    reads, a second."""
    torch.manual_seed(0)
    inputs = torch.randn(4096, 1024)
    own = LayerLikelihood(0.05 * torch.randn(1, 1024), inputs.T @ inputs, torch.ones(1)).damped(0.01)
    codewords, rates = torch.linspace(-0.2, 0.2, 31), torch.full((32,), 3.4)
    symbols, _ = code_sequentially(own, codewords, rates, 1e-3)

    def step() -> float:
        first = _seconds(lambda: code_sequentially(own, codewords, rates, 1e-3))
        again = _seconds(lambda: improve(own, symbols, codewords, rates, 1e-3))
        return (first + 2 * again) / 3 / 1024

    by_torch = {op._name: op._init_fn for op in (chain_coding, conditional_coding)}
    with mock.patch.multiple(sequential_coding, **by_torch):
        slow = step()
    panel, matrix, values = torch.randn(64, 2048), torch.eye(64), torch.randn(256)
    chosen, price = torch.empty(64, 2048, dtype=torch.uint8), torch.rand(64, 2048)
    many = _seconds(
        lambda: chain_coding(panel, matrix, values, values.abs(), price, None, chosen, torch.empty(64, 2048))
    )
    large, row = torch.randn(8192, 8192), torch.randn(4, 8192)
    return {
        "step": step(),
        "step_by_torch": slow,
        "comparisons": price.numel() * len(values) / many,
        "memory": 4 * large.numel() / _seconds(lambda: row @ large),
    }


def _seconds(call: Callable[[], object]) -> float:
    """The least of some calls, of the processor's time."""
    found = []
    for _ in range(5):
        start = time.process_time()
        call()
        found.append(time.process_time() - start)
    return min(found)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path(__file__).with_suffix(".json"))
    args = parser.parse_args()
    torch.set_num_threads(1)
    curves = {}
    for subject, (sizes, streamed) in SUBJECTS.items():
        net = network(sizes)
        curves[subject] = {name: curve(net, streamed, name) for name in MACHINES}
        for name, rows in curves[subject].items():
            print(f"{subject}, {name}")
            for row in rows:
                parts = ", ".join(f"{part} {seconds / 3600:.3g}" for part, seconds in row["parts"].items())
                print(
                    f"{row['ranks']:5} ranks {row['seconds'] / 3600:8.3g} h {row['efficiency']:6.1%} "
                    f"{row['memory'] / 1e9:5.1f} GB  {parts}"
                )
    document = {
        "machines": {name: vars(each) for name, each in MACHINES.items()},
        "tokens": SEQUENCES * LENGTH,
        "checks": {file: checks(file) for file in MEASURED if (HERE / file).exists()},
        "measured": measured(),
        "curves": curves,
        "machine": machine(),
    }
    write_figures(args.out, document)


if __name__ == "__main__":
    main()
