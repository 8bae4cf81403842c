"""The pictures of benchmarks show the documents' numbers."""

import pytest

from sqs_pyro.reporting.bench_plots import kernels_figure, model_figure

MACHINE = {"processor": "abacus", "instructions": ["beads"], "threads": 1, "torch": "2", "python": "3"}
KERNEL_TIMES = {  # microseconds at M = 1 and M = 4
    "float32": (8.0, 16.0),
    "bfloat16": (4.0, 4.0),
    "packed, 4 bits, float32": (2.0, 4.0),
    "packed, 4 bits, bfloat16": (1.0, 2.0),
    "packed, 2 bits, bfloat16": (0.5, 1.0),
}


def kernels():
    rows = [
        {"outputs": size, "inputs": 32, "rows": count, "method": method, "microseconds": time * size}
        for size in (64, 128)
        for method, times in KERNEL_TIMES.items()
        for count, time in zip((1, 4), times, strict=True)
        if size == 64 or method != "bfloat16"  # a method may be missing at a shape
    ]
    return {"machine": MACHINE, "rows": rows}


def model(batches=(1,)):
    rows = [
        {
            "network": "net",
            "input": [1, 8, 8],
            "batch": batch,
            "cold": cold,
            "method": method,
            "microseconds": time * (2 if cold else 1),
            "lower_quartile": time * 0.9,
            "upper_quartile": time * 2.2,
            "times_as_fast": 3000 / time,
        }
        for batch in batches
        for cold in (True, False)
        for method, time in (("float32", 3000.0), ("packed, float32", 1000.0))
    ]
    return {"machine": MACHINE, "rows": rows}


def test_kernels_are_ratios_to_float32_over_rows():
    figure = kernels_figure(kernels())
    assert [axes.get_title(loc="left") for axes in figure.axes] == ["64 × 32", "128 × 32"]
    lines = {line.get_label(): line for line in figure.axes[0].lines}
    assert list(lines["packed 4 bits, bfloat16"].get_xdata()) == [1, 4]
    assert list(lines["packed 4 bits, bfloat16"].get_ydata()) == [8, 8]
    assert list(lines["bfloat16"].get_ydata()) == [2, 4] and list(lines["float32"].get_ydata()) == [1, 1]
    assert len(figure.axes[1].lines) == len(KERNEL_TIMES) - 1


def test_of_a_gpu_they_are_ratios_to_bfloat16():
    document = kernels()
    document["rows"] = [row for row in document["rows"] if row["outputs"] == 64 and row["method"] != "float32"]
    figure = kernels_figure(document)
    lines = {line.get_label(): line for line in figure.axes[0].lines}
    assert list(lines["packed 4 bits, bfloat16"].get_ydata()) == [4, 2]
    assert figure.axes[0].get_ylabel() == "times as fast as bfloat16"


def test_bits_have_colours_and_inputs_have_dashes():
    lines = {line.get_label(): line for line in kernels_figure(kernels()).axes[0].lines}
    single, half, two = (
        lines[f"packed {kind}"] for kind in ("4 bits, float32", "4 bits, bfloat16", "2 bits, bfloat16")
    )
    assert single.get_color() == half.get_color() != two.get_color()
    assert single.get_linestyle() == "--" and half.get_linestyle() == "-"
    assert len({line.get_color() for line in lines.values()}) == len(lines) - 1


def test_bars_are_milliseconds_cold_and_warm():
    (axes,) = model_figure(model()).axes
    widths = sorted((bar.get_width(), bar.get_alpha()) for bar in axes.patches)
    assert widths == [(1.0, 0.35), (2.0, 1.0), (3.0, 0.35), (6.0, 1.0)]
    assert [tick.get_text() for tick in axes.get_yticklabels()] == ["float32", "packed, float32"]
    assert {text.get_text() for text in axes.texts} == {"3 (1×)", "6 (1×)", "1 (3×)", "2 (3×)"}
    assert axes.get_xlim()[1] > 6.6


@pytest.mark.parametrize("count", [1, 4, 5])
def test_a_panel_for_each_batch(count, tmp_path):
    figure = model_figure(model(range(1, count + 1)))
    titles = [axes.get_title(loc="left") for axes in figure.axes]
    assert titles == [f"net, 1x8x8, batch {batch}" for batch in range(1, count + 1)]
    figure.savefig(tmp_path / "model.png")
    assert figure.get_supxlabel() == "abacus (beads), 1 thread(s), torch 2"
