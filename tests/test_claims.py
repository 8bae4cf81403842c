"""Differences that README and docs/ claim: tested by the committed figures, with tests that are what they say."""

import importlib
import json
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def benchmarks():
    """Modules of benchmarks/, which is no package."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(ROOT / "benchmarks"))
        yield importlib.import_module


@pytest.fixture(scope="module")
def found(benchmarks):
    return benchmarks("significance").rows()


def test_the_page_and_the_file_are_what_committed_figures_give(benchmarks, found):
    script = benchmarks("significance")
    kept = json.loads((ROOT / "benchmarks" / "significance.json").read_text(encoding="utf-8"))["rows"]
    assert len(kept) == len(found)
    for row, before in zip(found, kept, strict=True):
        for name in ("difference", "interval", "p", "p_holm"):
            assert np.allclose(row[name] or 0.0, before[name] or 0.0, rtol=1e-6, atol=1e-12), row["what"]
        assert {
            key: row[key] for key in ("says", "what", "file", "n", "of", "unit", "verdict")
        }.items() <= before.items()
    page = script.PAGE.read_text(encoding="utf-8")
    assert script.with_table(page, script.markdown(kept)) == page


def test_no_claim_is_contradicted_or_unsaid(benchmarks, found):
    """What is claimed to differ does; where only one run is, its page says so."""
    for row in found:
        assert row["verdict"] not in ("contradicted", "not shown"), row
        if row["verdict"] in ("one run", "2 runs"):
            pages = [benchmarks("significance").page_of(name).read_text(encoding="utf-8") for name in row["says"]]
            said = ("one run", "One run", "One setting", "measured once", "of two processes", "of two runs")
            assert all(any(words in " ".join(page.split()) for words in said) for page in pages), row


@pytest.mark.parametrize(
    ("place", "said"),
    [
        (("no_such.json", "rows"), "no_such.json has nothing"),
        (("ranks.json", "repeats", 0, "three"), r"nothing at \['repeats', 0, 'three'\]"),
        (("ranks.json", "ranks", {"ranks": 3}), "nothing at"),
        (("generation.json", "rows", {"threads": 1}, "tokens"), "nothing at"),  # which of them?
    ],
)
def test_figures_that_are_gone_end_it(benchmarks, place, said):
    with pytest.raises(SystemExit, match=said):
        benchmarks("claim").at(place)


def test_a_sentence_that_is_gone_ends_it(benchmarks, monkeypatch):
    script = benchmarks("significance")
    claim = benchmarks("claim").replace(script.CLAIMS[0], says={"goals.md": "infinitely smaller"})
    monkeypatch.setattr(script, "CLAIMS", [claim])
    with pytest.raises(SystemExit, match=r"goals\.md no longer says 'infinitely smaller'"):
        script.rows()


def test_shares_of_examples_against_paired_answers(benchmarks):
    """Where two never err together the interval is that of their paired answers; else it is wider."""
    examples = benchmarks("claim").examples
    ours, theirs = np.ones(500), np.ones(500)
    ours[:20], theirs[20:55] = 0, 0

    def paired(first, second):
        spread = (first - second).std() / np.sqrt(500)
        return [(first - second).mean() + sign * 1.95996 * spread for sign in (-1, 1)]

    found = examples(ours.mean(), theirs.mean(), None, n=500)
    assert found.interval == pytest.approx(paired(ours, theirs), abs=1e-6)
    together = np.roll(theirs, -20)  # the same shares, erring on the same examples
    low, high = paired(ours, together)
    assert found.interval[0] < low < high < found.interval[1]


def test_medians_against_their_spread_in_draws(benchmarks):
    """The interval of how many times as fast is that of medians drawn again and again."""
    draws = np.random.default_rng(0).lognormal(0.0, 0.2, (4000, 40))
    log_of_medians = np.log(np.median(draws, 1))
    low, middle, high = np.exp(0.2 * np.array([-0.6745, 0.0, 0.6745]))
    times = {"microseconds": middle, "lower_quartile": low, "upper_quartile": high}
    twice = {name: 2 * value for name, value in times.items()}
    found = benchmarks("claim").medians(times, twice, {"rounds": 40})
    assert found.difference == pytest.approx(2)
    half = np.log(found.interval[1] / 2)
    assert half == pytest.approx(1.96 * np.sqrt(2) * log_of_medians.std(), rel=0.05)
