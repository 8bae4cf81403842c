"""The picture of a blockwise compression shows every block and every layer."""

import pytest

from sqs_pyro.reporting.blocks_plot import blocks_figure, write_blocks_picture

LAYERS = ("self_attn.q_proj", "mlp.down_proj")


def records(count, names=LAYERS, error=0.01):
    layers = {name: {"bits": 3.0 + i, "error": error * (i + 1), "beta": 1.0} for i, name in enumerate(names)}
    return [{"block": i, "bits": 3.2, "error": error, "layers": layers, "seconds": 1.0} for i in range(count)]


@pytest.mark.parametrize("count", [1, 30])
def test_a_line_for_each_layer_and_one_for_the_blocks(count, tmp_path):
    bits, errors = blocks_figure(records(count)).axes
    assert [line.get_label() for line in bits.lines] == ["q_proj", "down_proj", "block"]
    assert [len(line.get_xdata()) for line in errors.lines] == [count] * 3
    assert list(errors.lines[1].get_ydata()) == [0.02] * count
    assert errors.get_yscale() == "log"
    write_blocks_picture(tmp_path / "blocks.png", records(count))
    assert (tmp_path / "blocks.png").stat().st_size > 1000


def test_errors_of_zero_and_layers_with_names_alike():
    bits, errors = blocks_figure(records(3, ("attention.output.dense", "output.dense"), error=0.0)).axes
    assert errors.get_yscale() == "linear"
    assert [line.get_label() for line in bits.lines] == ["attention.output.dense", "output.dense", "block"]
