"""Attention to a cache, compiled and not, beside torch's own in float64."""

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

from sqs_pyro.kernels.attention import cached_attention
from sqs_pyro.kernels.native import has_native_kernel

KERNELS = [
    pytest.param(
        torch.ops.sqs.cached_attention,
        id="compiled",
        marks=pytest.mark.skipif(not has_native_kernel("cached_attention"), reason="no C++ compiler"),
    ),
    pytest.param(cached_attention._init_fn, id="reference"),
]
# Batch, heads, heads of keys, queries, places, numbers of a key and of a value: whole registers, and none.
SIZES = [(1, 9, 3, 1, 256, 64, 64), (2, 4, 4, 3, 37, 20, 70), (1, 8, 2, 1, 1, 16, 16), (1, 6, 1, 5, 130, 128, 129)]
needs_compiler = pytest.mark.skipif(not has_native_kernel("cached_attention"), reason="no C++ compiler")


def operands(batch, heads, shared, queries, places, key, value):
    return (
        3 * torch.randn(batch, heads, queries, key),
        3 * torch.randn(batch, shared, places, key),
        torch.randn(batch, shared, places, value),
    )


def expected(q, k, v, mask, scale):
    found = scaled_dot_product_attention(q.double(), k.double(), v.double(), mask, scale=scale, enable_gqa=True)
    return found.transpose(1, 2).float()  # scores are some tens, of which float32 knows 1e-5


@pytest.mark.parametrize("attend", KERNELS)
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("masked", ["nothing", "one mask", "a mask for each"])
def test_it_is_that_of_torch(attend, size, masked):
    q, k, v = operands(*size)
    mask = None
    if masked != "nothing":
        mask = torch.rand(size[0] if masked == "a mask for each" else 1, 1, size[3], size[4]) < 0.6
        mask[..., 0] = True
    torch.testing.assert_close(attend(q, k, v, mask, 0.2), expected(q, k, v, mask, 0.2), rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("attend", KERNELS)
def test_what_is_not_seen_is_not_read(attend):
    q, k, v = operands(*SIZES[0])
    seen = torch.arange(256)[None, None, None] < 100
    first = attend(q, k, v, seen, 0.125)
    k[:, :, 100:], v[:, :, 100:] = 1e30, 7.0
    assert torch.equal(attend(q, k, v, seen, 0.125), first)


@pytest.mark.parametrize("attend", KERNELS)
def test_differences_beyond_any_exponential(attend):
    q, k, v = operands(*SIZES[0])
    found = attend(100 * q, k, v, None, 1.0)
    torch.testing.assert_close(found, expected(100 * q, k, v, None, 1.0), rtol=1e-4, atol=1e-4)


@needs_compiler
def test_numbers_that_are_none_come_through():
    for place in range(3):
        given = operands(*SIZES[0])
        given[place][0, 0, 0, 0] = float("nan")
        # The first of three heads shares the key and value, or has the query.
        assert torch.ops.sqs.cached_attention(*given, None, 0.125)[0, 0, 0].isnan().any()


@needs_compiler
def test_a_query_that_sees_nothing_gives_zeros_as_torch_has_it():
    q, k, v = operands(*SIZES[0])
    nothing = torch.zeros(1, 1, 1, 256, dtype=torch.bool)
    found = torch.ops.sqs.cached_attention(q, k, v, nothing, 0.125)
    assert torch.equal(found, torch.zeros_like(found))


@needs_compiler
@pytest.mark.parametrize(
    ("changed", "sentence"),
    [
        ({0: torch.zeros(1, 4, 1, 8, dtype=torch.float64)}, "are float32"),
        ({0: torch.zeros(1, 3, 1, 8)}, "do not fit the queries"),
        ({1: torch.zeros(1, 2, 5, 7)}, "do not fit the queries"),
        ({2: torch.zeros(1, 2, 6, 8)}, "do not fit the queries"),
        ({3: torch.zeros(1, 1, 1, 6, dtype=torch.bool)}, "whether it is seen"),
        ({3: torch.zeros(1, 1, 1, 5)}, "whether it is seen"),
    ],
)
def test_what_does_not_fit_is_refused(changed, sentence):
    given = {
        0: torch.zeros(1, 4, 1, 8),
        1: torch.zeros(1, 2, 5, 8),
        2: torch.zeros(1, 2, 5, 8),
        3: torch.ones(1, 1, 1, 5, dtype=torch.bool),
    }
    with pytest.raises(RuntimeError, match=sentence):
        torch.ops.sqs.cached_attention(*{**given, **changed}.values(), 1.0)


def test_the_operator_is_one_for_compilers():
    torch.library.opcheck(cached_attention, (*operands(*SIZES[1]), None, 0.2))
