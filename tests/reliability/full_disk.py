"""Let the disk be full at ten moments of each run: tests/reliability/full_disk.py [--moments 10] [--runs ...].

Every file ends at a limit that lies between the sizes of the files that the run writes. The run must end in one
sentence, what was there must stay, and done again with room it must end in the bytes of a run that always had it.
"""

import argparse
import resource
import sys
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
from runs import REFUSED, RUNS, Run, difference, ended, make_packed, outcome, start


def main() -> None:
    """Print a line for each run and exit with 1 if any outcome was another."""
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--moments", type=int, default=10)
    options.add_argument("--runs", nargs="+", choices=RUNS, default=list(RUNS))
    asked = options.parse_args()
    wrong = 0
    with tempfile.TemporaryDirectory() as place:
        assert ended(start(lambda: make_packed(Path(place, "packed.safetensors")))) == 0
        for name in asked.runs:
            failures = _filled(name, RUNS[name], Path(place), asked.moments)
            wrong += len(failures)
            print(
                f"{name}: {asked.moments} moments, {len(failures)} wrong outcomes",
                *failures,
                sep="\n  ",
                flush=True,
            )
    sys.exit(1 if wrong else 0)


def _filled(name: str, each: Run, place: Path, moments: int) -> list[str]:
    reference = place / f"{name}-reference"
    reference.mkdir()
    assert ended(start(lambda: each.work(reference))) == 0
    expected, failures = outcome(each, reference), []
    sizes = sorted({path.stat().st_size for path in reference.rglob("*") if path.is_file()})
    limits = [int(sizes[min(i * len(sizes) // moments, len(sizes) - 1)] * 0.99) for i in range(moments)]
    for i, limit in enumerate(limits):
        out = place / f"{name}-{i}"
        out.mkdir()
        code = ended(start(_limited(partial(each.work, out), limit)))
        if code != REFUSED:
            failures.append(f"files of {limit} bytes: code {code}")
        left = [str(path) for path in out.rglob(".sqs-*")]
        code = ended(start(partial(each.work, out)))
        failure = f"then code {code}" if code else difference(expected, outcome(each, out))
        if failure or left:
            failures.append(f"files of {limit} bytes: {failure}, {left}")
    return failures


def _limited(work: Callable[[], object], limit: int) -> Callable[[], object]:
    def limited() -> object:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
        return work()

    return limited


if __name__ == "__main__":
    main()
