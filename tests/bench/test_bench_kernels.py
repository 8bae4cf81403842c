"""The benchmark of kernels: every method at every shape, real products, and what it says of wrong input."""

import io
import json

import pytest
import torch
from rich.console import Console
from typer.testing import CliRunner

from sqs_pyro.bench import kernels as bench_kernels_module
from sqs_pyro.bench.kernels import _methods, bench_kernels
from sqs_pyro.bench.report import PEER_ERRORS, spread
from sqs_pyro.cli import app
from sqs_pyro.errors import RecipeError
from sqs_pyro.reporting.bench_tables import kernel_tables


def test_every_method_at_every_shape():
    threads = torch.get_num_threads()
    told = []
    document = bench_kernels(((64, 128), (33, 64)), (1, 5), (4, 2), rounds=3, progress=told.append)
    assert torch.get_num_threads() == threads and told == ["64 x 128", "33 x 64"]
    methods = {row["method"] for row in document["rows"]}
    assert {"float32", "bfloat16", "packed, 4 bits, float32", "packed, 2 bits, bfloat16"} <= methods
    for shape in ("64 x 128", "33 x 64"):
        there = {row["method"] for row in document["rows"] if f"{row['outputs']} x {row['inputs']}" == shape}
        absent = {name.removesuffix(f", {shape}") for name in document["missing"] if name.endswith(shape)}
        assert not there & absent and len(there | absent) == 8
    for row in document["rows"]:
        assert 0 < row["lower_quartile"] <= row["microseconds"] <= row["upper_quartile"]
    assert document["machine"]["threads"] == 1


@torch.inference_mode()
def test_what_is_timed_are_products_of_copies_of_one_weight():
    methods, _ = _methods(64, 128, (4,))
    dtype, copies = methods["packed, 4 bits, bfloat16"]
    x = torch.randn(3, 128).to(dtype)
    first, second = (copy.packed_weight.codes for copy in copies[:2])
    assert first.data_ptr() != second.data_ptr()
    weight = copies[0].packed_weight.coded().dense()
    for copy in copies[:2]:
        torch.testing.assert_close(copy(x), (x.float() @ weight.T).to(dtype), rtol=0.02, atol=0.2)


def test_the_command(tmp_path):
    options = ["--shapes", "64x64", "--rows", "1,2", "--bits", "3", "--rounds", "2"]
    result = CliRunner().invoke(app, ["bench", "kernels", *options, "--out", str(tmp_path / "kernels.json")])
    assert result.exit_code == 0, result.output
    assert "64 x 64" in result.stdout and "packed, 3 bits, float32" in result.stdout
    assert len(json.loads((tmp_path / "kernels.json").read_text())["rows"]) >= 8
    assert (tmp_path / "kernels.png").read_bytes().startswith(b"\x89PNG")


def test_one_round_is_its_own_median():
    assert list(spread([2e-6]).values()) == pytest.approx([2.0, 2.0, 2.0])
    assert list(spread([5e-6, 1e-6, 2e-6, 4e-6, 3e-6]).values()) == pytest.approx([3.0, 2.0, 4.0])


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        ("--shapes", "64", "--shapes has '64', which is not whole numbers with 'x' between them"),
        ("--rows", "1;2", "--rows has '1;2', which is not whole numbers with ',' between them"),
        ("--bits", "9", "bits from 1 to 8"),
        ("--rows", "0", "of at least 1"),
    ],
)
def test_wrong_options(option, value, message):
    result = CliRunner().invoke(app, ["bench", "kernels", option, value])
    assert result.exit_code == 2 and message in result.stderr


def test_what_is_not_installed_or_runs_elsewhere_is_told_of():
    for _, make in bench_kernels_module._PEERS["cuda"].values():
        if make is not bench_kernels_module._nf4:  # that one runs on CPUs, too
            with pytest.raises(PEER_ERRORS):
                make(torch.randn(64, 128))(torch.zeros(1, 128, dtype=torch.bfloat16))


def test_ratios_are_to_what_was_measured():
    row = {"outputs": 8, "inputs": 4, "rows": 1}
    rows = [{**row, "method": "bfloat16", "microseconds": 6.0}, {**row, "method": "packed", "microseconds": 1.5}]
    made = {"gpu": "A GPU", "processors": 100, "torch": "2", "cuda": "13", "triton": "3"}
    tables = kernel_tables({"machine": made, "rounds": 3, "rows": rows, "missing": {"other": "not installed"}})
    output = io.StringIO()
    for table in tables:
        Console(file=output, width=100).print(table)
    told = " ".join(output.getvalue().split())
    assert "A GPU (100 multiprocessors), torch 2, cuda 13, triton 3" in told
    assert "times as fast as bfloat16" in told and "1.5 (4.0)" in told and "float32" not in told
    assert "other is missing: not installed" in told


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_no_gpu():
    result = CliRunner().invoke(app, ["bench", "kernels", "--device", "cuda"])
    assert result.exit_code == 2 and "There is no device 'cuda' to measure" in result.stderr


def test_wrong_numbers():
    with pytest.raises(RecipeError, match="at least 1"):
        bench_kernels(rounds=0)
