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
    transposed, groups = draw(st.booleans()), draw(st.sampled_from([1, 1, 2, 3, 17, 33]))
    # As many channels and outputs of a group as there are groups of them; one of each is a depthwise convolution.
    channels = draw(st.integers(1, 9 if groups < 4 else 2))
    outputs = draw(
        st.sampled_from([1, 5, 16, 40, 50] if groups == 1 else [1, 2, 8, 17] if groups < 4 else [1, 1, 3])
    )
    kernel = [draw(st.sampled_from([1, 2, 3, 3, 5])) for _ in range(dims)]
    stride, dilation = ([draw(st.integers(1, 3)) for _ in range(dims)] for _ in range(2))
    padding = [draw(st.integers(0, 3)) for _ in range(dims)]
    smallest = [d * (k - 1) + 1 - 2 * p for k, d, p in zip(kernel, dilation, padding, strict=True)]
    if transposed:
        more = [draw(st.integers(0, max(s, d) - 1)) for s, d in zip(stride, dilation, strict=True)]
        # (space - 1) stride + smallest + more outputs
        smallest = [1 + max(0, -(s + m - 1) // t) for s, m, t in zip(smallest, more, stride, strict=True)]
    else:
        more = [0] * dims
    space = [max(1, least) + draw(st.integers(0, 40 // dims)) for least in smallest]
    images = draw(st.sampled_from([0, 1, 2, 5]))
    size, zeros = draw(st.integers(1, 2**bits)), draw(st.sampled_from([0.0, 0.5, 1.0]))
    rows, columns = (channels, outputs) if transposed else (outputs, channels)
    shape = (groups * rows, columns, *kernel)
    tables = draw(st.sampled_from([g for g in (1, 2, 3, shape[0]) if shape[0] % g == 0]))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    symbols = torch.randint(0, size, shape, dtype=torch.uint8, generator=generator)
    symbols[torch.rand(symbols.shape, generator=generator) < zeros] = 0
    table = torch.randn(tables, size, generator=generator)
    if draw(st.booleans()):
        table[:, 0] = 0
    scales = 0.5 + torch.rand(shape[0], generator=generator) if draw(st.booleans()) else None
    bias = torch.randn(groups * outputs, generator=generator) if draw(st.booleans()) else None
    x = torch.randn(images, groups * channels, *space, generator=generator)
    x = x.to(draw(st.sampled_from(list(TOLERANCE))))
    layout = draw(
        st.sampled_from(["contiguous", "transposed", "strided", "offset", *["channels last"] * 3 * (dims - 1)])
    )
    geometry = (stride, padding, dilation, transposed, more, groups)
    return bits, symbols, table, scales, bias, laid_out(x, layout), geometry


#: Channels, outputs, groups, and whether they are transposed.
DESIGNS = {
    "depthwise": (40, 40, 40, False),
    "grouped": (48, 96, 4, False),
    "grouped, few": (24, 36, 12, False),
    "transposed": (32, 24, 1, True),
    "transposed, grouped": (24, 48, 3, True),
    "transposed, depthwise": (24, 24, 24, True),
}

#: Of ordinary convolutions of two dimensions.
NOT_TRANSPOSED = (False, [0, 0], 1)


def arguments(bits, symbols, table, scales):
    scale = None if scales is None else write_table(scales)
    return pack_tiles(symbols, bits), write_table(table), scale, list(symbols.shape), bits


def convolve(x, bias, geometry, packed):
    return torch.ops.sqs.convolution_tiled(x, bias, *geometry, *packed)


@given(convolutions())
def test_convolutions_against_float64(case):
    check(*case)


@pytest.mark.parametrize("bits", range(1, 9))
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_code_of_every_width(bits, dtype):
    symbols = torch.arange(40 * 7 * 9).mul(37).remainder(2**bits).to(torch.uint8).view(40, 7, 3, 3)
    assert len(symbols.unique()) == 2**bits
    x = torch.randn(2, 7, 9, 9).to(dtype)
    check(bits, symbols, torch.randn(1, 2**bits), None, None, x, ([1, 1], [1, 1], [1, 1], *NOT_TRANSPOSED))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("kernel", [3, 5])
@pytest.mark.parametrize(("channels", "outputs", "groups", "transposed"), DESIGNS.values(), ids=DESIGNS)
def test_what_networks_have(channels, outputs, groups, transposed, kernel, stride, dtype):
    shape = (channels, outputs // groups) if transposed else (outputs, channels // groups)
    symbols = torch.randint(0, 16, (*shape, kernel, kernel), dtype=torch.uint8)
    more = [stride - 1] * 2 if transposed else [0, 0]
    geometry = ([stride] * 2, [kernel // 2] * 2, [1, 1], transposed, more, groups)
    x = torch.randn(2, channels, 14, 14).to(dtype)
    for order in (torch.contiguous_format, torch.channels_last):
        check(
            4, symbols, torch.randn(1, 16), None, torch.randn(outputs), x.contiguous(memory_format=order), geometry
        )


def check(bits, symbols, table, scales, bias, x, geometry):
    found = convolve(x, bias, geometry, arguments(tiled_bits(bits), symbols, table, scales))
    # As its fake kernel says: channels are last where they are of x, and of what is in order anyway if it has one.
    last = x.dim() == 4 and (x.shape[1] == 1 or not x.is_contiguous())
    last = last and x.is_contiguous(memory_format=torch.channels_last)
    order = torch.channels_last if last else torch.contiguous_format
    assert found.dtype == x.dtype and found.is_contiguous(memory_format=order)
    weight = look_up(table.double(), symbols.view(len(table), -1)).view(symbols.shape)
    weight = weight if scales is None else weight * scales.double().view(-1, *[1] * (weight.dim() - 1))
    # the dtype of x is that of the bias, too
    offset = None if bias is None else bias.to(x.dtype).double()
    plain = torch.ops.aten.convolution
    expected = plain(x.double(), weight, offset, *geometry)
    assert found.shape == expected.shape
    size = plain(x.double().abs(), weight.abs(), None if offset is None else offset.abs(), *geometry)
    smallest = torch.finfo(x.dtype).tiny
    assert ((found.double() - expected).abs() <= TOLERANCE[x.dtype] * size + smallest).all()


@given(convolutions())
def test_tiles_are_lossless_and_as_large_as_stated(case):
    bits, symbols = case[:2]
    tiles = pack_tiles(symbols, tiled_bits(bits))
    assert tiles.numel() == tiled_size(tuple(symbols.shape), tiled_bits(bits))
    assert torch.equal(unpack_tiles(tiles, tiled_bits(bits), tuple(symbols.shape)), symbols)


@pytest.mark.parametrize("order", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize(
    ("bits", "shape", "space", "stride", "tables", "scaled"),
    [  # on either side of the pixels, sums and channels from which the weight is decoded for torch's own
        (4, (67, 66, 5, 5), (21, 24), 1, 1, False),
        (4, (67, 66, 5, 5), (20, 24), 1, 1, False),
        (3, (64, 65, 3, 2), (40, 40), 1, 1, True),
        (3, (64, 65, 3, 2), (30, 40), 1, 1, True),
        (8, (100, 64, 2, 5), (70, 66), 2, 100, True),
        (1, (63, 63, 3, 3), (40, 40), 1, 3, True),
        (5, (65, 70, 1, 7), (33, 50), 1, 13, False),
    ],
    ids=str,
)
def test_wide_ones_of_many_pixels(bits, shape, space, stride, tables, scaled, order):
    symbols = torch.randint(0, 2**bits, shape, dtype=torch.uint8)
    x = torch.randn(1, shape[1], *space).contiguous(memory_format=order)
    geometry = ([stride, 1], [1, 2], [1, 1], *NOT_TRANSPOSED)
    scales = 0.5 + torch.rand(shape[0]) if scaled else None
    check(bits, symbols, torch.randn(tables, 2**bits), scales, torch.randn(shape[0]), x, geometry)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("images", [1, 3])
@pytest.mark.parametrize("kind", ["ordinary", "pointwise", "depthwise", "grouped", "transposed"])
def test_threads_do_not_change_results(kind, dtype, images):
    kernel, groups = (1 if kind == "pointwise" else 3), {"depthwise": 40, "grouped": 4}.get(kind, 1)
    symbols = torch.randint(0, 16, (40, 40 // groups, kernel, kernel), dtype=torch.uint8)
    packed = arguments(4, symbols, torch.randn(1, 16), None)
    stride = [1, 1] if kind == "pointwise" else [1, 2]
    geometry = (stride, [kernel // 2] * 2, [1, 1], kind == "transposed", [0, 0], groups)
    x = torch.randn(images, 40, 19, 21).to(dtype)
    threads = torch.get_num_threads()
    for order in (torch.contiguous_format, torch.channels_last):
        try:
            found = []
            for count in (1, 2, 5):
                torch.set_num_threads(count)
                found.append(convolve(x.contiguous(memory_format=order), None, geometry, packed))
        finally:
            torch.set_num_threads(threads)
        assert torch.equal(found[0], found[1]) and torch.equal(found[0], found[2])


@pytest.mark.parametrize("groups", [1, 3], ids=["ordinary", "depthwise"])
def test_what_is_not_a_number_stays_in_its_place(groups):
    """Halves of pairs are empty beside an odd number of channels, and at the end of a row of taps."""
    symbols = torch.randint(0, 4, (20 if groups == 1 else 3, 3 // groups, 3, 3), dtype=torch.uint8)
    packed = arguments(2, symbols, torch.tensor([[-1.0, 0.5, 1.0, 2.0]]), None)
    for dtype in (torch.float32, torch.bfloat16):
        x = torch.randn(2, 3, 9, 9).to(dtype)
        x[1, :, 0] = float("nan")
        for turned in (False, True):
            given = x.mT if turned else x  # a column of them
            found = convolve(given, None, ([1, 1], [1, 1], [1, 1], False, [0, 0], groups), packed)
            found = found.mT if turned else found
            assert found[0].isfinite().all() and found[1, :, :2].isnan().all() and found[1, :, 2:].isfinite().all()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.randn(2, 5, 8, 8)}, "x should have 4 dimensions and 4 channels"),
        ({"x": torch.randn(2, 4, 8)}, "x should have 4 dimensions and 4 channels"),
        ({"x": torch.randn(2, 4, 1, 8)}, "the kernel is larger than the padded image"),
        ({"geometry": ([1], [1], [1], *NOT_TRANSPOSED)}, "stride should have 2 numbers, not 1"),
        (
            {"geometry": ([0, 1], [0, 0], [1, 1], *NOT_TRANSPOSED)},
            "stride, dilation and kernel should be positive",
        ),
        ({"geometry": ([1, 1], [0, 0], [1, 1], False, [0, 0], 4)}, "a weight of 6 rows has no 4 groups"),
        ({"geometry": ([1, 1], [0, 0], [1, 1], False, [0, 0], 2)}, "x should have 4 dimensions and 8 channels"),
        (
            {"geometry": ([1, 1], [9, 9], [1, 1], True, [0, 0], 1), "x": torch.randn(2, 6, 8, 8)},
            "leaves no output",
        ),
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
    right = {"x": torch.randn(2, 4, 8, 8), "bias": None, "geometry": ([1, 1], [0, 0], [1, 1], *NOT_TRANSPOSED)}
    given = {**right, "codes": codes, "table": table, **change}
    with pytest.raises(RuntimeError, match=message):
        convolve(
            given["x"], given["bias"], given["geometry"], (given["codes"], given["table"], scales, shape, bits)
        )
