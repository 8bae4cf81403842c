"""Processes in which nothing of ours has run yet, in no time: forks of one that has imported torch and waits.

For tests of what is imported, compiled or left out by the environment, which this process has behind it.
"""

import atexit
import itertools
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

TORCH = "numpy, pydantic, pyro, torch"
#: For what imports transformers, but is not about what that imports in turn: most of its time, without any of it.
UNDER_TRANSFORMERS = f"{TORCH}, torch._dynamo, torch.distributed.tensor, scipy.optimize, PIL.Image, tokenizers"
#: For what needs the library, but is not about how it is imported.
LIBRARY = f"{TORCH}, torch._dynamo, sqs_pyro.kernels"
_SERVER = """
import json, os, signal, sys, traceback


def run(code, arguments, environment, output, errors):
    for descriptor, path in ((1, output), (2, errors)):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), descriptor)
    os.environ.clear()
    os.environ.update(environment)
    sys.argv = ["-c", *arguments]
    status = 0
    try:
        exec(compile(code, "<string>", "exec"), {"__name__": "__main__"})
    except SystemExit as error:
        status = error.code if isinstance(error.code, int) else error.code is not None
    except BaseException:
        status = 1
        traceback.print_exc()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody waits for those that wait
for line in sys.stdin:
    number, *rest = json.loads(line)
    if os.fork() == 0:
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        child = os.fork()
        if child == 0:
            run(*rest)
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        os.write(1, f"{number} {status}\\n".encode())
        os._exit(0)
"""

_numbers = itertools.count()
_ended: dict[int, int] = {}


class Ended(NamedTuple):
    """What has become of a process, as of one that :func:`subprocess.run` has run."""

    returncode: int
    stdout: str
    stderr: str


class Started:
    """A process that runs.

    Args:
        code: what it executes.
        arguments: its ``sys.argv``, behind the first.
        environment: variables beside those of this process, or in their place.
        imported: what is there already.
    """

    def __init__(
        self, code: str, *arguments: object, environment: Mapping[str, str] | None = None, imported: str = TORCH
    ):
        self.number, self.made = next(_numbers), tempfile.TemporaryDirectory()
        self.outputs = [Path(self.made.name, stream) for stream in ("output", "errors")]
        variables = {**os.environ, **(environment or {})}
        order = [self.number, code, [*map(str, arguments)], variables, *map(str, self.outputs)]
        self.server = server = _server(imported)
        server.stdin.write(json.dumps(order) + "\n")
        server.stdin.flush()

    def wait(self) -> Ended:
        """Wait until it ends."""
        while self.number not in _ended:
            line = self.server.stdout.readline()
            assert line, "the process that starts others has ended"
            number, status = map(int, line.split())
            _ended[number] = status
        with self.made:
            return Ended(_ended.pop(self.number), *(path.read_text() for path in self.outputs))


def run(code: str, *arguments: object, **options: Any) -> Ended:
    """Execute code in a process of its own; see :class:`Started`."""
    return Started(code, *arguments, **options).wait()


def run_tests(*options: object, environment: Mapping[str, str], imported: str = TORCH) -> None:
    """Run other tests of ours where the environment is another: none may fail, or be skipped."""
    code = "import sys, pytest; sys.exit(pytest.main(['-p', 'no:cacheprovider', *sys.argv[1:]]))"
    ended = run(code, *options, environment=environment, imported=imported)
    assert ended.returncode == 0 and "passed" in ended.stdout, (ended.stdout + ended.stderr)[-5000:]
    assert "skipped" not in ended.stdout, ended.stdout[-2000:]


@cache
def _server(imported: str) -> subprocess.Popen:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-W", "ignore", "-c", f"import {imported}\n{_SERVER}"]
    where = Path(__file__).parents[2]  # not where a test may have gone
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    server = subprocess.Popen(command, env=environment, cwd=where, **pipes)
    atexit.register(server.communicate)  # which closes its input, so that it ends
    return server
