"""Kill runs at random moments and do them again: tests/reliability/kill.py [--count 100] [--runs ...].

Whatever is killed and done again must end in the bytes of a run that was never killed, with nothing left over.
"""

import argparse
import os
import random
import signal
import sys
import tempfile
import time
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
from runs import RUNS, Run, difference, ended, make_packed, outcome, start


def main() -> None:
    """Print a line for each run and exit with 1 if any outcome was another."""
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--count", type=int, default=100, help="kills, over all runs together")
    options.add_argument("--seed", type=int, default=0)
    options.add_argument("--runs", nargs="+", choices=RUNS, default=list(RUNS))
    asked = options.parse_args()
    rng = random.Random(asked.seed)
    wrong = 0
    with tempfile.TemporaryDirectory() as place:
        assert ended(start(lambda: make_packed(Path(place, "packed.safetensors")))) == 0
        for name in asked.runs:
            kills, failures = _killed(name, RUNS[name], Path(place), -(-asked.count // len(asked.runs)), rng)
            wrong += len(failures)
            print(f"{name}: {kills} kills, {len(failures)} wrong outcomes", *failures, sep="\n  ", flush=True)
    sys.exit(1 if wrong else 0)


def _killed(name: str, each: Run, place: Path, count: int, rng: random.Random) -> tuple[int, list[str]]:
    """Kill a run until ``count`` kills are reached, at most three times before it is left to end."""
    reference = place / f"{name}-reference"
    reference.mkdir()
    began = time.perf_counter()
    assert ended(start(lambda: each.work(reference))) == 0
    whole = time.perf_counter() - began
    expected = outcome(each, reference)
    kills, cycle, failures = 0, 0, []
    while kills < count:
        out = place / f"{name}-{cycle}"
        out.mkdir()
        cycle += 1
        for _ in range(rng.randint(1, 3)):
            process = start(partial(each.work, out))
            time.sleep(rng.uniform(0, whole))
            os.kill(process, signal.SIGKILL)
            kills += ended(process) == -signal.SIGKILL
        code = ended(start(partial(each.work, out)))
        failure = f"ended with code {code}" if code else difference(expected, outcome(each, out))
        if failure:
            failures.append(f"{out.name}: {failure}")
    return kills, failures


if __name__ == "__main__":
    main()
