"""How fast `sqs generate` continues a text, as it is and with `--compile`: processes of their own, in turns.

    python benchmarks/generation.py --packed DIRECTORY [--threads 1 2] [--rounds 3] [--tokens 200]

``DIRECTORY`` is a packed checkpoint; here SmolLM2-135M, all matrices at eight values with a scale a row, as
``write`` of load_memory.py saves it. The first process with `--compile` compiles the step, which is kept, and is
not counted. Writes ``generation.json`` beside this file.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

from figures import write_figures

from sqs_pyro.kernels.processor import processor

PROMPT = "The history of the compass begins with"
WAYS = {"generate": [], "generate --compile": ["--compile"]}


def generated(packed: Path, options: list[str], threads: int, tokens: int) -> dict[str, Any]:
    command = [sys.executable, "-m", "sqs_pyro", "generate", str(packed), PROMPT, "--plain", "--json"]
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}
    done = subprocess.run(
        [*command, "--tokens", str(tokens), *options], env=environment, capture_output=True, text=True, check=True
    )
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--packed", type=Path, required=True)
    parser.add_argument("--threads", type=int, nargs="*", default=[1, 2])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--tokens", type=int, default=200)
    args = parser.parse_args()
    rows = []
    for threads in args.threads:
        generated(args.packed, WAYS["generate --compile"], threads, 2)
        found: dict[str, list[dict[str, Any]]] = {way: [] for way in WAYS}
        for _ in range(args.rounds):
            for way, options in WAYS.items():
                found[way].append(generated(args.packed, options, threads, args.tokens))
        for way, runs in found.items():
            figures = {
                key: statistics.median(run[key] for run in runs)
                for key in ("first_token_seconds", "tokens_per_second")
            }
            rows.append({"way": way, "threads": threads, "tokens": runs[0]["tokens"], **figures})
            print(rows[-1], flush=True)
    document = {"network": args.packed.name, "processor": processor()[0], "rounds": args.rounds, "rows": rows}
    write_figures(Path(__file__).with_suffix(".json"), document)


if __name__ == "__main__":
    main()
