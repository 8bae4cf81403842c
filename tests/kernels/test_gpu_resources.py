"""GPU kernels compiled ahead of time, for GPUs that are not there: they fit, and keep everything in registers."""

import json
import runpy
from pathlib import Path

import pytest
import torch
from kits.gpu import HAS_TRITON, INTERPRETED

pytestmark = pytest.mark.skipif(
    not HAS_TRITON or INTERPRETED, reason="no Triton, or its interpreter, which compiles nothing"
)

RECORD = Path(__file__).parents[2] / "benchmarks" / "gpu_kernels_resources.json"


def check(launch, architecture):
    from sqs_pyro.kernels.gpu.resources import SHARED_LIMIT, compiled_triton

    found = compiled_triton(launch, architecture)
    assert found["spilled_bytes"] == 0 and 0 < found["registers"] <= 255
    assert found["shared_bytes"] <= SHARED_LIMIT[architecture] and found["cubin_bytes"] > 0
    return found


@pytest.mark.parametrize(
    ("architecture", "form", "bits", "rows", "parts", "kernels"),
    [
        ("90", "dense", 4, 1, 0, ["vector", "finish"]),
        ("90", "dense", 4, 64, 0, ["matrix", "finish"]),
        ("80", "dense", 3, 16, 0, ["matrix", "finish"]),
        ("100", "dense", 8, 100, 0, ["decode_rows"]),
        ("90", "bitmap", 8, 16, 0, ["matrix", "finish"]),
        ("90", "dense", 4, 1, 64, ["vector", "finish"]),
        ("90", "dense", 3, 64, 128, ["matrix", "finish"]),
        ("90", "dense", 4, 100, 32, ["decode_rows"]),
    ],
)
def test_no_spills_and_shared_memory_within_limits(architecture, form, bits, rows, parts, kernels):
    from sqs_pyro.kernels.gpu.resources import blank, launches

    found = list(launches(blank((4096, 4096), bits, form, parts=parts), rows, torch.bfloat16))
    assert [launch.kernel.__name__ for launch in found] == kernels
    check(found[0], architecture)


@pytest.mark.slow
@pytest.mark.parametrize("groups", [1, 64, 64 * 8, 16, 63 * 64 * 10])
def test_every_grouping_and_odd_shapes(groups):
    from sqs_pyro.kernels.gpu.resources import blank, launches

    shape = (64, 1024) if groups <= 64 * 8 else (64, 630)
    products = ((1, torch.float32), (64, torch.bfloat16), (70, torch.float16))
    for i, bits in enumerate((1, 3, 4, 7)):
        for rows, dtype in (products[i % 3], products[(i + 1) % 3]):
            check(next(launches(blank(shape, bits, groups=groups), rows, dtype)), "90")


@pytest.mark.slow
@pytest.mark.parametrize("architecture", ["80", "90a", "100"])
def test_cuda_kernels_keep_everything_in_registers(architecture):
    from sqs_pyro.kernels.gpu.resources import compiled_cuda

    try:
        found = compiled_cuda(architecture)
    except RuntimeError as error:
        pytest.skip(str(error))
    assert len(found) == 16  # 2 dtypes, 4 widths, 8 and 16 rows
    for taken in found.values():
        assert taken["spilled_bytes"] == 0 and taken["registers"] <= 128 and taken["shared_bytes"] <= 48 * 1024


def test_the_page_has_the_recorded_figures(monkeypatch):
    rows = json.loads(RECORD.read_text())["rows"]
    monkeypatch.syspath_prepend(RECORD.parent)  # scripts there import each other
    script = runpy.run_path(str(RECORD.with_suffix(".py")))
    page = (RECORD.parents[1] / "docs" / "gpu.md").read_text().splitlines()
    lines = script["table"](rows)
    assert len(lines) > 20 and page[page.index(lines[0]) :][: len(lines)] == lines


def test_the_record_is_of_all_kernels():
    rows = json.loads(RECORD.read_text())["rows"]
    assert {row["architecture"] for row in rows} == {"sm_80", "sm_90", "sm_90a", "sm_100"}
    assert {row["kernel"] for row in rows if row["kernel"][:8] != "dense.cu"} == {
        "vector",
        "matrix",
        "finish",
        "decode_rows",
    }
    assert not any(row["spilled_bytes"] for row in rows)
