"""What is told of steps, and when a bar appears without being asked for."""

import io
import sys

import pytest

from sqs_pyro.compression.finetune.loop import StepRecord
from sqs_pyro.compression.finetune.telling import step_teller, told


def record(step, score=None):
    return StepRecord(step, 20, "dense", 1.5, 1.4, 2.0, 0.05, 0.25, 1.0, 0.02, score)


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_the_last_validation_stays_in_the_line():
    lines = []
    tell = step_teller(lambda *told: lines.append(told))
    for each in (record(1), record(10, 0.5), record(15)):
        tell("compression", each)
    rest = "loss 1.500, non-zero 25.0%, dense"
    assert [text for *_, text in lines] == [rest, f"validation 50.00%, {rest}", f"validation 50.00%, {rest}"]
    assert lines[0][:3] == ("compression", 1, 20)


@pytest.mark.parametrize(
    ("progress", "stream", "notebook", "shown"),
    [
        (None, io.StringIO, False, False),
        (None, Terminal, False, True),
        (None, io.StringIO, True, True),
        (True, io.StringIO, False, True),
        (False, Terminal, True, False),
    ],
)
def test_a_bar_appears_where_somebody_looks(progress, stream, notebook, shown, monkeypatch):
    monkeypatch.setattr(sys, "stderr", stream())
    monkeypatch.setitem(sys.modules, "ipykernel", sys) if notebook else None
    with told(progress) as tell:
        assert (tell is not None) == shown
        if tell is not None:
            tell(record(20))
    assert ("compression" in sys.stderr.getvalue()) == shown


def test_a_function_of_ones_own_is_called_and_nothing_else():
    seen = []
    with told(seen.append) as tell:
        tell(record(3))
    assert [each.step for each in seen] == [3]
