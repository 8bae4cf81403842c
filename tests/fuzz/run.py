"""Run cases of a kind in forked processes, with bounds of memory and time for each."""

import os
import pickle
import resource
import signal
import struct
import sys
import tempfile
import time
import traceback
import warnings
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from random import Random

from fuzz.kind import Kind
from sqs_pyro.errors import SQSError

SECONDS, MEMORY = 10, 1 << 30  # of the processor, which other programs do not lengthen
_LONGEST_WAIT = 120  # seconds: of what waits for something else
_BATCH = 500
_LONGEST_SENTENCE = 2000


@dataclass
class Outcomes:
    """What came of the cases of a kind.

    Attributes:
        counts: by outcome: ``refused``, ``right``, ``other content`` and ``failed``.
        failures: number of the case and what went wrong.
        most_bytes: memory that a process of cases took beside what it began with, at most.
        most_seconds: of the processor, for a case.
    """

    counts: Counter[str] = field(default_factory=Counter)
    failures: list[tuple[int, str]] = field(default_factory=list)
    most_bytes: int = 0
    most_seconds: float = 0.0


def run_kind(kind: Kind, cases: range, seed: int, directory: Path) -> Outcomes:
    """Damage and read as many files as there are cases; each follows from seed, kind and its number alone."""
    outcomes = Outcomes()
    todo = list(cases)
    while todo:
        done = _fork(kind, todo[:_BATCH], seed, directory, outcomes)
        todo = todo[done:]
    return outcomes


def one_case(kind: Kind, case: int, seed: int, directory: Path) -> tuple[str, str]:
    """The outcome of a case, and what went wrong if it failed."""
    random = Random(f"{seed} {kind.name} {case}")
    may_differ = kind.damage(directory, random)
    try:
        value = kind.read(directory)
        if kind.is_right(value):
            return "right", ""
        return ("other content", "") if may_differ else ("failed", "read without a word, and wrong")
    except SQSError as error:
        text = str(error)
        if "\n" in text or len(text) > _LONGEST_SENTENCE:
            return "failed", f"no sentence: {len(text)} characters, {text[:300]!r}"
        return "refused", ""
    except BaseException as error:
        last = traceback.extract_tb(error.__traceback__)[-1]
        said = " ".join(str(error).split())[:300]
        return "failed", f"{type(error).__name__}: {said} ({last.filename}:{last.lineno})"


def _fork(kind: Kind, cases: list[int], seed: int, directory: Path, outcomes: Outcomes) -> int:
    """Run cases in one process, as far as it lives; returns how many are done."""
    reading, writing = os.pipe()
    process = os.fork()
    if not process:
        os.close(reading)
        _child(kind, cases, seed, directory, writing)
    os.close(writing)
    done = 0
    with os.fdopen(reading, "rb") as stream:
        while size := stream.read(4):
            outcome, said, seconds, memory = pickle.loads(stream.read(struct.unpack("<I", size)[0]))
            outcomes.counts[outcome] += 1
            if outcome == "failed":
                outcomes.failures.append((cases[done], said))
            outcomes.most_seconds = max(outcomes.most_seconds, seconds)
            outcomes.most_bytes = max(outcomes.most_bytes, memory)
            done += 1
    _, status = os.waitpid(process, 0)
    if done < len(cases):
        number = os.waitstatus_to_exitcode(status)
        late = number in (-signal.SIGPROF, -signal.SIGALRM)
        what = f"more than {SECONDS} seconds" if late else f"the process ended with {number}"
        outcomes.counts["failed"] += 1
        outcomes.failures.append((cases[done], what))
        done += 1
    return done


def _child(kind: Kind, cases: list[int], seed: int, parent: Path, writing: int) -> None:
    warnings.simplefilter("ignore")
    at_first = _peak()
    limit = _virtual() + MEMORY
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    sink = os.open(os.devnull, os.O_RDWR)
    for stream in (0, 1, 2):  # a question on stdin would find its end; what libraries print is not looked at
        os.dup2(sink, stream)
    with tempfile.TemporaryDirectory(dir=parent) as place:
        for case in cases:
            before = time.process_time()
            signal.setitimer(signal.ITIMER_PROF, SECONDS)
            signal.alarm(_LONGEST_WAIT)
            outcome, said = one_case(kind, case, seed, Path(place))
            signal.setitimer(signal.ITIMER_PROF, 0)
            signal.alarm(0)
            message = pickle.dumps((outcome, said, time.process_time() - before, _peak() - at_first))
            os.write(writing, struct.pack("<I", len(message)) + message)
    sys.stdout.flush()
    os._exit(0)


def _peak() -> int:
    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def _virtual() -> int:
    return int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
