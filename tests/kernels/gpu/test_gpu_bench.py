"""The benchmark on a GPU: every method that is there, products in CUDA graphs."""

import pytest
import torch
from kits.gpu import needs_gpu

from sqs_pyro.bench.kernels import _methods, bench_kernels

pytestmark = needs_gpu


def test_every_method_at_every_shape():
    document = bench_kernels(((1024, 512),), (1, 16), (4, 2), rounds=3, device="cuda")
    methods = {row["method"] for row in document["rows"]}
    assert {"bfloat16", "packed, 4 bits, bfloat16", "packed, 2 bits, bfloat16, Triton only"} <= methods
    assert all(0 < row["microseconds"] < 1e5 for row in document["rows"])
    assert document["machine"]["gpu"] == torch.cuda.get_device_name()


@pytest.mark.parametrize("rows", [1, 16, 64])
@torch.inference_mode()
def test_what_is_timed_is_the_product(rows):
    methods, _ = _methods(256, 512, (4,), "cuda")
    dtype, copies = methods["packed, 4 bits, bfloat16"]
    weight = copies[0].packed_weight.coded().dense()
    x = torch.randn(rows, 512)
    expected = x.to(dtype).double() @ weight.double().T
    size = x.to(dtype).double().abs() @ weight.double().abs().T
    for name in ("packed, 4 bits, bfloat16", "packed, 4 bits, bfloat16, Triton only"):
        for copy in methods[name][1][:2]:
            assert ((copy(x.to("cuda", dtype)).cpu().double() - expected).abs() <= 2.0**-7 * size).all()
