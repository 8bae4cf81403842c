"""The picture of the bounds shows the report's numbers."""

import matplotlib.image
import numpy as np
import pytest

from sqs_pyro.reporting.bounds_plot import bounds_figure, write_bounds_picture


def kl(name: str, num_weights: int, dominant: float | None, lower: float | None = 90.0) -> dict:
    bounds = {"lower": lower, "jensen": None if lower is None else 120.0, "dominant": dominant}
    return {"name": name, "num_weights": num_weights, "monte_carlo": 100.0, "monte_carlo_error": 2.0, **bounds}


def report(sites: list[dict], temperatures=(2.0, 0.1, 0.5)) -> dict:
    total = kl("all sites", 100, 110.0)
    return {"temperatures": [{"temperature": tau, "total": total, "sites": sites} for tau in temperatures]}


SITES = [kl("a", 10, 101.0), kl("b", 10, 50.0), kl("c", 1000, 0.0), kl("d", 10, 70.0), kl("hyper", 1, None, None)]


def test_values_are_a_weight_and_in_order_of_temperature():
    axes = bounds_figure(report(SITES)).axes[0]
    lines = {line.get_label(): line for line in axes.lines}
    np.testing.assert_allclose(lines["Jensen"].get_xdata(), [0.1, 0.5, 2.0])
    np.testing.assert_allclose(lines["Jensen"].get_ydata(), 1.2)
    np.testing.assert_allclose(lines["dominant (no bound)"].get_ydata(), 1.1)
    (container,) = axes.containers
    (bars,) = container[2]
    np.testing.assert_allclose([segment[:, 1] for segment in bars.get_segments()], [[0.94, 1.06]] * 3)


def test_the_worst_sites_are_those_where_the_dominant_value_is_farthest_a_weight():
    titles = [axes.get_title(loc="left") for axes in bounds_figure(report(SITES)).axes]
    assert [title.split(",")[0] for title in titles] == ["all sites", "b", "d", "a"]


@pytest.mark.parametrize("sites", [[kl("only", 10, 50.0)], [kl("hyper", 1, None, None)]])
def test_one_site_is_all_sites(sites):
    assert len(bounds_figure(report(sites)).axes) == 1


def test_what_is_unknown_is_left_out(tmp_path):
    drawn = report(SITES)
    for at in drawn["temperatures"]:
        at["temperature"], at["total"] = 0.1, kl("all sites", 100, None, None)
    write_bounds_picture(tmp_path / "bounds.png", drawn)
    assert matplotlib.image.imread(tmp_path / "bounds.png")[..., :3].std() > 0.01
