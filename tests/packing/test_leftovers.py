"""What is not compressed is stored in the smallest dtype that holds it exactly."""

import pytest
import torch

from sqs_pyro.packing.leftovers import smallest_exact

F32 = torch.finfo(torch.float32)
F16 = torch.finfo(torch.float16)


@pytest.mark.parametrize(
    "values, dtype",
    [
        ([0.0, -0.0, 1.5, float("nan"), float("inf"), -float("inf")], torch.float16),
        ([F16.max, -F16.max, F16.smallest_normal / 1024], torch.float16),
        ([2.0**100, -(2.0**-100)], torch.bfloat16),
        ([F32.max, float("inf")], torch.float32),  # what attention masks are full of is no infinity
        ([0.0, F32.min], torch.float32),
        ([1 / 3], torch.float32),
    ],
)
def test_every_value_comes_back(values, dtype):
    value = torch.tensor(values)
    stored = smallest_exact(value)
    assert stored.dtype == dtype
    back = stored.to(value.dtype)
    torch.testing.assert_close(back, value, rtol=0, atol=0, equal_nan=True)
    assert back.signbit().equal(value.signbit())


def test_float64_stays_where_float32_would_lose_a_value():
    value = torch.tensor([torch.finfo(torch.float64).max], dtype=torch.float64)
    assert smallest_exact(value).equal(value) and smallest_exact(value).dtype == torch.float64
    assert smallest_exact(torch.tensor([0.5], dtype=torch.float64)).dtype == torch.float16
