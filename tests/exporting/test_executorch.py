"""Programs of ExecuTorch: the packed network's outputs by its runtime, from whole numbers in the file."""

import sys

import pytest
import torch
from kits.packed_exports import INPUTS, first_rows, on_no_grid, on_whole_numbers, packed
from torch import nn

from sqs_pyro.errors import MissingPackageError, NetworkError, OutputError
from sqs_pyro.exporting import export_executorch
from sqs_pyro.exporting.executorch import is_executorch_export, run_executorch
from sqs_pyro.kernels import packed_network
from sqs_pyro.testing.layouts import random_coded

pytest.importorskip("executorch")

WHY = "no linear layer or embedding of whole numbers, in float32"


def mlp(components=15, width=24, parts=False, make=on_whole_numbers):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(20, width), nn.ReLU(), nn.Linear(width, 3)).eval()
    names = [name for name, p in net.named_parameters() if p.dim() > 1]
    shapes = {name: tuple(net.get_parameter(name).shape) for name in names}
    return packed_network(
        net, {name: make(random_coded(shape, components, seed=1, scales=parts)) for name, shape in shapes.items()}
    )


def agrees(path, net, inputs):
    """Whether the runtime gives what the packed network does, for the example's batch and a row alone."""
    for rows in (len(inputs), 1):
        (y,) = run_executorch(path, inputs[:rows])
        expected = net(inputs[:rows]).detach()
        torch.testing.assert_close(y, expected, rtol=1e-5, atol=1e-5 * float(expected.abs().max()))


@pytest.mark.parametrize(
    ("components", "width", "parts", "said"),
    [
        pytest.param(15, 24, False, ["int4", "int4"], marks=pytest.mark.slow),
        # rows of 4 bits are of whole bytes
        pytest.param(15, 25, False, ["int4", "int8"], marks=pytest.mark.slow),
        (16, 24, 2, ["int8", "int4 and int8"]),  # a product for each part
        pytest.param(255, 24, False, ["int8", "int8"], marks=pytest.mark.slow),
    ],
)
def test_products_multiply_whole_numbers_with_float32(components, width, parts, said, tmp_path):
    net, x = mlp(components, width, parts), torch.randn(4, 20)
    exported = export_executorch(net, x, tmp_path / "net.pte")
    assert exported.packed == dict(zip(["0.weight", "2.weight"], said, strict=True)) and not exported.decoded
    agrees(tmp_path / "net.pte", net, x)


@pytest.mark.slow
def test_a_weight_has_half_a_byte(tmp_path):
    sizes = {}
    for width in (1024, 4096):
        export_executorch(mlp(width=width), torch.randn(2, 20), tmp_path / "net.pte")
        sizes[width] = (tmp_path / "net.pte").stat().st_size
    each = 23 / 2 + 4 + 4 + 8  # 23 weights of 4 bits, and of the output a scale, a bias and, of ours, a zero point
    assert 23 / 2 < (sizes[4096] - sizes[1024]) / 3072 < each


@pytest.mark.slow
@pytest.mark.parametrize(
    "codes", ["whole numbers of 4 bits, scales of parts", "whole numbers of 8 bits", "4 bits"]
)
def test_embeddings_look_up_rows_of_codes(codes, tmp_path):
    net, x = packed("words", codes), INPUTS["words"]
    exported = export_executorch(net, x, tmp_path / "net.pte")
    agrees(tmp_path / "net.pte", net, x)
    assert exported.decoded["block.self_attn.in_proj_weight"] == WHY
    bits = codes[17] if codes.startswith("whole") else None
    shared = {"words.weight": f"rows of int{bits} and int{bits}"} if bits else {}
    assert {name: exported.packed[name] for name in shared} == shared and bool(exported.packed) == bool(bits)


@pytest.mark.slow
def test_chunks_and_splits_leave_the_batch_free(tmp_path):
    class Gated(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer, self.last = nn.Linear(6, 8), nn.Linear(3, 2)

        def forward(self, x):
            one, other = self.layer(x).chunk(2, -1)
            return self.last((one * other).split([3, 1], dim=-1)[0])

    torch.manual_seed(0)
    net, x = packed_network(Gated().eval(), {}), torch.randn(5, 6)
    assert not export_executorch(net, x, tmp_path / "net.pte").packed
    agrees(tmp_path / "net.pte", net, x)


@pytest.mark.slow
def test_larger_batches_than_the_examples_are_refused_and_codes_without_a_grid_are_float32(tmp_path):
    net = mlp(make=on_no_grid)
    assert export_executorch(net, torch.randn(2, 20), tmp_path / "net.pte").decoded == dict.fromkeys(
        ["0.weight", "2.weight"], WHY
    )
    agrees(tmp_path / "net.pte", net, first_rows(torch.randn(1, 20), 2))
    with pytest.raises(RuntimeError, match="set_inputs"):
        run_executorch(tmp_path / "net.pte", torch.randn(3, 20))


def test_only_our_own_files_are_replaced(tmp_path):
    export_executorch(mlp(), torch.randn(2, 20), tmp_path / "net.pte")
    written = (tmp_path / "net.pte").read_bytes()
    assert is_executorch_export(tmp_path / "net.pte")
    (tmp_path / "by another.pte").write_bytes(written.replace(b"written_by_sqs_pyro", b"written_by_somebody"))
    (tmp_path / "short.pte").write_bytes(written[:30])
    (tmp_path / "text.pte").write_text("written_by_sqs_pyro" * 9)
    others = [path for path in (*tmp_path.iterdir(), tmp_path, tmp_path / "none") if path.name != "net.pte"]
    assert not [path for path in others if is_executorch_export(path)] and len(others) == 5


def test_refusals(monkeypatch, tmp_path):
    x = torch.randn(2, 20)
    with pytest.raises(OutputError, match=r"suffix \.pt, but format executorch writes \.pte: correct"):
        export_executorch(mlp(), x, tmp_path / "net.pt")
    with pytest.raises(NetworkError, match="A packed network is needed"):
        export_executorch(nn.Linear(2, 2), x, tmp_path / "net.pte")
    monkeypatch.setitem(sys.modules, "executorch", None)
    monkeypatch.setitem(sys.modules, "executorch.exir.passes._quant_patterns_and_replacements", None)
    sentence = r"Programs of ExecuTorch need the package 'executorch', .* pip install 'sqs-pyro\[executorch\]'"
    with pytest.raises(MissingPackageError, match=sentence):
        export_executorch(mlp(), x, tmp_path / "net.pte")
    assert not list(tmp_path.iterdir())
