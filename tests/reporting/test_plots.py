"""The pictures show the numbers they were given, and drawing leaves matplotlib's global state alone."""

from dataclasses import dataclass, replace

import matplotlib
import matplotlib.image
import numpy as np
import pytest
import scipy.stats
from kits import forks
from kits.pictures import unpainted

from sqs_pyro.reporting import LayerPicture, plots


@dataclass
class Record:
    step: int
    stage: str
    loss: float = 1.0
    nll: float = 0.9
    kl: float = 10.0
    nonzero_rate: float = 0.5
    temperature: float = 0.1
    score: float | None = None


def _layer(name: str = "conv.weight", num_weights: int = 500, seed: int = 0) -> LayerPicture:
    weights = np.random.default_rng(seed).normal(size=num_weights)
    nonzero = np.abs(weights) > np.median(np.abs(weights))
    loc = np.array([-1.2, 1.2])
    values = np.where(nonzero, np.sign(weights) * 1.2, 0.0)
    edges = np.quantile(weights, [0, 0.25, 0.75, 1])
    return LayerPicture(name, weights, values, nonzero, loc, np.array([0.4, 0.4]), np.full(2, 0.5), edges, 2.1)


def _history(steps: int = 200) -> list[Record]:
    stages = np.repeat(["dense", "coded", "frozen"], [steps // 2, steps // 4, steps - steps // 2 - steps // 4])
    return [Record(step, str(stage), score=0.9 if step % 50 == 0 else None) for step, stage in enumerate(stages)]


def test_histogram_counts_every_weight_once():
    layer = _layer()
    axes = plots.layer_figures([layer])[0].axes[0]
    pruned, kept = (patch.get_data().values for patch in axes.patches)
    assert pruned.sum() == (~layer.nonzero).sum()
    assert kept.sum() == layer.num_nonzeros


@pytest.mark.parametrize("scale", [1e-9, 0.01, 1.0])
def test_component_curve_is_the_expected_count_of_a_bin(scale):
    edges = np.linspace(-3, 3, 73)
    centres = (edges[1:] + edges[:-1]) / 2
    mass = plots._bin_mass(centres, edges[1] - edges[0], 0.3, scale)
    np.testing.assert_allclose(mass, np.diff(scipy.stats.norm(0.3, scale).cdf(edges)), atol=1e-12)


def test_ranges_of_outliers_are_marked():
    layer = _layer()
    low = float(np.quantile(layer.weights, 0.02))
    marked = replace(layer, bulk=np.array([low, layer.weights.max() + 1]))  # no outliers above
    plain, shaded = plots.layer_figures([layer, marked])[0].axes
    assert len(shaded.patches) == len(plain.patches) + 1
    assert shaded.patches[-1].get_x() + shaded.patches[-1].get_width() == pytest.approx(low)
    assert [text.get_text() for text in shaded.figure.legends[0].get_texts()][-1] == "windows of outliers"


@pytest.mark.slow
def test_many_layers_go_on_several_pages(tmp_path):
    layers = [_layer(f"layer{index}.weight", 40, index) for index in range(45)]
    with unpainted():
        names = [path.name for path in plots.write_pictures(tmp_path, layers, [])]
    assert names == ["layers-1.png", "layers-2.png", "layers-3.png", "bits.png"]


def test_pictures_are_readable_files_with_something_on_them(tmp_path):
    paths = plots.write_pictures(tmp_path, [_layer(), _layer("fc.weight", seed=1)], _history())
    assert [path.name for path in paths] == ["layers.png", "bits.png", "curves.png"]
    for path in paths:
        image = matplotlib.image.imread(path)
        assert min(image.shape[:2]) > 200
        assert image[..., :3].std() > 0.02


def test_bars_show_rate_bits_and_their_weighted_means():
    layers = [_layer("a.weight", 100), _layer("b.weight", 300)]
    left, right = plots.bits_figure(layers).axes
    np.testing.assert_allclose([bar.get_width() for bar in left.patches], [50, 50])
    np.testing.assert_allclose([bar.get_width() for bar in right.patches], [2.1, 2.1])
    assert "50.0" in left.get_title(loc="left")
    assert [label.get_text() for label in left.get_yticklabels()] == ["a.weight", "b.weight"]


def test_stage_boundaries_are_where_the_stage_changes():
    figure = plots.curves_figure(_history(200))
    dashed = [line for line in figure.axes[0].lines if line.get_linestyle() == "--"]
    assert [line.get_xdata()[0] for line in dashed] == [100, 150]


def test_running_mean_against_numpy():
    values = np.random.default_rng(0).normal(size=50)
    expected = [values[max(0, end - 7) : end].mean() for end in range(1, 51)]
    np.testing.assert_allclose(plots._running_mean(values, 7), expected)


def _zero_layer() -> LayerPicture:
    zeros, nothing = np.zeros(10), np.zeros(0)
    return LayerPicture(
        "dead", zeros, zeros, np.zeros(10, bool), np.zeros(1), np.ones(1), np.ones(1), nothing, 1.0
    )


def test_odd_layers_and_histories_are_drawn(tmp_path):
    history = [Record(0, "dense", kl=float("nan"))]
    assert len(plots.write_pictures(tmp_path, [_zero_layer()], history)) == 3


def test_drawing_leaves_matplotlib_as_it_was(tmp_path):
    before = dict(matplotlib.rcParams)
    plots.write_pictures(tmp_path, [_layer()], _history())
    assert dict(matplotlib.rcParams) == before
    command = "import sys; import sqs_pyro.reporting.plots; sys.exit('matplotlib.pyplot' in sys.modules)"
    assert forks.run(command).returncode == 0


def test_layer_picture_refuses_arrays_that_do_not_fit():
    layer = _layer()
    with pytest.raises(ValueError, match=r"conv.weight: scale has shape \(1,\), expected \(2,\)"):
        LayerPicture(
            layer.name,
            layer.weights,
            layer.values,
            layer.nonzero,
            layer.loc,
            np.ones(1),
            layer.mixing,
            layer.window_edges,
            layer.bits,
        )
