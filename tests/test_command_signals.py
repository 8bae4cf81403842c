"""Ctrl-C and SIGTERM at any moment of a command: one line, and the exit code of the signal."""

import os
import signal
import subprocess
import sys
import time

import pytest

from sqs_pyro import _command
from sqs_pyro.compression.interruption import Terminated, deferred_interrupt, interruptions_as_exceptions

SIGNALS = [(signal.SIGINT, KeyboardInterrupt), (signal.SIGTERM, Terminated)]


@pytest.mark.parametrize(
    ("started", "found"),
    [
        (["/usr/bin/sqs", "compress"], True),
        (["-m"], False),  # of pytest
        (["train.py"], False),
        (["/home/me/sqs/train.py"], False),
        ([], False),
    ],
)
def test_a_program_that_imports_us_is_no_command(started, found, monkeypatch):
    monkeypatch.setattr(sys, "argv", started)
    monkeypatch.setattr(sys, "orig_argv", ["python", "-m", "pytest"])
    assert _command.is_command() == found


def test_the_module_is_a_command(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["-m"])
    monkeypatch.setattr(sys, "orig_argv", ["python", "-X", "utf8", "-m", "sqs_pyro", "report"])
    assert _command.is_command()


@pytest.mark.parametrize(("number", "error"), SIGNALS)
def test_signals_are_exceptions_that_wait_for_the_step(number, error):
    before, reached = signal.getsignal(number), []
    with pytest.raises(error), interruptions_as_exceptions():
        with deferred_interrupt():
            os.kill(os.getpid(), number)
            reached.append("end of step")
        reached.append("next step")
    assert reached == ["end of step"] and signal.getsignal(number) == before


@pytest.mark.parametrize(("number", "error"), SIGNALS)
def test_a_second_signal_does_not_wait(number, error):
    with pytest.raises(error), interruptions_as_exceptions(), deferred_interrupt():
        os.kill(os.getpid(), number)
        os.kill(os.getpid(), number)
        pytest.fail("the second one was deferred")


def test_what_is_ignored_stays_ignored():
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with interruptions_as_exceptions(), deferred_interrupt():
            os.kill(os.getpid(), signal.SIGINT)
    finally:
        signal.signal(signal.SIGINT, before)


def test_an_interruption_within_executed_text(tmp_path):
    # Python's own note of it would end `python -m` by the signal, and not with the command's exit code.
    (tmp_path / "program.py").write_text(
        "from sqs_pyro import cli\n"
        "from sqs_pyro.cli.running import one_sentence_errors\n"
        "@cli.app.command('executed')\n"
        "def executed():\n"
        "    with one_sentence_errors():\n"
        "        exec('raise KeyboardInterrupt')\n"
        "cli.main()\n"
    )
    command = [sys.executable, "-m", "program", "executed"]
    process = subprocess.run(
        command, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": str(tmp_path)}
    )
    assert (process.returncode, process.stderr) == (130, "Interrupted.\n")


@pytest.mark.slow
@pytest.mark.parametrize("seconds", [0.4, 1.0, 2.0])
@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_while_everything_is_imported(number, code, seconds, tmp_path):
    command = [sys.executable, "-m", "sqs_pyro", "compress", "recipes/digits.yaml", "--out", tmp_path / "run"]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    time.sleep(seconds)
    process.send_signal(number)
    _, said = process.communicate()
    assert process.returncode == code
    assert said.count("\n") == 1 and said.startswith("Interrupted")
