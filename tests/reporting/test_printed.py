"""Every report prints itself at any width, in any encoding, to any stream: nothing is cut or broken."""

import fcntl
import io
import os
import re
import struct
import termios
import threading
from collections import Counter
from itertools import product

import pytest
from kits.reports import REPORTS
from rich.cells import cell_len

from sqs_pyro.reporting.characters import written
from sqs_pyro.reporting.fitted import FittedTable, fold
from sqs_pyro.reporting.printed import Printed, Report, line_width, print_report

_EVERY = pytest.mark.parametrize("name", REPORTS)
_ANSI = re.compile(r"\x1b\[[0-9;?]*[a-zA-Z]")


def _report(name: str) -> Report:
    made = REPORTS[name]()
    return made.table() if isinstance(made, Printed) else made


def _numbers(text: str) -> Counter[str]:
    return Counter(re.findall(r"\d+(?:[.,]\d+)*", text))


def _check(text: str, width: int, whole: str) -> None:
    """Nothing is wider than the terminal, and all numbers of the text that nothing has folded are there."""
    assert max(cell_len(line) for line in text.splitlines()) <= width
    assert not _numbers(whole) - _numbers(text)
    for trouble in ("object at 0x", "Traceback", "…"):
        assert trouble not in text


_PAGES = product((60, 80, 120), ("utf-8", "ascii", "latin-1"))
_FEW = {(60, "ascii"), (80, "utf-8"), (120, "latin-1")}  # each width and each encoding once


@_EVERY
@pytest.mark.parametrize(
    ("width", "encoding"),
    [page if page in _FEW else pytest.param(*page, marks=pytest.mark.slow) for page in _PAGES],
)
def test_text_fits_every_width_in_every_encoding(name, width, encoding):
    report = _report(name)
    text = report.text(width, encoding)
    text.encode(encoding)
    _check(text, width, report.text(500, encoding))


@_EVERY
def test_print_shows_the_table(name, monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "80")
    made = REPORTS[name]()
    print(made)
    shown = capsys.readouterr().out
    assert shown == f"{made}\n" == f"{made!r}\n"
    _check(shown, 80, _report(name).text(500))


@_EVERY
def test_a_notebook_shows_the_table(name):
    made = REPORTS[name]()
    bundle = made._repr_mimebundle_()
    assert bundle["text/plain"] == str(made)
    assert bundle["text/html"] == made._repr_html_()
    assert made._repr_html_().startswith("<pre")
    assert not _numbers(_report(name).text(120)) - _numbers(made._repr_html_())


@_EVERY
@pytest.mark.parametrize("encoding", ["utf-8", "ascii"])
@pytest.mark.parametrize("width", [60, 80])
def test_a_terminal_and_a_pipe_get_what_they_can_show(name, width, encoding, monkeypatch):
    monkeypatch.delenv("COLUMNS", raising=False)
    monkeypatch.setenv("TERM", "xterm")
    report = _report(name)
    _check(_through_terminal(report, width, encoding), width, report.text(500, encoding))
    pipe = io.TextIOWrapper(io.BytesIO(), encoding)
    print_report(report, pipe, width=width)
    pipe.flush()
    _check(pipe.buffer.getvalue().decode(encoding), width, report.text(500, encoding))


def _through_terminal(report: Report, width: int, encoding: str) -> str:
    """What a terminal of this width receives, read while it is written, so that its buffer is never full."""
    master, slave = os.openpty()
    fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", 24, width, 0, 0))
    found = bytearray()
    reader = threading.Thread(target=_read, args=(master, found))
    reader.start()
    with os.fdopen(slave, "w", encoding=encoding) as stream:
        print_report(report, stream)
    reader.join(10)
    os.close(master)
    return _ANSI.sub("", found.decode(encoding)).replace("\r\n", "\n")


def _read(terminal: int, found: bytearray) -> None:
    while True:
        try:
            found.extend(os.read(terminal, 4096))
        except OSError:  # the other end is closed
            return


def test_columns_wins_over_the_default_and_a_terminal_over_neither(monkeypatch):
    monkeypatch.setenv("COLUMNS", "72")
    assert line_width(io.StringIO()) == 72
    monkeypatch.setenv("COLUMNS", "many")
    assert line_width(io.StringIO()) == 80
    monkeypatch.delenv("COLUMNS")
    assert line_width(io.StringIO(), 120) == 120


@pytest.mark.parametrize("width", [1, 5, 12, 40])
def test_folding_loses_nothing(width):
    text = "see runs/some/long_directory.d/packed-file.safetensors of 1,234,567 bytes"
    lines = fold(text, width)
    assert max(map(len, lines)) <= width
    assert "".join(lines).replace(" ", "") == text.replace(" ", "")


def test_folding_breaks_no_number_that_fits():
    lines = fold("a=1,234,567.89/b=12.5e-3", 13)
    assert "1,234,567.89/" in " ".join(lines)


def test_a_table_without_rows_and_with_one_column_prints():
    assert "name" in Report(FittedTable("name", "value")).text(40)
    assert "name" in Report(FittedTable("name")).text(40)


def test_replacements_are_plain():
    assert written("λ ± 3×4 µs → σ é 漢", "ascii") == "lambda +- 3x4 us -> sigma e ?"
    assert written("± é", "latin-1") == "± é"
