"""Several `sqs compress` at a time, each in a process of its own; Ctrl-C stops them all."""

import os
import signal
import subprocess
from collections.abc import Callable, Generator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from threading import Lock

import torch

Outcome = tuple[str, str | None]
"""The name of a run, and the sentence it failed with or None."""

_BAD_INPUT, _INTERRUPTED = 2, 130  # exit statuses of `sqs`
_ERROR = "error: "


def run_commands(
    commands: Mapping[str, Sequence[str | Path]], jobs: int, say: Callable[[str], None]
) -> Generator[Outcome, None, None]:
    """Run commands, ``jobs`` at a time, and yield an outcome when each ends.

    When the iterator is closed or interrupted, the commands that run get one SIGINT and are waited for, so that
    they write their checkpoints; those that wait are not begun.

    Args:
        commands: `sqs` commands by name.
        jobs: processes at a time; torch's threads are divided among them.
        say: called, from several threads, with each line that a command writes to stderr and the command's name.

    Raises:
        RuntimeError: a command ended with a traceback.
    """
    # Processes that each took all cores would wait for one another in every product.
    children = _Children(max(1, torch.get_num_threads() // jobs), say)
    # A thread for each process only waits for its lines; they end before the pool does.
    with ThreadPoolExecutor(jobs) as pool:
        futures = [pool.submit(children.run, name, command) for name, command in commands.items()]
        try:
            for future in as_completed(futures):
                yield future.result()
        except BaseException:  # Ctrl-C, GeneratorExit where the caller stops reading, or a child's bug
            children.interrupt()
            pool.shutdown(cancel_futures=True)
            raise


class _Children:
    """The processes that run; in sessions of their own, so that a terminal's Ctrl-C reaches them only once."""

    def __init__(self, threads: int, say: Callable[[str], None]) -> None:
        self._environment = {**os.environ, "OMP_NUM_THREADS": str(threads), "MKL_NUM_THREADS": str(threads)}
        self._say = say
        self._running: set[subprocess.Popen[str]] = set()
        self._lock = Lock()  # of the two below: pool threads start and end processes, the main one interrupts
        self._stopped = False

    def run(self, name: str, command: Sequence[str | Path]) -> Outcome:
        process = self._start(command)
        if process is None:
            return name, "Interrupted."
        said = []
        with process:  # closes its stderr and waits for it
            for line in process.stderr or ():
                said.append(line.rstrip())
                self._say(f"{name}: {said[-1]}")
        with self._lock:
            self._running.remove(process)
        return name, self._failure(process.returncode, said)

    def _start(self, command: Sequence[str | Path]) -> "subprocess.Popen[str] | None":
        # Under the lock: no process starts between the interruption's look at those that run and its end.
        with self._lock:
            if self._stopped:
                return None
            process = subprocess.Popen(
                command,
                env=self._environment,
                stdout=subprocess.DEVNULL,  # its tables; results are read from its directory
                stderr=subprocess.PIPE,
                text=True,
                start_new_session=True,
            )
            self._running.add(process)
            return process

    def _failure(self, code: int, said: Sequence[str]) -> str | None:
        if code == 0:
            return None
        sentences = [line.removeprefix(_ERROR) for line in said if line.startswith(_ERROR)]
        if code == _BAD_INPUT and sentences:
            return sentences[-1]
        # After an interruption any end counts as one: a library may turn Ctrl-C into an error of its own.
        if code < 0 or code == _INTERRUPTED or self._stopped:
            by = signal.Signals(-code).name if code < 0 else "Ctrl-C"
            return f"The process of this run was ended by {by}: the same command goes on from its last checkpoint."
        raise RuntimeError("A run ended with a bug:\n" + "\n".join(said))

    def interrupt(self) -> None:
        with self._lock:
            self._stopped = True
            for process in self._running:
                process.send_signal(signal.SIGINT)
