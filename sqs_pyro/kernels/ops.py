"""Custom ops that multiply with packed weights, one of each for a run-time form.

The forms are ``dense``, ``bitmap``, and of CPU kernels ``tiled`` and ``rows`` (:mod:`sqs_pyro.kernels.decode`).

``sqs::linear_dense(x, bias, codes, table, scales, shape, bits)``; the bitmap form has ``mask`` behind ``table``.
Likewise ``convolution_*``, ``embedding_*``, ``weight_*`` (just the weight) and the gradients
``linear_grad_*`` and ``convolution_grad_*``. Packed weights are constants: gradients flow to ``x`` and ``bias``.

The implementations here decode once and keep the result (:mod:`sqs_pyro.kernels.decode`): always right, never
fast. Kernels take an op over for a device: on CPUs ``linear_tiled``, ``convolution_tiled``, ``linear_rows`` and
the embeddings of both forms are compiled (:mod:`sqs_pyro.kernels.native`); in Python
``OPS["linear_dense"].register_kernel("cuda")(function)`` does it. Autograd, ``torch.compile`` and ``torch.export``
see the same node as before.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.library import CustomOpDef, custom_op

from sqs_pyro.kernels.decode import PackedArgs, decoded_weights

OPS: dict[str, CustomOpDef] = {}
_OVERLOADS: dict[tuple[str, str], Any] = {}
_PRODUCTS = ("linear", "convolution")
REFERENCES: dict[str, Callable[..., Tensor]] = {}

_FORMS = {
    "dense": "Tensor codes, Tensor table, Tensor? scales, int[] shape, int bits",
    "bitmap": "Tensor codes, Tensor table, Tensor mask, Tensor? scales, int[] shape, int bits",
    "tiled": "Tensor codes, Tensor table, Tensor? scales, int[] shape, int bits",
    "rows": "Tensor codes, Tensor table, Tensor? scales, int[] shape, int bits",
}
_CONVOLUTION = "int[] stride, int[] padding, int[] dilation, bool transposed, int[] output_padding, int groups"


def call(name: str, packed: PackedArgs, *operands: Any) -> Tensor:
    """Call the op ``name`` in the form that the weight is packed in.

    Args:
        name: ``"linear"``, ``"convolution"``, ``"embedding"``, ``"weight"``, ``"linear_grad"`` or
            ``"convolution_grad"``.
        packed: the weight.
        operands: the op's other arguments in order.
    """
    op, compiling = _OVERLOADS[name, packed.form], torch.compiler.is_compiling()
    if name in _PRODUCTS and (compiling or torch._C._is_any_autocast_enabled()):
        operands = _autocast(packed.codes.device.type, *operands)
    mask = () if packed.mask is None else (packed.mask,)
    arguments = (*operands, packed.codes, packed.table, *mask, packed.scales, packed.shape, packed.bits)
    learns = torch.is_grad_enabled() and any(map(_learns, operands))
    if compiling or learns or torch.is_inference_mode_enabled():
        return op(*arguments)
    with torch._C._AutoDispatchBelowAutograd():  # Python's part of autograd takes longer than a small product
        return op(*arguments)


def _autocast(device: str, x: Tensor, *others: Any) -> tuple[Any, ...]:
    """The operands of a product, x in the dtype that autocast wants, as torch's own products take it."""
    return (x.to(torch.get_autocast_dtype(device)) if torch.is_autocast_enabled(device) else x, *others)


def _learns(operand: Any) -> bool:
    return isinstance(operand, Tensor) and operand.requires_grad


def _linear(weight: Tensor, x: Tensor, bias: Tensor | None) -> Tensor:
    return F.linear(x, weight, None if bias is None else bias.to(x.dtype))


def _linear_grad(weight: Tensor, grad: Tensor) -> Tensor:
    return grad @ weight


def _convolution(weight: Tensor, x: Tensor, bias: Tensor | None, *geometry: Any) -> Tensor:
    return torch.ops.aten.convolution(x, weight, None if bias is None else bias.to(x.dtype), *geometry)


def _convolution_grad(weight: Tensor, grad: Tensor, size: list[int], *geometry: Any) -> Tensor:
    x = grad.new_empty(1).expand(size)  # only its shape matters
    backward = torch.ops.aten.convolution_backward
    return backward(grad, x, weight, None, *geometry, [True, False, False])[0]


def _embedding(weight: Tensor, indices: Tensor, dtype: torch.dtype) -> Tensor:
    return F.embedding(indices, weight)


def _weight(weight: Tensor, like: Tensor) -> Tensor:
    return weight.clone()  # an op's result may be overwritten by a compiler; the shared copy may not


def _define(name: str, operands: str, compute: Callable[..., Tensor]) -> None:
    """Define the op in every form; its fake kernel is the same computation with an empty weight."""
    for form in _forms(name):
        _define_form(f"{name}_{form}", f"({operands}, {_FORMS[form]}) -> Tensor", compute)


def _forms(name: str) -> list[str]:
    """Weights in rows are matrices."""
    return [form for form in _FORMS if form != "rows" or not name.startswith("convolution")]


def _define_form(name: str, schema: str, compute: Callable[..., Tensor]) -> None:
    def reference(*args: Any) -> Tensor:
        operands, packed = _split(name, args)
        return in_order(compute(decoded_weights.get(packed, _dtype(operands)), *operands))

    def fake(*args: Any) -> Tensor:
        operands, packed = _split(name, args)
        weight = packed.codes.new_empty(packed.shape, dtype=_dtype(operands))
        return in_order(compute(weight, *operands))

    in_order = Tensor.contiguous if name == "convolution_tiled" else _as_it_is  # as its compiled kernel writes
    REFERENCES[name] = reference
    OPS[name] = custom_op(f"sqs::{name}", reference, mutates_args=(), schema=schema)
    OPS[name].register_fake(fake)
    product, _, form = name.rpartition("_")
    _OVERLOADS[product, form] = OPS[name]._opoverload


def _as_it_is(result: Tensor) -> Tensor:
    return result


def _split(name: str, args: tuple[Any, ...]) -> tuple[tuple[Any, ...], PackedArgs]:
    """Split an op's arguments into operands and packed weight."""
    form = name.rpartition("_")[2]
    if form == "bitmap":
        *operands, codes, table, mask, scales, shape, bits = args
    else:
        *operands, codes, table, scales, shape, bits = args
        mask = None
    return tuple(operands), PackedArgs(codes, table, mask, tuple(shape), bits, scales, form)


def _dtype(operands: tuple[Any, ...]) -> torch.dtype:
    """Return the dtype to compute in: the one asked for, else that of the first operand."""
    last = operands[-1]
    return last if isinstance(last, torch.dtype) else operands[0].dtype


_define("linear", "Tensor x, Tensor? bias", _linear)
_define("linear_grad", "Tensor grad", _linear_grad)
_define("convolution", f"Tensor x, Tensor? bias, {_CONVOLUTION}", _convolution)
_define("convolution_grad", f"Tensor grad, SymInt[] size, {_CONVOLUTION}", _convolution_grad)
_define("embedding", "Tensor indices, ScalarType dtype", _embedding)
_define("weight", "Tensor like", _weight)


def _register_gradient(name: str, grad_x: Callable[..., Tensor], channel_dim: int) -> None:
    """Let gradients flow to ``x`` through ``grad_x(packed, grad, x_size, geometry)``, and to ``bias``."""
    for form in _forms(name):
        op_name = f"{name}_{form}"

        def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor, op_name: str = op_name) -> None:
            (x, bias, *ctx.geometry), packed = _split(op_name, inputs)
            ctx.x_size, ctx.bias_dtype = x.shape, None if bias is None else bias.dtype
            ctx.shape, ctx.bits, ctx.form = packed.shape, packed.bits, packed.form
            ctx.save_for_backward(packed.codes, packed.table, packed.mask, packed.scales)

        def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
            codes, table, mask, scales = ctx.saved_tensors
            packed = PackedArgs(codes, table, mask, ctx.shape, ctx.bits, scales, ctx.form)
            x = grad_x(packed, grad, ctx.x_size, ctx.geometry) if ctx.needs_input_grad[0] else None
            bias = None
            if ctx.needs_input_grad[1]:
                kept = channel_dim % grad.dim()
                bias = grad.sum([d for d in range(grad.dim()) if d != kept]) if grad.dim() > 1 else grad
                bias = bias.to(ctx.bias_dtype)
            return x, bias, *[None] * (len(ctx.needs_input_grad) - 2)

        OPS[op_name].register_autograd(backward, setup_context=setup_context)


_register_gradient("linear", lambda packed, grad, size, geometry: call("linear_grad", packed, grad), -1)
_register_gradient(
    "convolution",
    lambda packed, grad, size, geometry: call("convolution_grad", packed, grad, size, *geometry),
    1,
)
