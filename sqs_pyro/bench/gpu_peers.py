"""Other low-bit products on GPUs, for ``sqs bench kernels``: the numbers do not matter, their time does.

Each function makes ``x -> x @ W.T`` from a weight ``[N, K]`` on the GPU, and raises one of
:data:`~sqs_pyro.bench.report.PEER_ERRORS` where it cannot: the library is not installed, of another version, or
does not take the shape.
"""

import torch
from torch import Tensor

from sqs_pyro.bench.product_timer import Product

_GROUP = 64


def int4_aten(weight: Tensor) -> Product:
    """Return the kernel behind torchao's int4 weights."""
    outputs, inputs = weight.shape
    codes = torch.randint(0, 256, (outputs, inputs // 2), dtype=torch.uint8, device=weight.device)
    packed = torch.ops.aten._convert_weight_to_int4pack(codes, 8)  # 8 inner tiles of K, torchao's choice
    # [K / 64, N, 2]: a scale and a zero of each group.
    scales = torch.ones(inputs // _GROUP, outputs, 2, dtype=torch.bfloat16, device=weight.device)
    return lambda x: torch.ops.aten._weight_int4pack_mm(x, packed, _GROUP, scales)


def int4_gemlite(weight: Tensor) -> Product:
    """Return gemlite's Triton kernels, groups of 64."""
    from gemlite.core import DType, GemLiteLinearTriton

    outputs, inputs = weight.shape
    layer = GemLiteLinearTriton(
        4,
        group_size=_GROUP,
        in_features=inputs,
        out_features=outputs,
        input_dtype=DType.BF16,
        output_dtype=DType.BF16,
    )
    codes = torch.randint(0, 16, (outputs, inputs), dtype=torch.uint8, device=weight.device)
    scales = torch.ones(outputs * inputs // _GROUP, 1, dtype=torch.bfloat16, device=weight.device)
    layer.pack(codes, scales, scales * 8, None)  # zero points in the middle of 16 codes
    return layer


def int4_marlin(weight: Tensor) -> Product:
    """Return IST-DASLab's Marlin: float16, groups of 128."""
    import marlin

    outputs, inputs = weight.shape
    if not hasattr(marlin, "Layer"):  # PyPI has a package of this name that has nothing to do with it
        raise ImportError("the installed package 'marlin' is another one")
    layer = marlin.Layer(inputs, outputs, groupsize=128).to(weight.device)
    layer.B.random_()
    layer.s.fill_(1)
    return layer
