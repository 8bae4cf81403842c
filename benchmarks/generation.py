"""How fast `sqs generate` continues a text, as it is and with `--compile`: processes of their own, in turns.

    python benchmarks/generation.py --packed DIRECTORY [--packages DIRECTORY] [--threads 1 2] [--rounds 3]
        [--tokens 200] [--ways WAY ...] [--llama-cpp PYTHON] [--out FILE]

``DIRECTORY`` is a packed checkpoint; one that is not there is made of SmolLM2-135M (``--packages``, see
language_model.py), all matrices rounded to whole numbers from -8 to 7 times a scale a row: for its speed, not for
what it says. The first process with `--compile` compiles the step, which is kept, and is not counted. ``PYTHON``
has llama-cpp-python, built for this machine, and runs the same network to the bit, `sqs export --format gguf`:
Q4_0. Of a prompt of 64 tokens, read five times in one process, the median counts. Writes ``generation.json``
beside this file, or ``--out``.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
from figures import write_figures
from packaged_weights import language_model
from torch import Tensor

from sqs_pyro.distributions.uniform_grid import grid_numbers
from sqs_pyro.integrations import save_pretrained
from sqs_pyro.kernels import packed_network
from sqs_pyro.kernels.processor import processor
from sqs_pyro.packing import CodedTensor
from sqs_pyro.runs.export import export_file

PROMPT = "The history of the compass begins with"
WAYS = {
    "generate": [],
    "generate --compile": ["--compile"],
    "generate --compile --int8": ["--compile", "--int8"],
    "generate --dtype bfloat16": ["--dtype", "bfloat16"],
    "generate --compile --dtype bfloat16": ["--compile", "--dtype", "bfloat16"],
}
LONG = 64  # tokens of a prompt
LLAMA_CPP = """
import json, sys, time
import llama_cpp

path, prompt, tokens, threads, long = sys.argv[1], sys.argv[2], *map(int, sys.argv[3:])
llm = llama_cpp.Llama(path, n_ctx=512, n_threads=threads, n_threads_batch=threads, verbose=False)
start, times = time.perf_counter(), []
for token in llm.generate(llm.tokenize(prompt.encode()), temp=0.0, repeat_penalty=1.0):
    times.append(time.perf_counter())
    if len(times) == tokens:
        break
read = []
for _ in range(5):
    llm.reset()
    begun = time.perf_counter()
    llm.eval(list(range(100, 100 + long)))
    read.append(time.perf_counter() - begun)
print(json.dumps({
    "tokens": tokens,
    "first_token_seconds": times[0] - start,
    "tokens_per_second": (tokens - 1) / (times[-1] - times[0]),
    "prompt_tokens_per_second": long / sorted(read)[2],
}))
"""
OURS = """
import json, sys, time
import torch
import sqs_pyro
from sqs_pyro import integrations

from sqs_pyro.kernels.int8 import round_inputs

net = integrations.from_pretrained(sys.argv[1])
if "--int8" in sys.argv:
    assert round_inputs(net)
if "bfloat16" in sys.argv:
    net = net.bfloat16()
ids, read = torch.arange(100, 100 + int(sys.argv[2]))[None], []
with torch.inference_mode():
    for _ in range(6):
        begun = time.perf_counter()
        net(ids, logits_to_keep=1)
        read.append(time.perf_counter() - begun)
print(json.dumps(ids.numel() / sorted(read[1:])[2]))
"""


def write(packages: Path | None, directory: Path) -> None:
    """Write SmolLM2 with whole numbers as a packed checkpoint, tokenizer included."""
    net, tokenizer = language_model(packages)
    matrices = {name: value.detach() for name, value in net.named_parameters() if value.dim() == 2}
    packed = packed_network(net, {name: rounded(value) for name, value in matrices.items()})
    save_pretrained(packed, directory, tokenizer)


def rounded(weight: Tensor) -> CodedTensor:
    """Whole numbers from -8 to 7 times a scale of each output."""
    rows = weight.flatten(1)
    scales = (rows.abs().amax(1) / 7.5).half().float()
    numbers = (rows / scales[:, None]).round().clamp(-8, 7).view_as(weight)
    mask = numbers != 0
    codes = torch.where(numbers < 0, numbers + 8, numbers + 7).masked_fill(~mask, 0)  # of -8 .. -1, 1 .. 7
    return CodedTensor(codes.to(torch.uint8), mask, grid_numbers(15).float()[None], scales)


def generated(packed: Path, options: list[str], threads: int, tokens: int) -> dict[str, Any]:
    command = [sys.executable, "-m", "sqs_pyro", "generate", str(packed), PROMPT, "--plain", "--json"]
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}
    done = subprocess.run(
        [*command, "--tokens", str(tokens), *options], env=environment, capture_output=True, text=True, check=True
    )
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def printed(python: str, script: str, threads: int, *arguments: object) -> Any:
    """What a script prints as JSON, run by another Python."""
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}
    command = [python, "-c", script, *map(str, arguments)]
    return json.loads(subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--packed", type=Path, required=True)
    parser.add_argument("--threads", type=int, nargs="*", default=[1, 2])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--tokens", type=int, default=200)
    parser.add_argument("--ways", nargs="*", choices=[*WAYS], default=[*WAYS])
    parser.add_argument("--packages", type=Path)
    parser.add_argument("--llama-cpp", metavar="PYTHON")
    parser.add_argument("--out", type=Path, default=Path(__file__).with_suffix(".json"))
    args = parser.parse_args()
    gguf = args.packed.with_suffix(".gguf")
    if not args.packed.exists():
        write(args.packages, args.packed)
    if args.llama_cpp and not gguf.exists():
        export_file(args.packed, "gguf", gguf)
    rows = []
    ways = {way: WAYS[way] for way in args.ways}
    for threads in args.threads:
        for options in ways.values():
            generated(args.packed, options, threads, 2)  # what is compiled once
        found: dict[str, list[dict[str, Any]]] = {way: [] for way in ways}
        for _ in range(args.rounds):
            for way, options in ways.items():
                found[way].append(generated(args.packed, options, threads, args.tokens))
                if "--compile" in options and "--int8" not in options:
                    continue  # a prompt is read as without it
                read = printed(sys.executable, OURS, threads, args.packed, LONG, *options)
                found[way][-1]["prompt_tokens_per_second"] = read
            if args.llama_cpp:
                one = (gguf, PROMPT, args.tokens, threads, LONG)
                found.setdefault("llama.cpp", []).append(printed(args.llama_cpp, LLAMA_CPP, threads, *one))
        for way, runs in found.items():
            figures = {
                key: statistics.median(run[key] for run in runs)
                for key in ("first_token_seconds", "tokens_per_second", "prompt_tokens_per_second")
                if key in runs[0]
            }
            rows.append({"way": way, "threads": threads, "tokens": runs[0]["tokens"], **figures})
            print(rows[-1], flush=True)
    document = {"network": args.packed.name, "processor": processor()[0], "rounds": args.rounds, "rows": rows}
    if args.llama_cpp:
        document["gguf_bytes"] = gguf.stat().st_size
    write_figures(args.out, document)


if __name__ == "__main__":
    main()
