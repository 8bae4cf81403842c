"""Damage files of every kind, read them, and say what came of it: ``python -m fuzz`` in ``tests``, or `make fuzz`.

Each case follows from seed, kind and its number: ``--kind packed --first 812 --cases 1`` runs one again.
"""

import argparse
import json
import os
import tempfile
import time
from pathlib import Path

import torch

from fuzz.kinds import KINDS
from fuzz.run import run_kind

_FEWEST = 20  # of a kind, however few of packed files


def main() -> int:
    """Run, print a table and the failures, write JSON; 1 if there is a failure."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cases", type=int, default=10_000, help="of packed files; a fifth of it of other kinds")
    parser.add_argument("--kind", choices=[kind.name for kind in KINDS], action="append")
    parser.add_argument("--first", type=int, default=0, help="number of the first case")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, help="JSON file")
    asked = parser.parse_args()
    torch.set_num_threads(1)
    document = {}
    print(f"{'kind':<14}{'refused':>9}{'right':>9}{'other':>9}{'failed':>9}{'MiB':>7}{'s a case':>9}{'s':>7}")
    for made in KINDS:
        if asked.kind and made.name not in asked.kind:
            continue
        few = min(_FEWEST, asked.cases)
        count = asked.cases if asked.kind else max(few, round(made.share * asked.cases))
        start, kind = time.monotonic(), made()
        with tempfile.TemporaryDirectory() as place:
            os.environ["SQS_CACHE"] = place  # of kernels: none is compiled here
            kind.prepare(Path(place))
            found = run_kind(kind, range(asked.first, asked.first + count), asked.seed, Path(place))
        numbers = [found.counts[outcome] for outcome in ("refused", "right", "other content", "failed")]
        cells = "".join(f"{number:>9}" for number in numbers)
        last = f"{found.most_bytes >> 20:>7}{found.most_seconds:>9.2f}{time.monotonic() - start:>7.0f}"
        print(f"{made.name:<14}{cells}{last}", flush=True)
        for case, said in found.failures[:20]:
            print(f"    --seed {asked.seed} --kind {made.name} --first {case} --cases 1: {said}", flush=True)
        document[made.name] = {"seed": asked.seed, **vars(found)}
    if asked.out:
        asked.out.write_text(json.dumps(document, indent=2) + "\n")
    return int(any(each["failures"] for each in document.values()))


if __name__ == "__main__":
    os.environ.setdefault("SQS_KERNELS", "reference")
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    raise SystemExit(main())
