"""Products with inputs of 8 bits: the kernel against the reference, layers that can, and those that stay."""

import copy

import pytest
import torch
from kits.packed_exports import on_no_grid, on_whole_numbers
from torch import nn

from sqs_pyro.kernels import packed_network
from sqs_pyro.kernels.int8 import _BLOCKS, round_inputs
from sqs_pyro.kernels.native import native_kernels
from sqs_pyro.kernels.ops import rounded_inputs
from sqs_pyro.testing.layouts import random_coded

COMPONENTS = {2: 3, 3: 7, 4: 15}

pytestmark = pytest.mark.skipif(not native_kernels("tiled"), reason="no compiler")


def network(outputs=37, inputs=75, bits=4, make=on_whole_numbers, scales=True, bias=True):
    net = nn.Sequential(nn.Linear(inputs, outputs, bias=bias))
    coded = make(random_coded((outputs, inputs), COMPONENTS[bits], seed=bits, nonzero_rate=0.8))
    if not scales:
        coded = type(coded)(coded.codes, coded.mask, coded.codebook)
    return packed_network(net.requires_grad_(False), {"0.weight": coded})


@pytest.mark.parametrize("bits", COMPONENTS)
@pytest.mark.parametrize("rows", [1, 2, 4, 7, 33, 259])
@pytest.mark.parametrize("shape", [(37, 75), (16, 32), (37, 3), (48, 576)])
def test_the_kernel_multiplies_rounded_inputs(bits, rows, shape):
    net = network(*shape, bits=bits)
    x = torch.randn(rows, shape[1], generator=torch.Generator().manual_seed(rows))
    x[0, ::3] *= 50
    assert round_inputs(net) == ["0"]
    weight = net[0].packed_weight.dense()
    expected = rounded_inputs(x, _BLOCKS[bits]) @ weight.T + net[0].bias
    torch.testing.assert_close(net(x), expected, rtol=1e-5, atol=1e-5 * float(expected.abs().max()))
    # Near the product itself, and not equal to it.
    plain = x @ weight.T + net[0].bias
    lost = float((net(x) - plain).square().mean() / plain.square().mean())
    assert lost < 1e-3 and (shape[1] < 8 or lost > 1e-9)
    assert round_inputs(net, False) == []
    torch.testing.assert_close(net(x), plain, rtol=1e-4, atol=1e-4 * float(plain.abs().max()))


@pytest.mark.parametrize("options", [{"scales": False}, {"bias": False}])
def test_without_scales_or_bias(options):
    net = network(**options)
    round_inputs(net)
    x, bias = torch.randn(2, 3, 75), 0 if net[0].bias is None else net[0].bias
    expected = rounded_inputs(x, 32) @ net[0].packed_weight.dense().T + bias
    torch.testing.assert_close(net(x), expected, rtol=1e-5, atol=1e-5 * float(expected.abs().max()))


def test_extreme_inputs():
    net = network(bias=False)
    round_inputs(net)
    assert not net(torch.zeros(2, 75)).any()
    x = torch.zeros(1, 75)
    x[0, 40] = 3.0  # alone in its block: exact
    torch.testing.assert_close(net(x), x @ net[0].packed_weight.dense().T, rtol=1e-6, atol=1e-6)
    # The largest sums that 16 bits must hold: every number and every input at its end.
    for sign in (1, -1):
        most = torch.full((1, 75), float(sign))
        expected = most @ net[0].packed_weight.dense().T
        torch.testing.assert_close(net(most), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("odd", [float("nan"), float("inf"), -float("inf")])
def test_what_is_not_finite_stays_so(odd):
    net = network()
    round_inputs(net)
    x = torch.randn(5, 75)
    x[2, 40] = odd
    found = net(x)
    assert found[2].isnan().all() and found[[0, 1, 3, 4]].isfinite().all()


@pytest.mark.parametrize("bits", COMPONENTS)
def test_no_sum_overflows(bits):
    most = 2 ** (bits - 1) - 1
    coded = random_coded((16, 320), COMPONENTS[bits], nonzero_rate=1.0)
    last = type(coded)(torch.full_like(coded.codes, COMPONENTS[bits] - 1), coded.mask, coded.codebook)
    # One weight of every other value, so that the codebook stays whole.
    codes = last.codes.clone()
    codes[0, : COMPONENTS[bits]] = torch.arange(COMPONENTS[bits], dtype=torch.uint8)
    net = packed_network(
        nn.Sequential(nn.Linear(320, 16, bias=False)),
        {"0.weight": on_whole_numbers(type(coded)(codes, coded.mask, coded.codebook))},
    )
    assert round_inputs(net) == ["0"] and most > 0
    for sign in (1.0, -1.0):
        x = torch.full((3, 320), sign)
        torch.testing.assert_close(net(x), x @ net[0].packed_weight.dense().T, rtol=1e-5, atol=1e-4)


class TestOthersStay:
    def test_free_codewords(self):
        net = network(make=on_no_grid)
        assert round_inputs(net) == []

    def test_more_bits(self):
        plain = nn.Sequential(nn.Linear(64, 32))
        net = packed_network(plain, {"0.weight": on_whole_numbers(random_coded((32, 64), 31))})
        assert round_inputs(net) == []

    def test_scales_of_parts(self):
        plain = nn.Sequential(nn.Linear(64, 32))
        net = packed_network(plain, {"0.weight": on_whole_numbers(random_coded((32, 64), 15, scales=2))})
        assert round_inputs(net) == []

    def test_without_kernels(self, monkeypatch):
        monkeypatch.setattr("sqs_pyro.kernels.int8.has_native_kernel", lambda op: False)
        assert round_inputs(network()) == []

    def test_dense_layers_and_embeddings(self):
        plain = nn.Sequential(nn.Embedding(40, 32), nn.Linear(32, 8))
        net = packed_network(plain, {"0.weight": on_whole_numbers(random_coded((40, 32), 15))})
        assert round_inputs(net) == []


def test_copies_and_compiled_networks_round_as_well():
    net = network()
    round_inputs(net)
    x = torch.randn(4, 75)
    with torch.no_grad():
        expected = net(x)
        assert torch.equal(copy.deepcopy(net)(x), expected)
        program = torch.export.export(net, (x,))
        assert "linear_int8_tiled" in str(program.graph)
        assert torch.equal(program.module()(x), expected)
    assert "int8_block=32" in repr(net)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_other_dtypes(dtype):
    net = network().to(dtype)
    round_inputs(net)
    x = torch.randn(3, 75, dtype=dtype)
    plain = nn.functional.linear(x.float(), net[0].packed_weight.coded().dense(), net[0].bias.float())
    found = net(x)
    assert found.dtype == dtype
    assert float((found.float() - plain).norm() / plain.norm()) < 2e-2
