"""The benchmark of kernels: every method at every shape, real products, and what it says of wrong input."""

import json

import pytest
import torch
from typer.testing import CliRunner

from sqs_pyro.cli import app
from sqs_pyro.errors import RecipeError
from sqs_pyro.runs.bench import spread
from sqs_pyro.runs.bench_kernels import _methods, bench_kernels


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


def test_wrong_numbers():
    with pytest.raises(RecipeError, match="at least 1"):
        bench_kernels(rounds=0)
