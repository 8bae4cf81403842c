"""Commands side by side: outcomes, progress, and a Ctrl-C that stops them all, once."""

import signal
import sys
import time

import pytest

from sqs_pyro.studies.processes import run_commands


def _command(code):
    return [sys.executable, "-c", code]


def _nothing(text):
    pass


def test_outcomes():
    commands = {
        "good": _command("print('a result')"),
        "input": _command("import sys; print('error: a sentence.', file=sys.stderr); sys.exit(2)"),
        "killed": _command("import os, signal; os.kill(os.getpid(), signal.SIGKILL)"),
        "interrupted": _command("import sys; sys.exit(130)"),
    }
    outcomes = dict(run_commands(commands, 2, _nothing))
    assert outcomes["good"] is None
    assert outcomes["input"] == "a sentence."
    assert "ended by SIGKILL" in outcomes["killed"]
    assert "ended by Ctrl-C" in outcomes["interrupted"]


def test_a_bug_is_raised_with_its_traceback():
    with pytest.raises(RuntimeError, match="ZeroDivisionError"):
        list(run_commands({"bug": _command("1 / 0")}, 2, _nothing))


def test_what_they_say_is_told_under_their_names():
    told = []
    speak = "import sys; print('compression 1/2', file=sys.stderr)"
    list(run_commands({"a": _command(speak), "b": _command(speak)}, 2, told.append))
    assert sorted(told) == ["a: compression 1/2", "b: compression 1/2"]


def test_no_more_than_so_many_at_a_time(tmp_path):
    code = f"""
import os, pathlib, time
here = pathlib.Path({str(tmp_path)!r}, str(os.getpid()))
here.touch()
time.sleep(0.3)
assert len(list(here.parent.iterdir())) <= 2, "three at a time"
here.unlink()
"""
    outcomes = dict(run_commands({str(i): _command(code) for i in range(5)}, 2, _nothing))
    assert outcomes == dict.fromkeys("01234")


COUNTS_INTERRUPTIONS = """
import pathlib, signal, sys, time
count = 0
def interrupted(*_):
    global count
    count += 1
signal.signal(signal.SIGINT, interrupted)
print("ready", file=sys.stderr, flush=True)
end = time.monotonic() + 20
while not count and time.monotonic() < end:
    time.sleep(0.01)
time.sleep(0.3)
pathlib.Path({path!r}).write_text(str(count))
sys.exit(130)
"""


@pytest.mark.parametrize("how", ["closed", "interrupted"])
def test_an_interruption_reaches_each_once_and_is_waited_for(tmp_path, how):
    paths = [tmp_path / name for name in ("a", "b")]
    commands = {path.name: _command(COUNTS_INTERRUPTIONS.format(path=str(path))) for path in paths}
    waiting = tmp_path / "waiting"  # has no place among two
    commands = {"short": _command(""), **commands, "waiting": _command(f"open({str(waiting)!r}, 'w')")}
    ready = []
    work = run_commands(commands, 3 if how == "closed" else 2, ready.append)
    assert next(work) == ("short", None)
    end = time.monotonic() + 20
    while len(ready) < 2 and time.monotonic() < end:
        time.sleep(0.01)
    if how == "closed":
        work.close()
    else:
        signal.setitimer(signal.ITIMER_REAL, 0.2)
        previous = signal.signal(signal.SIGALRM, signal.default_int_handler)  # what Ctrl-C does
        try:
            with pytest.raises(KeyboardInterrupt):
                next(work)
        finally:
            signal.signal(signal.SIGALRM, previous)
    assert [path.read_text() for path in paths] == ["1", "1"]
    assert how == "closed" or not waiting.exists()
