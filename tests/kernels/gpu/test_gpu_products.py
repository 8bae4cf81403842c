"""The Triton kernels against dense products in float64: on a GPU, or by Triton's interpreter."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kits.gpu import DEVICE, needs_kernels, random_packed, rounded, tolerance

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
FORMS = pytest.mark.parametrize("form", ["dense", "bitmap"])
pytestmark = needs_kernels
EXAMPLES = 200 if DEVICE == "cuda" else 30  # the interpreter takes a third of a second for each


def laid_out(x, layout):
    """The same numbers elsewhere in memory."""
    if layout == "transposed" and x.dim() > 1:
        return x.transpose(0, -1).contiguous().transpose(0, -1)
    return torch.stack([x, x + 1], -1)[..., 0] if layout == "strided" else x


def divisor(draw, numel, shape):
    """Rows of the table: one, or one for each out-channel, part of a row, few rows, or run of weights."""
    outputs, inputs = shape
    per_row = [outputs * n for n in range(1, inputs + 1) if inputs % n == 0]
    several = [outputs // n for n in range(1, outputs + 1) if outputs % n == 0]
    free = [n for n in range(1, numel + 1) if numel % n == 0]
    return draw(st.sampled_from(draw(st.sampled_from([[1], [outputs], per_row, several, free]))))


@st.composite
def products(draw, forms=("dense", "bitmap")):
    bits = draw(st.integers(1, 8))
    outputs = draw(st.integers(1, 80))
    inputs = draw(st.one_of(st.integers(1, 90), st.sampled_from([64, 96, 128, 160, 256, 288, 384])))
    rows = draw(st.sampled_from([(), (0,), (1,), (2,), (3,), (4,), (5,), (16,), (2, 3), (33,), (70,)]))
    groups = divisor(draw, outputs * inputs, (outputs, inputs))
    packed, weight = random_packed(
        (outputs, inputs),
        bits,
        draw(st.sampled_from(forms)),
        groups,
        draw(st.sampled_from([False, True, *(n for n in range(2, inputs + 1) if inputs % n == 0)])),
        draw(st.sampled_from([0.0, 0.5, 0.9, 1.0])),
        draw(st.integers(1, 2**bits)),
        draw(st.integers(0, 2**31)),
    )
    x = torch.randn(*rows, inputs).to(draw(st.sampled_from(DTYPES)))
    bias = torch.randn(outputs) if draw(st.booleans()) else None
    return packed, weight, laid_out(x, draw(st.sampled_from(["contiguous", "transposed", "strided"]))), bias


def check_linear(packed, weight, x, bias):
    from sqs_pyro.kernels.gpu import launch

    found = launch.linear(packed, x.to(DEVICE), None if bias is None else bias.to(DEVICE)).cpu()
    assert found.dtype == x.dtype and found.shape == (*x.shape[:-1], len(weight))
    offset = torch.zeros(len(weight)) if bias is None else bias.to(x.dtype)
    expected = x.double() @ weight.double().T + offset.double()
    size = x.double().abs() @ weight.double().abs().T + offset.double().abs()
    smallest = torch.finfo(x.dtype).tiny
    assert ((found.double() - expected).abs() <= 2 * tolerance(x.dtype) * size + smallest).all()


def check_rows(packed, weight, dtype):
    from sqs_pyro.kernels.gpu import launch

    assert torch.equal(launch.dense(packed, dtype).cpu(), rounded(weight, dtype))
    indices = torch.randint(0, len(weight), (3, 2))
    for kind in (torch.int64, torch.int32):
        found = launch.embedding(packed, indices.to(DEVICE, kind), dtype)
        assert torch.equal(found.cpu(), rounded(weight, dtype)[indices])


@pytest.mark.slow
@settings(max_examples=EXAMPLES)
@given(products())
def test_products(case):
    check_linear(*case)


@pytest.mark.slow
@settings(max_examples=EXAMPLES // 2)
@given(products())
def test_rows_and_weights_are_exact(case):
    packed, weight, x, _ = case
    check_rows(packed, weight, x.dtype)


#: Every width with every path, in both forms; in turn where each takes the interpreter a second.
WIDTHS = [(bits, form) for bits in range(1, 9) for form in ("dense", "bitmap")]


@pytest.mark.parametrize(("bits", "form"), WIDTHS if DEVICE == "cuda" else WIDTHS[::3])
@pytest.mark.parametrize(
    ("shape", "rows", "dtype"),
    [
        ((33, 192), 1, torch.float16),  # sums of products, K in parts
        ((17, 39), 3, torch.float32),
        ((20, 264), 16, torch.float16),  # tensor cores
        ((5, 130), 33, torch.bfloat16),
        ((3, 130), 70, torch.bfloat16),  # decoded for the product
    ],
)
def test_every_path(form, bits, shape, rows, dtype):
    packed, weight = random_packed(shape, bits, form, groups=shape[0] if rows == 33 else 1, scales=rows == 16)
    bias = torch.randn(shape[0]) if rows % 2 else None
    check_linear(packed, weight, torch.randn(rows, shape[1]).to(dtype), bias)
    check_rows(packed, weight, dtype)


@FORMS
def test_results_repeat(form):
    from sqs_pyro.kernels.gpu import launch

    packed, _ = random_packed((48, 700), 4, form)
    for rows in (1, 7):
        x = torch.randn(rows, 700, device=DEVICE, dtype=torch.float16)
        assert torch.equal(launch.linear(packed, x, None), launch.linear(packed, x, None))


@FORMS
def test_indices_outside_give_no_number(form):
    from sqs_pyro.kernels.gpu import launch

    packed, weight = random_packed((6, 40), 3, form)
    found = launch.embedding(packed, torch.tensor([5, 6, -1], device=DEVICE), torch.float32).cpu()
    assert torch.equal(found[0], weight[5]) and found[1:].isnan().all()


def test_what_is_not_a_number_stays_so():
    from sqs_pyro.kernels.gpu import launch

    packed, _ = random_packed((20, 64), 2, zeros=0.0)
    x = torch.randn(3, 64)
    x[1, 4] = float("nan")
    for dtype in DTYPES:
        found = launch.linear(packed, x.to(DEVICE, dtype), None)
        assert found[0].isfinite().all() and found[1].isnan().all() and found[2].isfinite().all()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"shape": (4, 9)}, "the last dimension of x should be 9"),
        ({"codes": torch.zeros(15, dtype=torch.uint8)}, "codes of 4 bits should have 16 bytes, not 15"),
        ({"table": torch.zeros(3, 64, dtype=torch.uint8)}, "a table of 3 rows does not fit 32 weights"),
        ({"scales": torch.zeros(4, dtype=torch.uint8)}, "scales should have 4 numbers"),
        ({"scales": torch.zeros(4, 6, dtype=torch.uint8)}, r"scales of shape \[4, 3\] do not fit 4 outputs of 8"),
        ({"mask": torch.zeros(3, dtype=torch.uint8), "form": "bitmap"}, "the mask should have 4 bytes, not 3"),
    ],
)
def test_wrong_arguments_are_told(change, message):
    from sqs_pyro.kernels.gpu import launch

    packed, _ = random_packed((4, 8), 4)
    change = {
        name: value.to(DEVICE) if isinstance(value, torch.Tensor) else value for name, value in change.items()
    }
    x = torch.randn(2, 8, device=DEVICE)
    with pytest.raises(RuntimeError, match=message):
        launch.linear(packed._replace(**change), x, None)
    with pytest.raises(RuntimeError, match="the bias should have 4 numbers"):
        launch.linear(packed, x, torch.zeros(3, device=DEVICE))
    with pytest.raises(RuntimeError, match="indices should be int64 or int32"):
        launch.embedding(packed, x, torch.float32)
