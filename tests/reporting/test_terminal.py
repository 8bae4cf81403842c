"""Progress: a bar on a terminal, few lines elsewhere, nothing on stdout."""

import io
import re
import time

import pytest

from sqs_pyro.reporting import terminal


class _Terminal(io.StringIO):
    encoding = "utf-8"

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


@pytest.mark.parametrize("width", [60, 80, 120])
def test_bar_percentage_time_and_first_figure_stay_at_every_width(width, monkeypatch):
    monkeypatch.setenv("COLUMNS", str(width))
    stream = _Terminal()
    with terminal.progress_display(stream) as tell:
        tell("compression", 40, 100, "validation 94.57%, loss 1.585, non-zero 20.0%, a stage with a long name")
    lines = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", stream.getvalue()).replace("\r", "\n").splitlines()
    shown = next(line for line in reversed(lines) if "compression" in line)
    assert "━━━━" in shown and " 40%" in shown and "-:--:--" in shown and "validation 94.57%" in shown
    assert max(map(len, lines)) <= width
    assert ("loss 1.585" in shown) == (width >= 80)


def test_figures_that_do_not_fit_are_left_out_whole():
    text = "validation 94.57%, loss 1.585"
    assert terminal.first_figures(text, 29) == text
    assert terminal.first_figures(text, 28) == "validation 94.57%"
    assert terminal.first_figures("resnet20 (rate=0.125)", 12) == "resnet20"


def test_a_terminal_of_few_characters_gets_replacements():
    stream = _Terminal()
    stream.encoding = "ascii"
    with terminal.progress_display(stream) as tell:
        tell("study", 1, 2, "σ ± 1")
    stream.getvalue().encode("ascii")
    assert "sigma +- 1" in stream.getvalue()
