"""The compiled CPU products against float64, over layouts, shapes, bits, codebooks, zeros, dtypes and batches."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sqs_pyro.kernels.decode import TRANSCODERS, write_scales, write_table
from sqs_pyro.kernels.native import native_kernels
from sqs_pyro.kernels.rows import fits_rows, rows_size
from sqs_pyro.kernels.tiled import tiled_bits, tiled_size
from sqs_pyro.packing.coded import look_up, scaled

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
#: Of the sum of absolute products: roundings of codewords (bfloat16, where the machine multiplies in it), of the
#: result, and of sums in float32.
TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 1.01 * 2.0**-7, torch.float16: 2.0**-10, torch.float64: 1e-14}

FORMS = ["tiled", "rows"]

pytestmark = pytest.mark.skipif(not all(map(native_kernels, FORMS)), reason="no C++ compiler")


@st.composite
def products(draw):
    form, bits = draw(st.sampled_from(FORMS)), draw(st.integers(1, 8))
    outputs, inputs = draw(st.integers(1, 70)), draw(st.integers(1, 300))
    tables = 1
    if form == "rows":
        inputs = draw(st.sampled_from([inputs, 32, 64, 192, 320]))
        many = (1, 2, outputs, 2 * outputs, outputs * max(1, inputs // 32))
        tables = draw(st.sampled_from([groups for groups in many if fits_rows((outputs, inputs), groups)]))
    batches = [(), (0,), (1,), (2,), (3,), (4,), (5,), (8,), (9,), (16,), (17,), (2, 3), (3, 33)]
    rows = draw(st.sampled_from(batches))
    size = draw(st.integers(1, 2**bits))
    zeros = draw(st.sampled_from([0.0, 0.5, 0.9, 1.0]))
    dtype = draw(st.sampled_from(DTYPES))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    symbols = torch.randint(0, size, (outputs, inputs), dtype=torch.uint8, generator=generator)
    symbols[torch.rand(outputs, inputs, generator=generator) < zeros] = 0
    table = torch.randn(tables, size, generator=generator)
    table[:, 0] = 0
    parts = [n for n in (1, 2, 3, 5, 6, 10) if form == "rows" and fits_rows((outputs, inputs), tables, n)]
    of_scales = draw(st.sampled_from([None, (outputs,), *((outputs, n) for n in parts if n > 1)]))
    scales = None if of_scales is None else (0.5 + torch.rand(of_scales, generator=generator)).half().float()
    bias = torch.randn(outputs, generator=generator) if draw(st.booleans()) else None
    x = torch.randn(*rows, inputs, generator=generator)
    layout = draw(st.sampled_from(["contiguous", "transposed", "strided", "offset"]))
    return form, tiled_bits(bits), symbols, table, scales, bias, laid_out(x.to(dtype), layout)


def laid_out(x: torch.Tensor, layout: str) -> torch.Tensor:
    """The same numbers elsewhere in memory."""
    if layout == "transposed" and x.dim() > 1:
        return x.transpose(0, -1).contiguous().transpose(0, -1)
    if layout == "strided":
        return torch.stack([x, x + 1], -1)[..., 0]
    if layout == "offset":
        return torch.cat([x.new_ones(1), x.reshape(-1)])[1:].view(x.shape)
    return x.contiguous(memory_format=torch.channels_last) if layout == "channels last" else x


def packed(form, bits, symbols, table, scales):
    return TRANSCODERS[form][0](symbols, bits), write_table(table), write_scales(scales), list(symbols.shape), bits


def op(name, form):
    return getattr(torch.ops.sqs, f"{name}_{form}")


def dense(symbols, table):
    return look_up(table, symbols.view(len(table), -1)).view(symbols.shape)


@given(products())
def test_products_against_float64(case):
    check(*case)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("bits", range(1, 9))
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_code_of_every_width(form, bits, dtype):
    """Drawn cases have few values."""
    symbols = torch.arange(40 * 128).mul(37).remainder(2**bits).to(torch.uint8).view(40, 128)
    assert len(symbols.unique()) == 2**bits
    table = torch.randn(40 if form == "rows" else 1, 2**bits)
    for rows in (1, 3, 40):
        check(form, tiled_bits(bits), symbols, table, None, None, torch.randn(rows, 128).to(dtype))


def check(form, bits, symbols, table, scales, bias, x):
    found = op("linear", form)(x, bias, *packed(form, bits, symbols, table, scales))
    assert found.dtype == x.dtype and found.shape == (*x.shape[:-1], len(symbols))
    weight = scaled(dense(symbols, table.double()), None if scales is None else scales.double())
    # the dtype of x is that of the bias, too
    offset = torch.zeros(len(symbols), dtype=torch.double) if bias is None else bias.to(x.dtype).double()
    expected = x.double() @ weight.T + offset
    size = x.double().abs() @ weight.abs().T + offset.abs()
    smallest = torch.finfo(x.dtype).tiny
    assert ((found.double() - expected).abs() <= TOLERANCE[x.dtype] * size + smallest).all()


@given(products())
def test_rows_of_the_weight_are_exact(case):
    form, bits, symbols, table, scales, _, x = case
    indices = torch.randint(0, len(symbols), (3, 2))
    found = op("embedding", form)(indices, x.dtype, *packed(form, bits, symbols, table, scales))
    weight = scaled(dense(symbols, table), scales)
    assert torch.equal(found, weight.to(x.dtype)[indices])


@given(products())
def test_layouts_are_lossless_and_as_large_as_stated(case):
    form, bits, symbols = case[:3]
    pack, unpack = TRANSCODERS[form]
    codes = pack(symbols, bits)
    assert codes.numel() == {"tiled": tiled_size, "rows": rows_size}[form](tuple(symbols.shape), bits)
    assert torch.equal(unpack(codes, bits, tuple(symbols.shape)), symbols)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows", [1, 3, 7, 40])
def test_threads_do_not_change_results(form, dtype, rows):
    symbols, x = torch.randint(0, 16, (200, 130), dtype=torch.uint8), torch.randn(rows, 130).to(dtype)
    arguments = packed(form, 4, symbols, torch.randn(1, 16), None)
    threads = torch.get_num_threads()
    try:
        found = []
        for count in (1, 2):
            torch.set_num_threads(count)
            found.append(op("linear", form)(x, None, *arguments))
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(*found)


@pytest.mark.parametrize("form", FORMS)
def test_what_is_not_a_number_stays_so(form):
    symbols, x = torch.randint(0, 4, (20, 50), dtype=torch.uint8), torch.randn(3, 50)
    x[1, 4], x[2, 7] = float("nan"), float("inf")
    table = torch.tensor([[-1.0, 0.5, 1.0, 2.0]])
    found = op("linear", form)(x, None, *packed(form, 2, symbols, table, None))
    assert found[0].isfinite().all() and found[1].isnan().all() and not found[2].isfinite().any()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.randn(2, 7)}, "the last dimension of x should be 8"),
        ({"x": torch.ones(2, 8, dtype=torch.int64)}, "x should be float32, bfloat16, float16 or float64"),
        ({"codes": torch.zeros(63, dtype=torch.uint8)}, "codes of this weight have [0-9]* bytes, not 63"),
        ({"table": torch.zeros(1, 100, dtype=torch.uint8)}, "a table of 100 bytes does not fit codes of 4 bits"),
        ({"table": torch.zeros(3, 64, dtype=torch.uint8)}, "3 tables do not fit 4 outputs of 8 inputs|takes one"),
        ({"bits": 6}, "codes of 1, 2, 3, 4, 5 or 8 bits, not 6"),
        ({"shape": [4, 2, 4]}, "the weight of a product has two dimensions, not 3"),
        ({"bias": torch.zeros(3)}, "the bias should have 4 numbers"),
        ({"scales": torch.zeros(4, dtype=torch.uint8)}, "scales have 16 bytes, not 4"),
        ({"scales": torch.zeros(4, 4, dtype=torch.uint8)}, "scales of 2 parts do not fit 4 outputs of 8 inputs"),
        ({"scales": torch.zeros(4, 3, dtype=torch.uint8)}, "scales of 1 parts do not fit 4 outputs of 8 inputs"),
    ],
)
@pytest.mark.parametrize("form", FORMS)
def test_wrong_arguments_are_told_and_read_nowhere(form, change, message):
    symbols, table = torch.zeros(4, 8, dtype=torch.uint8), torch.zeros(1, 16)
    codes, table, scales, shape, bits = packed(form, 4, symbols, table, None)
    right = {"x": torch.randn(2, 8), "bias": None, "codes": codes, "table": table, "scales": scales}
    arguments = {**right, "shape": shape, "bits": bits, **change}
    with pytest.raises(RuntimeError, match=message):
        op("linear", form)(*arguments.values())
    with pytest.raises(RuntimeError, match="index 4 is outside of a table of 4 rows"):
        op("embedding", form)(torch.tensor([0, 4]), torch.float32, codes, table, scales, shape, bits)
