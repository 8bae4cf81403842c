"""A small share of the fuzzers; `make fuzz` runs all of them."""

import pytest

from fuzz.kinds import KINDS
from fuzz.run import run_kind

_FEW = {"packed": 60, "hugging_face": 8, "streamed": 8}


@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
@pytest.mark.parametrize("made", KINDS, ids=lambda kind: kind.name)
def test_damaged_files_are_refused_in_one_sentence_or_read_right(made, tmp_path, monkeypatch):
    monkeypatch.setenv("SQS_CACHE", str(tmp_path))
    kind = made()
    kind.prepare(tmp_path)
    found = run_kind(kind, range(_FEW.get(kind.name, 20)), 1, tmp_path)
    assert not found.failures
    assert found.counts["refused"] + found.counts["right"] > 0
