"""The compiled CPU convolution against torch's in float64, over geometries, bits, zeros, codebooks, dtypes."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from kernels.test_matrices import TOLERANCE, laid_out

from sqs_pyro.kernels.decode import write_table
from sqs_pyro.kernels.native import native_kernels
from sqs_pyro.kernels.tiled import pack_tiles, tiled_bits, tiled_size, unpack_tiles
from sqs_pyro.packing.coded import look_up

pytestmark = pytest.mark.skipif(not native_kernels("tiled"), reason="no C++ compiler")


@st.composite
def convolutions(draw):
    bits, dims = draw(st.integers(1, 8)), draw(st.sampled_from([1, 2, 2]))
    outputs, channels = draw(st.integers(1, 40)), draw(st.integers(1, 9))
    kernel, stride, dilation = ([draw(st.integers(1, 3)) for _ in range(dims)] for _ in range(3))
    padding = [draw(st.integers(0, 3)) for _ in range(dims)]
    space = [
        max(1, d * (k - 1) + 1 - 2 * p) + draw(st.integers(0, 40 // dims))
        for k, d, p in zip(kernel, dilation, padding, strict=True)
    ]
    images = draw(st.sampled_from([0, 1, 2, 5]))
    size, zeros = draw(st.integers(1, 2**bits)), draw(st.sampled_from([0.0, 0.5, 1.0]))
    tables = draw(st.sampled_from([g for g in (1, 2, 3, outputs) if outputs % g == 0]))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    symbols = torch.randint(0, size, (outputs, channels, *kernel), dtype=torch.uint8, generator=generator)
    symbols[torch.rand(symbols.shape, generator=generator) < zeros] = 0
    table = torch.randn(tables, size, generator=generator)
    if draw(st.booleans()):
        table[:, 0] = 0
    scales = 0.5 + torch.rand(outputs, generator=generator) if draw(st.booleans()) else None
    bias = torch.randn(outputs, generator=generator) if draw(st.booleans()) else None
    x = torch.randn(images, channels, *space, generator=generator).to(draw(st.sampled_from(list(TOLERANCE))))
    layout = draw(st.sampled_from(["contiguous", "transposed", "strided", "offset"]))
    return bits, symbols, table, scales, bias, laid_out(x, layout), (stride, padding, dilation)


def arguments(bits, symbols, table, scales):
    scale = None if scales is None else write_table(scales)
    return pack_tiles(symbols, bits), write_table(table), scale, list(symbols.shape), bits


def convolve(x, bias, geometry, packed):
    return torch.ops.sqs.convolution_tiled(x, bias, *geometry, False, [0] * len(geometry[0]), 1, *packed)


@given(convolutions())
def test_convolutions_against_float64(case):
    check(*case)


@pytest.mark.parametrize("bits", range(1, 9))
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_code_of_every_width(bits, dtype):
    symbols = torch.arange(40 * 7 * 9).mul(37).remainder(2**bits).to(torch.uint8).view(40, 7, 3, 3)
    assert len(symbols.unique()) == 2**bits
    x = torch.randn(2, 7, 9, 9).to(dtype)
    check(bits, symbols, torch.randn(1, 2**bits), None, None, x, ([1, 1], [1, 1], [1, 1]))


def check(bits, symbols, table, scales, bias, x, geometry):
    found = convolve(x, bias, geometry, arguments(tiled_bits(bits), symbols, table, scales))
    assert found.dtype == x.dtype and found.is_contiguous()
    weight = look_up(table.double(), symbols.view(len(table), -1)).view(symbols.shape)
    weight = weight if scales is None else weight * scales.double().view(-1, *[1] * (weight.dim() - 1))
    # the dtype of x is that of the bias, too
    offset = torch.zeros(len(symbols), dtype=torch.double) if bias is None else bias.to(x.dtype).double()
    plain = torch.nn.functional.conv1d if weight.dim() == 3 else torch.nn.functional.conv2d
    expected = plain(x.double(), weight, offset, *geometry)
    assert found.shape == expected.shape
    size = plain(x.double().abs(), weight.abs(), offset.abs(), *geometry)
    smallest = torch.finfo(x.dtype).tiny
    assert ((found.double() - expected).abs() <= TOLERANCE[x.dtype] * size + smallest).all()


@given(convolutions())
def test_tiles_are_lossless_and_as_large_as_stated(case):
    bits, symbols = case[:2]
    tiles = pack_tiles(symbols, tiled_bits(bits))
    assert tiles.numel() == tiled_size(tuple(symbols.shape), tiled_bits(bits))
    assert torch.equal(unpack_tiles(tiles, tiled_bits(bits), tuple(symbols.shape)), symbols)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("images", [1, 3])
def test_threads_do_not_change_results(dtype, images):
    symbols = torch.randint(0, 16, (40, 6, 3, 3), dtype=torch.uint8)
    packed, x = arguments(4, symbols, torch.randn(1, 16), None), torch.randn(images, 6, 19, 21).to(dtype)
    threads = torch.get_num_threads()
    try:
        found = []
        for count in (1, 2, 5):
            torch.set_num_threads(count)
            found.append(convolve(x, None, ([1, 2], [1, 1], [1, 1]), packed))
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(found[0], found[1]) and torch.equal(found[0], found[2])


def test_what_is_not_a_number_stays_in_its_place():
    """Blocks read numbers behind a row's end, and empty halves of pairs stand beside an odd number of channels."""
    symbols = torch.randint(0, 4, (20, 3, 3, 3), dtype=torch.uint8)
    packed = arguments(2, symbols, torch.tensor([[-1.0, 0.5, 1.0, 2.0]]), None)
    for dtype in (torch.float32, torch.bfloat16):
        x = torch.randn(2, 3, 9, 9).to(dtype)
        x[1, :, 0] = float("nan")
        found = convolve(x, None, ([1, 1], [1, 1], [1, 1]), packed)
        assert found[0].isfinite().all() and found[1, :, :2].isnan().all() and found[1, :, 2:].isfinite().all()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.randn(2, 5, 8, 8)}, "x should have 4 dimensions and 4 channels"),
        ({"x": torch.randn(2, 4, 8)}, "x should have 4 dimensions and 4 channels"),
        ({"x": torch.randn(2, 4, 1, 8)}, "the kernel is larger than the padded image"),
        ({"geometry": ([1], [1], [1])}, "stride should have 2 numbers, not 1"),
        ({"geometry": ([0, 1], [0, 0], [1, 1])}, "stride, dilation and kernel should be positive"),
        ({"bias": torch.zeros(3)}, "the bias should have 6 numbers"),
        ({"table": torch.zeros(4, 64, dtype=torch.uint8)}, "4 tables do not fit 6 outputs of 36 inputs"),
        ({"table": torch.zeros(1, 100, dtype=torch.uint8)}, "a table of 100 bytes does not fit codes of 4 bits"),
        ({"codes": torch.zeros(64, dtype=torch.uint8)}, "codes of this weight have 320 bytes, not 64"),
    ],
)
def test_wrong_arguments_are_told_and_read_nowhere(change, message):
    codes, table, scales, shape, bits = arguments(
        4, torch.zeros(6, 4, 3, 3, dtype=torch.uint8), torch.zeros(1, 16), None
    )
    right = {"x": torch.randn(2, 4, 8, 8), "bias": None, "geometry": ([1, 1], [0, 0], [1, 1])}
    given = {**right, "codes": codes, "table": table, **change}
    with pytest.raises(RuntimeError, match=message):
        convolve(
            given["x"], given["bias"], given["geometry"], (given["codes"], given["table"], scales, shape, bits)
        )
