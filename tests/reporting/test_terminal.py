"""Progress: a bar on a terminal, few lines elsewhere, nothing on stdout."""

import io
import time

from sqs_pyro.reporting import terminal


class _Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def _tell_everything(stream):
    with terminal.progress_display(stream) as tell:
        for step in range(1, 101):
            tell("compression", step, 100, f"loss {step}")
    return stream.getvalue()


def test_without_a_terminal_there_is_a_first_and_a_last_line():
    assert _tell_everything(io.StringIO()).splitlines() == [
        "compression 1/100 loss 1",
        "compression 100/100 loss 100",
    ]


def test_without_a_terminal_there_is_a_line_now_and_then(monkeypatch):
    seconds = iter(range(1000))
    monkeypatch.setattr(time, "monotonic", lambda: float(next(seconds)))
    lines = _tell_everything(io.StringIO()).splitlines()
    assert [line.split()[1] for line in lines] == [
        *(f"{step}/100" for step in range(1, 101, int(terminal.LINE_EVERY))),
        "100/100",
    ]


def test_a_terminal_gets_a_bar_that_ends_full(capsys):
    shown = _tell_everything(_Terminal())
    assert "compression" in shown
    assert "100%" in shown
    assert "loss 100" in shown
    assert capsys.readouterr() == ("", "")


def test_a_stage_that_begins_again_starts_its_bar_anew(monkeypatch):
    bars = []
    make = terminal._bars
    monkeypatch.setattr(terminal, "_bars", lambda console: bars.append(make(console)) or bars[0])
    with terminal.progress_display(_Terminal()) as tell:
        tell("compression", 90, 100, "first run")
        started = bars[0].tasks[0].start_time
        tell("compression", 10, 100, "second run")
        (task,) = bars[0].tasks
        assert (task.completed, task.fields["text"]) == (10, "second run")
        assert task.start_time > started
