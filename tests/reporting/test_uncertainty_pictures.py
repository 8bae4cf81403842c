"""Pictures of uncertainty show the numbers that they are given."""

import matplotlib.image
import numpy as np

from sqs_pyro.reporting.uncertainty import (
    Curves,
    bands_figure,
    reliability_figure,
    risk_coverage_figure,
    write_uncertainty_pictures,
)

CURVES = {
    "one draw": Curves([0.0, 0.4, 0.9], [0.0, 0.5, 0.8], [0, 10, 30], [0.25, 0.5, 1.0], [0.0, 0.1, 0.2]),
    "scaled": Curves([0.2, 0.5, 0.8], [0.1, 0.5, 0.9], [5, 5, 30], [0.25, 0.5, 1.0], [0.0, 0.05, 0.2]),
}


def test_reliability_has_a_panel_a_predictor_and_leaves_empty_bins_out():
    figure = reliability_figure(CURVES)
    first, second, below, _ = figure.axes
    assert [first.get_title(loc="left"), second.get_title(loc="left")] == list(CURVES)
    diagonal, points = first.lines
    np.testing.assert_allclose(diagonal.get_xydata(), [[0, 0], [1, 1]])
    np.testing.assert_allclose(points.get_xydata(), [[0.4, 0.5], [0.9, 0.8]])
    (bars,) = below.patches
    np.testing.assert_allclose(bars.get_data().values, [0, 0.25, 0.75])
    np.testing.assert_allclose(bars.get_data().edges, [0, 1 / 3, 2 / 3, 1])


def test_risk_is_in_percent():
    (axes,) = risk_coverage_figure(CURVES).axes
    assert [line.get_label() for line in axes.lines] == list(CURVES)
    np.testing.assert_allclose(axes.lines[1].get_xydata(), [[0.25, 0], [0.5, 5], [1, 20]])


def test_bands_in_the_order_of_x_with_the_widest_below():
    x, mean = np.array([2.0, 0.0, 1.0]), np.array([4.0, 0.0, 1.0])
    bands = {level: (mean - width, mean + width) for level, width in ((0.5, 1.0), (0.9, 2.0))}
    (axes,) = bands_figure(x, mean, bands, observed=(x, mean + 0.1), truth=mean**2).axes
    lines = {line.get_label(): line.get_xydata() for line in axes.lines}
    np.testing.assert_allclose(lines["predictive mean"], [[0, 0], [1, 1], [2, 4]])
    np.testing.assert_allclose(lines["truth"], [[0, 0], [1, 1], [2, 16]])
    np.testing.assert_allclose(lines["data"][:, 1], mean + 0.1)
    assert [band.get_label() for band in axes.collections] == ["90 %", "50 %"]
    widths = [np.ptp(band.get_paths()[0].vertices[:, 1]) for band in axes.collections]
    np.testing.assert_allclose(widths, [4 + 4, 4 + 2])
    assert len(bands_figure(x, mean, {}).axes[0].lines) == 1


def test_files(tmp_path):
    write_uncertainty_pictures(tmp_path, CURVES)
    for name in ("reliability.png", "risk_coverage.png"):
        assert matplotlib.image.imread(tmp_path / name)[..., :3].std() > 0.01
