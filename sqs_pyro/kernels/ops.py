"""Custom ops that multiply with packed weights, one of each for a run-time form.

The forms are ``dense``, ``bitmap``, and of CPU kernels ``tiled`` and ``rows`` (:mod:`sqs_pyro.kernels.decode`).

``sqs::linear_dense(x, bias, codes, table, scales, shape, bits)``; the bitmap form has ``mask`` behind ``table``.
``linear_int8_tiled(x, bias, block, ...)`` rounds each ``block`` inputs of x to 8 bits first. Likewise
``convolution_*``, ``embedding_*``, ``weight_*`` (just the weight) and the gradients ``linear_grad_*`` and
``convolution_grad_*``. Packed weights are constants: gradients of any order flow to ``x`` and ``bias``, but for
rounded inputs. Under a transform of ``torch.func`` (``vmap``, ``jvp``, ``grad``, ...) or forward differentiation,
:func:`call` multiplies with the decoded weight.

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
from torch.autograd import forward_ad
from torch.library import CustomOpDef, custom_op

from sqs_pyro.errors import NetworkError
from sqs_pyro.kernels.decode import PackedArgs, decoded_weights

# Filled below, at import, and never changed: by name with form, by name and form, by name.
OPS: dict[str, CustomOpDef] = {}
_OVERLOADS: dict[tuple[str, str], Any] = {}
_COMPUTED: dict[str, Callable[..., Tensor]] = {}
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
    # The overload itself: through its packet every call would look for one that fits.
    op, compiling = _OVERLOADS[name, packed.form], torch.compiler.is_compiling()
    # A custom op has no autocast of its own; asked for only where it may be on, as asking takes time.
    if name in _PRODUCTS and (compiling or torch._C._is_any_autocast_enabled()):
        operands = _autocast(packed.codes.device.type, *operands)
    # Custom ops cannot follow these, of any order and nested; products with a decoded weight can.
    if torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0:
        return _transformed(name, packed, operands)
    arguments = (*operands, *_arguments(packed))
    learns = torch.is_grad_enabled() and any(map(_learns, operands))
    # In inference mode the dispatcher has left autograd out already.
    if compiling or learns or torch.is_inference_mode_enabled():
        return op(*arguments)
    with torch._C._AutoDispatchBelowAutograd():  # Python's part of autograd takes longer than a small product
        return op(*arguments)


def _transformed(name: str, packed: PackedArgs, operands: tuple[Any, ...]) -> Tensor:
    """Compute it with the decoded weight, whose products torch can vectorise and differentiate forward.

    Raises:
        NetworkError: it is the packed weight itself that is transformed.
    """
    compute, dtype = _COMPUTED[name], result_dtype(operands)
    if torch.compiler.is_compiling():
        # The op `weight`, not the kept copy: that would become a constant of the graph.
        like = torch.empty(0, dtype=dtype, device=packed.codes.device)
        return compute(_OVERLOADS["weight", packed.form](like, *_arguments(packed)), *operands)
    if any(map(torch._C._functorch.is_functorch_wrapped_tensor, packed.buffers())):
        raise NetworkError(
            "A transform of torch.func runs over the codes of a packed weight, but takes only inputs and biases: "
            "leave the buffers out (in_dims=None), or transform networks made from sqs_pyro.kernels.dense_state."
        )
    return compute(decoded_weights.get(packed, dtype), *operands)


def _arguments(packed: PackedArgs) -> tuple[Any, ...]:
    mask = () if packed.mask is None else (packed.mask,)
    return packed.codes, packed.table, *mask, packed.scales, packed.shape, packed.bits


def _autocast(device: str, x: Tensor, *others: Any) -> tuple[Any, ...]:
    """Return the operands of a product, x in the dtype that autocast wants, as torch's own products take it."""
    return (x.to(torch.get_autocast_dtype(device)) if torch.is_autocast_enabled(device) else x, *others)


def _learns(operand: Any) -> bool:
    return isinstance(operand, Tensor) and operand.requires_grad


def _linear(weight: Tensor, x: Tensor, bias: Tensor | None) -> Tensor:
    return F.linear(x, weight, None if bias is None else bias.to(x.dtype))


def _linear_int8(weight: Tensor, x: Tensor, bias: Tensor | None, block: int) -> Tensor:
    return _linear(weight, rounded_inputs(x, block), bias)


def rounded_inputs(x: Tensor, block: int) -> Tensor:
    """Return x ``[..., M]`` as whole numbers from -127 to 127 times a scale of each ``block`` inputs in a row."""
    parts = F.pad(x, (0, -x.shape[-1] % block)).unflatten(-1, (-1, block))
    largest = parts.abs().amax(-1, keepdim=True)
    whole = (parts * (127 / largest.masked_fill(largest == 0, 1))).round()
    return (whole * (largest / 127)).flatten(-2)[..., : x.shape[-1]]


def _linear_grad(weight: Tensor, grad: Tensor) -> Tensor:
    return grad @ weight


def _convolution(weight: Tensor, x: Tensor, bias: Tensor | None, *geometry: Any) -> Tensor:
    # aten's one convolution: with geometry for every number of dimensions, transposed or not.
    return torch.ops.aten.convolution(x, weight, None if bias is None else bias.to(x.dtype), *geometry)


def _convolution_grad(weight: Tensor, grad: Tensor, size: list[int], *geometry: Any) -> Tensor:
    x = grad.new_empty(1).expand(size)  # only its shape matters
    backward = torch.ops.aten.convolution_backward
    return backward(grad, x, weight, None, *geometry, [True, False, False])[0]


def _embedding(weight: Tensor, indices: Tensor, dtype: torch.dtype) -> Tensor:
    return F.embedding(indices, weight)  # in the dtype decoded to


def _weight(weight: Tensor, like: Tensor) -> Tensor:
    return weight.clone()  # an op's result may be overwritten by a compiler; the shared copy may not


def _define(name: str, operands: str, compute: Callable[..., Tensor]) -> None:
    """Define the op in every form; its fake kernel is the same computation with an empty weight."""
    _COMPUTED[name] = compute
    for form in _forms(name):
        _define_form(f"{name}_{form}", f"({operands}, {_FORMS[form]}) -> Tensor", compute)


def _forms(name: str) -> list[str]:
    """Return the forms that an op has: weights in rows are matrices, so that no convolution has them."""
    if name == "linear_int8":  # for compiled kernels alone: without them nothing is gained
        return ["tiled"]
    return [form for form in _FORMS if form != "rows" or not name.startswith("convolution")]


def _define_form(name: str, schema: str, compute: Callable[..., Tensor]) -> None:
    def reference(*args: Any) -> Tensor:
        operands, packed = split_arguments(name, args)
        return in_order(compute(decoded_weights.get(packed, result_dtype(operands)), *operands), operands[0])

    def fake(*args: Any) -> Tensor:
        operands, packed = split_arguments(name, args)
        weight = packed.codes.new_empty(packed.shape, dtype=result_dtype(operands))  # of a fake tensor: no memory
        return in_order(compute(weight, *operands), operands[0])

    in_order = _in_order_of if name == "convolution_tiled" else _as_it_is  # as its compiled kernel writes
    REFERENCES[name] = reference
    OPS[name] = custom_op(f"sqs::{name}", reference, mutates_args=(), schema=schema)
    OPS[name].register_fake(fake)
    product, _, form = name.rpartition("_")  # "linear_grad_dense": the last part
    _OVERLOADS[product, form] = OPS[name]._opoverload


def _as_it_is(result: Tensor, x: Tensor) -> Tensor:
    return result


def _in_order_of(result: Tensor, x: Tensor) -> Tensor:
    """Return it with channels last where only that is how ``x`` is in order, or x has one channel."""
    last = x.dim() == 4 and (x.shape[1] == 1 or not x.is_contiguous())
    last = last and x.is_contiguous(memory_format=torch.channels_last)
    return result.contiguous(memory_format=torch.channels_last if last else torch.contiguous_format)


def split_arguments(name: str, args: tuple[Any, ...]) -> tuple[tuple[Any, ...], PackedArgs]:
    """Split an op's arguments into operands and packed weight."""
    form = name.rpartition("_")[2]
    if form == "bitmap":
        *operands, codes, table, mask, scales, shape, bits = args
    else:
        *operands, codes, table, scales, shape, bits = args
        mask = None
    return tuple(operands), PackedArgs(codes, table, mask, tuple(shape), bits, scales, form)


def result_dtype(operands: tuple[Any, ...]) -> torch.dtype:
    """Return the dtype to compute in: the one asked for, else that of the first operand."""
    last = operands[-1]
    return last if isinstance(last, torch.dtype) else operands[0].dtype


_define("linear", "Tensor x, Tensor? bias", _linear)
_define("linear_int8", "Tensor x, Tensor? bias, int block", _linear_int8)
_define("linear_grad", "Tensor grad", _linear_grad)
_define("convolution", f"Tensor x, Tensor? bias, {_CONVOLUTION}", _convolution)
_define("convolution_grad", f"Tensor grad, SymInt[] size, {_CONVOLUTION}", _convolution_grad)
_define("embedding", "Tensor indices, ScalarType dtype", _embedding)
_define("weight", "Tensor like", _weight)


def _register_gradient(name: str, channel_dim: int) -> None:
    """Let gradients flow to ``x``, and to ``bias``."""

    def grad_x(ctx: Any, grad: Tensor) -> Tensor:
        size = (ctx.x_size,) if name == "convolution" else ()
        return call(f"{name}_grad", _kept(ctx), grad, *size, *ctx.geometry)

    def setup_context(ctx: Any, operands: tuple[Any, ...]) -> None:
        x, bias, *ctx.geometry = operands
        ctx.x_size, ctx.bias_dtype = x.shape, None if bias is None else bias.dtype

    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        bias = None
        if ctx.needs_input_grad[1]:
            kept = channel_dim % grad.dim()
            # Over all but channels
            bias = grad.sum([d for d in range(grad.dim()) if d != kept]) if grad.dim() > 1 else grad
            bias = bias.to(ctx.bias_dtype)
        return grad_x(ctx, grad) if ctx.needs_input_grad[0] else None, bias

    _register_autograd(name, setup_context, backward)


def _register_second_gradient(name: str) -> None:
    """Let gradients flow to a gradient, whose op is linear: its transpose is the product itself."""

    def setup_context(ctx: Any, operands: tuple[Any, ...]) -> None:
        ctx.geometry = operands[2:]

    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        return (call(name, _kept(ctx), grad, None, *ctx.geometry),)

    _register_autograd(f"{name}_grad", setup_context, backward)


def _register_autograd(
    name: str, setup_operands: Callable[..., None], backward_operands: Callable[..., Any]
) -> None:
    """Register a gradient with the op in every form: ``backward_operands`` gives those of its first operands."""
    for form in _forms(name):
        op_name = f"{name}_{form}"

        # op_name as a default: a closure would see the loop's last form.
        def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor, op_name: str = op_name) -> None:
            operands, packed = split_arguments(op_name, inputs)
            setup_operands(ctx, operands)
            ctx.shape, ctx.bits, ctx.form = packed.shape, packed.bits, packed.form
            # The packed weight, not the decoded one: no dense copy is kept for the backward pass.
            ctx.save_for_backward(packed.codes, packed.table, packed.mask, packed.scales)

        def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
            gradients = backward_operands(ctx, grad)
            # Packed weights are constants.
            return *gradients, *[None] * (len(ctx.needs_input_grad) - len(gradients))

        OPS[op_name].register_autograd(backward, setup_context=setup_context)


def _kept(ctx: Any) -> PackedArgs:
    """Return the packed weight of an op whose gradient is asked for."""
    codes, table, mask, scales = ctx.saved_tensors
    return PackedArgs(codes, table, mask, ctx.shape, ctx.bits, scales, ctx.form)


for _name, _channel_dim in (("linear", -1), ("convolution", 1)):
    _register_gradient(_name, _channel_dim)
    _register_second_gradient(_name)
