"""Every example runs, shows what it promises, and is short."""

import re
import runpy
import sys
from pathlib import Path

import pyro
import pytest
import torch

EXAMPLES = {path.stem: path for path in (Path(__file__).parents[1] / "examples").glob("*.py")}


@pytest.fixture
def printed(capsys, monkeypatch):
    """Run an example with these arguments and return what it printed."""

    def run(name: str, *arguments: str) -> str:
        monkeypatch.setattr(sys, "argv", [str(EXAMPLES[name]), *arguments])
        pyro.clear_param_store()
        with torch.random.fork_rng():
            runpy.run_path(str(EXAMPLES[name]), run_name="__main__")
        return capsys.readouterr().out

    return run


def number(pattern: str, text: str) -> float:
    found = re.search(pattern, text)
    assert found, f"{pattern!r} is not in what was printed:\n{text}"
    return float(found[1])


def table(text: str, width: int) -> dict[str, list[float]]:
    """Numbers of each row by its name, which has this many columns; a heading has none."""
    rows = [(line[:width].strip(), line[width:].replace("%", "").split()) for line in text.splitlines()]
    return {
        name: [float(cell) for cell in cells]
        for name, cells in rows
        if cells and all(re.fullmatch(r"[\d.]+", cell) for cell in cells)
    }


@pytest.mark.parametrize("name", EXAMPLES)
def test_is_short_and_says_how_to_run_it(name):
    text = EXAMPLES[name].read_text(encoding="utf-8")
    assert len(text.splitlines()) <= 60
    assert f"    python examples/{name}.py" in text.split('"""')[1]
    assert "pyro.set_rng_seed(" in text or "torch.manual_seed(" in text


def test_each_is_on_the_page_about_pyro():
    page = (Path(__file__).parents[1] / "docs" / "pyro.md").read_text(encoding="utf-8")
    assert all(f"](../examples/{path.name})" in page for path in EXAMPLES.values())


def test_each_is_tested():
    asserted = re.findall(r"printed\(\"(\w+)\"", Path(__file__).read_text(encoding="utf-8"))
    assert sorted(asserted) == sorted(EXAMPLES)


@pytest.mark.slow
def test_bnn_regression(printed, tmp_path):
    text = printed("bnn_regression", str(tmp_path / "band.png"))
    assert 0.08 < number(r"noise: ([\d.]+)", text) < 0.2
    assert number(r"data: (\d+)%", text) >= 90
    within, beyond = number(r"within the data: ([\d.]+)", text), number(r"beyond: ([\d.]+)", text)
    assert within > 0.02 and beyond > 1.5 * within
    assert (tmp_path / "band.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.slow
def test_spike_and_slab_regression(printed):
    text = printed("spike_and_slab_regression")
    assert "chosen: [2, 7, 11], truth: [2, 7, 11]" in text
    rows = [line.split() for line in text.splitlines()[1:21]]
    for _, truth, probable, mean in rows:
        assert float(probable) > 0.95 if float(truth) else float(probable) < 0.3
        assert abs(float(mean) - float(truth)) < 0.2
    assert number(r"noise: ([\d.]+)", text) == pytest.approx(0.5, abs=0.1)


@pytest.mark.slow
def test_swap_priors(printed):
    rows = table(printed("swap_priors"), 26)
    assert len(rows) == 5 and rows["Gaussian, no spike"][0] == 100
    assert rows["spike and Gaussian"][0] < 80
    for _, accuracy, nll in rows.values():
        assert accuracy > 92 and nll < 0.35


@pytest.mark.slow
def test_own_prior(printed):
    text = printed("own_prior")
    truth, mean, included = ([float(cell) for cell in line.split()[1:]] for line in text.splitlines()[:3])
    assert max(abs(a - b) for a, b in zip(truth, mean, strict=True)) < 0.3
    assert min(included[:3]) > 0.95 and max(included[6:]) < 0.5
    kl = number(r"KL from draws ([\d.]+)", text)
    assert kl < number(r"bound ([\d.]+)", text) < 1.2 * kl


@pytest.mark.slow
def test_compress_and_trust(printed):
    text = printed("compress_and_trust")
    before, after = re.search(r"([\d,]+) bytes of the trained network are ([\d,]+)", text).groups()
    assert int(after.replace(",", "")) < int(before.replace(",", "")) / 8
    rows = table(text, 20)
    assert min(accuracy for accuracy, _, _ in rows.values()) > 92
    assert rows["MAP, scaled"][1] < rows["MAP"][1]  # NLL
