"""Tables and pictures of a study show the numbers of its summary."""

import io

import matplotlib.image
import numpy as np
import pytest
from kits.study import metrics, result
from rich.console import Console

from sqs_pyro.reporting.study_plots import comparison_figure, sweep_figure
from sqs_pyro.reporting.study_summary import summarise
from sqs_pyro.reporting.study_tables import comparison_tables, sweep_tables

SIZES = {"large": [3000, 1500], "small": [2000, 900]}


@pytest.fixture
def summary():
    results = [
        result(variant, seed, metrics(0.95 - 50 / size - seed / 100, 0.1 + 50 / size, size), {"grid.size": size})
        for variant, sizes in SIZES.items()
        for size in sizes
        for seed in (0, 1)
    ]
    return summarise("a study", [*results, result("broken", 0, None, error="The loss is not finite.")])


def _text(tables, width=120):
    console = Console(file=io.StringIO(), width=width)
    for table in tables:
        console.print(table)
    return console.file.getvalue()


def test_comparison_shows_means_deviations_and_failures(summary):
    text = _text(comparison_tables(summary))
    row = next(line for line in text.splitlines() if "size=3000" in line)
    assert "92.83±.71" in row  # mean of 0.9333 and 0.9233 in percent, and their standard deviation
    assert "2.17±.71" in row  # below fp32
    assert "3,000" in row
    assert "75.0" in row  # zeros
    assert "large" in text
    assert "broken, seed 0: The loss is not finite." in text
    assert "fp32 accuracy 95.00 %" in text


def test_sweep_marks_the_front(summary):
    lines = _text(sweep_tables(summary)).splitlines()
    starred = {line.split()[0] for line in lines if line.rstrip() and " * " in line}
    assert {"grid.size=3000", "grid.size=1500"} <= starred
    assert any("validation" in line for line in lines)


def test_averages_have_a_table_of_their_own():
    averaged = metrics(averaged={"accuracy": 0.91, "nll": 0.1234, "ece": 0.02, "brier": 0.09})
    text = _text(comparison_tables(summarise("s", [result("a", 0, averaged)])))
    assert "Average over networks" in text
    assert "0.1234" in text


def _compared(*nlls, seeds=4):
    """A reference and variants whose NLLs are larger by so much, give or take 0.01."""
    offsets = {"reference": 0.0, **{f"variant {i}": nll for i, nll in enumerate(nlls)}}
    results = [
        result(name, seed, metrics(nll=0.1 + 0.02 * seed + (offset and offset + 0.01 * (-1) ** seed)))
        for name, offset in offsets.items()
        for seed in range(seeds)
    ]
    return _text(comparison_tables(summarise("s", results)))


def test_stars_are_for_differences_beyond_chance():
    lines = _compared(0.01, 0.02, -0.1).splitlines()  # p = 0.18, 0.04 and 0.0004
    start = next(i for i, line in enumerate(lines) if "Differences from reference at the same seed" in line)
    chance, alone, corrected = (
        next(line for line in lines[start:] if line.startswith(f"variant {i}")).split() for i in range(3)
    )
    half = 3.1824463 * 0.01 * np.sqrt(4 / 3) / 2  # the quantile at 3 degrees of freedom times the standard error
    spread = f"{half:.4f}".removeprefix("0")
    assert chance[3] == f"+0.0100±{spread}"
    assert alone[3] == f"+0.0200±{spread}*"
    assert corrected[3] == f"-0.1000±{spread}**"
    assert "Holm's correction for 3 comparisons" in lines[-1]


def test_differences_of_two_seeds_are_not_told_from_chance():
    assert "from 3 seeds on they can be told from chance" in _compared(0.1, seeds=2)
    assert "Differences" not in _compared(0.1, seeds=1)


def test_nothing_finished_is_said():
    text = _text(sweep_tables(summarise("s", [result("a", 0, None, error="No.")])))
    assert "every run failed" in text


def test_curves_are_the_means_over_the_size(summary):
    accuracy, nll = sweep_figure(summary).axes[:2]
    curves = {container.get_label(): container.lines[0] for container in accuracy.containers}
    assert set(curves) == {"large", "small", "broken"}
    assert len(curves["broken"].get_xdata()) == 0
    assert list(curves["large"].get_xdata()) == sorted(SIZES["large"])
    assert list(curves["large"].get_ydata()) == pytest.approx(
        [100 * (0.945 - 50 / 1500), 100 * (0.945 - 50 / 3000)]
    )
    assert list(nll.containers[1].lines[0].get_ydata()) == pytest.approx([0.1 + 50 / 900, 0.1 + 50 / 2000])
    bar = accuracy.containers[0].lines[2][1].get_segments()[0]
    assert np.diff(bar[:, 1])[0] == pytest.approx(2 * 100 * np.std([0, 0.01], ddof=1))
    rings = next(line for line in accuracy.lines if line.get_label() == "Pareto front")
    assert sorted(rings.get_xdata()) == [900, 1500, 2000, 3000]


def test_rows_are_points_and_dots_are_seeds(summary):
    accuracy = comparison_figure(summary).axes[0]
    assert [label.get_text() for label in accuracy.get_yticklabels()] == [
        "large: grid.size=3000",
        "large: grid.size=1500",
        "small: grid.size=2000",
        "small: grid.size=900",
        "broken",
    ]
    dots = [line for line in accuracy.lines if line.get_marker() == "o"]
    assert len(dots) == 4  # the broken one has none
    np.testing.assert_allclose(dots[0].get_xdata(), [100 * (0.95 - 50 / 3000), 100 * (0.94 - 50 / 3000)])


@pytest.mark.parametrize(
    ("draw", "failed"),
    [
        (comparison_figure, False),
        (sweep_figure, True),
        pytest.param(sweep_figure, False, marks=pytest.mark.slow),
        pytest.param(comparison_figure, True, marks=pytest.mark.slow),
    ],
)
def test_pictures_are_written_and_not_blank(summary, tmp_path, draw, failed):
    if failed:
        summary = summarise("s", [result("a", 0, None, error="No.")])
    draw(summary).savefig(tmp_path / "picture.png")
    image = matplotlib.image.imread(tmp_path / "picture.png")
    assert (image[..., :3].min(axis=2) < 0.8).mean() > 0.002
