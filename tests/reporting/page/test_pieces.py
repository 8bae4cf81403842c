"""Markup, axes, treemaps and curves, each against what it must keep to."""

import json
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from kits.page import Page

from sqs_pyro.reporting.layers import LayerPicture, layer_document
from sqs_pyro.reporting.page.axis import axis
from sqs_pyro.reporting.page.chart import MOST_POINTS, smoothed, thinned
from sqs_pyro.reporting.page.markup import Markup, element
from sqs_pyro.reporting.page.numbers import finite, short_bytes, short_time
from sqs_pyro.reporting.page.treemap import Rectangle, squarified


@given(st.text(), st.text())
def test_any_text_comes_back_as_it_was(content, value):
    page = Page(element("p", content, data_tip=value))
    ((_, attributes),) = page.elements
    kept = "".join("\ufffd" if (ord(c) < 32 and c not in "\t\n\r") or c == "\x7f" else c for c in content)
    shown = "".join(page.texts.get("p", []))
    assert shown.replace("\r", "\n") == kept.replace("\r", "\n")
    assert len(attributes["data-tip"]) == len(value)


def test_only_markup_is_markup():
    assert element("p", "a < b", Markup("<br>"), None, ["&", 3]) == "<p>a &lt; b<br>&amp;3</p>"
    assert element("input", id="x", hidden=True, title=None, disabled=False) == '<input id="x" hidden>'


_reals = st.floats(-1e12, 1e12, allow_nan=False)


@given(st.lists(_reals, max_size=5), st.booleans())
def test_axes_hold_their_values_and_have_few_ticks_between_their_ends(values, log):
    found = axis(values, "x", log=log)
    assert found.low < found.high
    for value in values:
        if value > 0 or not log:
            assert -1e-6 <= found.share(value) <= 1 + 1e-6  # what is too small lies at the low end
    ticks = found.ticks()
    assert len(ticks) <= 25 and ticks == sorted(ticks)
    assert all(-1e-6 <= found.share(tick) <= 1 + 1e-6 for tick in ticks)


@given(st.lists(st.floats(1, 1e9), min_size=1, max_size=60))
def test_rectangles_of_a_treemap_fill_it_in_proportion(sizes):
    sizes = sorted(sizes, reverse=True)
    places = squarified(sizes, Rectangle(0, 0, 700, 400))
    areas = np.array([place.width * place.height for place in places])
    np.testing.assert_allclose(areas / areas.sum(), np.array(sizes) / sum(sizes), atol=1e-9)
    assert math.isclose(areas.sum(), 700 * 400, rel_tol=1e-6)
    for i, one in enumerate(places):
        assert one.x >= -1e-6 and one.x + one.width <= 700 + 1e-4 and one.y + one.height <= 400 + 1e-4
        for other in places[i + 1 :]:
            across = min(one.x + one.width, other.x + other.width) - max(one.x, other.x)
            down = min(one.y + one.height, other.y + other.height) - max(one.y, other.y)
            assert across <= 1e-4 or down <= 1e-4


def test_a_long_curve_keeps_its_mean_and_its_end():
    points = [(float(x), math.sin(x / 50)) for x in range(5000)]
    few = thinned(points)
    assert len(few) <= MOST_POINTS and few[-1] == points[-1]
    assert math.isclose(np.mean([y for _, y in few]), np.mean([y for _, y in points]), abs_tol=0.02)
    assert thinned(points[:10]) == points[:10]


def test_only_a_noisy_curve_is_smoothed():
    noise = np.random.default_rng(0).normal(size=200)
    means = smoothed([(float(x), y) for x, y in enumerate(noise)])
    np.testing.assert_allclose(means[-1][1], noise[-10:].mean())
    assert smoothed([(float(x), x**0.5) for x in range(200)]) == []


@pytest.mark.parametrize(
    ("size", "text"), [(0, "0 B"), (999, "999 B"), (33_889, "33.9 kB"), (1_083_240, "1.08 MB"), (5e12, "5,000 GB")]
)
def test_bytes(size, text):
    assert short_bytes(size) == text


def test_times_and_cells():
    assert [short_time(s) for s in (4.63, 59, 435.2, 7300)] == ["4.63 s", "59 s", "7 min 15 s", "2 h 1 min"]
    assert [finite(v) for v in ("1.5", "", None, "nan", "inf", "x", 10**400)] == [1.5] + [None] * 6


def test_a_layer_as_data_counts_every_weight():
    rng = np.random.default_rng(0)
    weights, nonzero = rng.normal(size=500), rng.random(500) < 0.4
    values = np.where(nonzero, np.sign(weights) * 0.5, 0.0)
    book = np.array([-0.5, 0.5])
    layer = LayerPicture("a", weights, values, nonzero, book, book, book, np.zeros(0), 1.0)
    found = json.loads(json.dumps(layer_document(layer)))
    expected = np.histogram(weights[nonzero], bins=64, range=(found["low"], found["high"]))[0]
    assert sum(found["kept"]) == nonzero.sum() and sum(found["pruned"]) == (~nonzero).sum()
    assert np.abs(np.array(found["kept"]) - expected).sum() <= 2  # ends are written in six digits
    assert found["codebook"] == [[-0.5, int((values < 0).sum())], [0.5, int((values > 0).sum())]]
