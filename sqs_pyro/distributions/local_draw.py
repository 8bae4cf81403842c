"""A draw that knows its moments, so that what is linear in it is drawn output by output.

Local reparametrisation (Kingma, Salimans, Welling 2015, arXiv 1506.02557): an output ``y = Σ_i x_i θ_i`` of many
independent weights is close to normal, with ``E y = Σ x_i E θ_i`` and ``Var y = Σ x_i² Var θ_i``. Drawn from
that, every example and every place of an image has noise of its own, and gates, which as draws are zeros and ones,
act through moments that are smooth in them.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple, Self

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from sqs_pyro.distributions.sharded_tensor import ShardedTensor, made_again

_LEAST_VARIANCE = 1e-24


class LocalDraw(Tensor):
    """A draw θ of independent weights together with ``E θ`` and ``Var θ``.

    Linear maps with it for their weight or bias (``F.linear``, convolutions, products of matrices) draw their
    outputs from the normal distribution of the outputs' moments. Its other views and casts know their moments,
    too. Every other operation works with the draw itself.

    What is drawn so is exact, for the expectation of a sum over examples, where an output is normal (slabs without
    spikes) or where only its moments count (a Gaussian likelihood right after it). Else it is the central limit
    theorem's approximation, the better the more inputs an output has; outputs of one example are taken for
    independent, as are two uses of one weight.
    """

    _mean: Tensor
    _variance: Tensor

    @classmethod
    def of(cls, draw: Tensor, mean: Tensor, variance: Tensor) -> Self:
        """Return a draw that knows its moments.

        Args:
            draw: θ, ``[*shape]``, differentiable.
            mean: ``E θ``, ``[*shape]``.
            variance: ``Var θ``, ``[*shape]``, not negative.
        """
        new = draw.as_subclass(cls)
        new._mean, new._variance = mean, variance
        return new

    @property
    def moments(self) -> tuple[Tensor, Tensor]:
        """``E θ`` and ``Var θ``."""
        return self._mean, self._variance

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Answer linear maps by moments, views by views of all three, and anything else by the draw."""
        kwargs = kwargs or {}
        with torch._C.DisableTorchFunctionSubclass():  # what is called below sees plain tensors
            if func in _VIEWS and isinstance(args[0], LocalDraw):
                return _viewed(func, args[0], args[1:], kwargs)
            parts = _LINEAR_MAPS[func](*args, **kwargs) if func in _LINEAR_MAPS else None
            if parts is None:
                return func(*args, **kwargs)
        return _draw_outputs(parts)


class ShardedLocalDraw(ShardedTensor, LocalDraw):
    """A :class:`LocalDraw` of which each rank holds rows: linear maps gather the moments, others the draw."""

    _mean: ShardedTensor
    _variance: ShardedTensor

    @classmethod
    def of(cls, rows: Tensor, like: Any) -> Self:  # type: ignore[override]
        """Return the draw of which a rank holds rows.

        Args:
            rows: a :class:`LocalDraw`, this rank's.
            like: a ``DTensor`` that is sharded so, of the whole shape.
        """
        assert isinstance(rows, LocalDraw)
        with torch._C.DisableTorchFunctionSubclass():
            new = super().of(rows.as_subclass(Tensor), like)
        new._mean, new._variance = (ShardedTensor.of(moment, like) for moment in rows.moments)
        return new

    def whole_draw(self) -> LocalDraw:
        """Gather the draw and its moments; differentiable."""
        return LocalDraw.of(self.whole(), self._mean.whole(), self._variance.whole())

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Answer linear maps by moments, views by views of what is gathered, anything else by the whole draw."""
        kwargs = kwargs or {}
        if func in _LINEAR_MAPS:
            with torch._C.DisableTorchFunctionSubclass():
                parts = _LINEAR_MAPS[func](*args, **kwargs)
            if parts is not None:
                return _draw_outputs(parts)
        if func in _VIEWS and isinstance(args[0], ShardedLocalDraw):
            return func(args[0].whole_draw(), *args[1:], **kwargs)
        return super().__torch_function__(func, types, args, kwargs)


def when_used(rows: Tensor, like: Any) -> Tensor:
    """Return the draw, with its moments if it knows them, of which a rank holds rows: gathered when it is used.

    Args:
        rows: this rank's, of the first dimension.
        like: a ``DTensor`` that is sharded so, of the whole shape.
    """
    known = isinstance(rows, LocalDraw)
    draw: Any = (ShardedLocalDraw if known else ShardedTensor).of(rows, like)
    if draw.dim() > 1:
        return draw
    # A bias: as small as it is, it need not be gathered twice.
    return draw.whole_draw() if known else draw.whole()


class _Parts(NamedTuple):
    """A linear map ``apply(x, weight) + bias`` by its parts.

    Attributes:
        apply: linear in its second argument.
        x: data.
        weight: drawn or not.
        bias: likewise; in a shape that broadcasts to the outputs.
        coarse: whether variances may have eight bits: their errors, below 0.4 %, are those of a width.
    """

    apply: Callable[[Tensor, Tensor], Tensor]
    x: Tensor
    weight: Tensor
    bias: Tensor | None = None
    coarse: bool = False


def _draw_outputs(parts: _Parts) -> Tensor:
    """Draw the outputs of a linear map from their moments, which :func:`output_moments` finds again."""
    mean, variance = _moments_of_outputs(parts)
    if variance is None:
        return mean
    out = _NormalDraw.apply(mean, variance)
    out._drawn_from = parts, out._version  # not the moments: autograd keeps the parts anyway
    return out


def _moments_of_outputs(parts: _Parts) -> tuple[Tensor, Tensor | None]:
    """Return ``E y`` and, if anything is random, ``Var y``, given the data, which may be drawn themselves."""
    mean, variance = _moments(parts.weight)
    out = parts.apply(parts.x, mean)
    spread = None if variance is None else _of_squares(parts, variance)
    if parts.bias is not None:
        mean, variance = _moments(parts.bias)
        out = out + mean
        if variance is not None:
            spread = variance.expand_as(out) if spread is None else spread + variance.to(spread.dtype)
    return out, spread


def output_moments(output: Tensor) -> tuple[Tensor, Tensor] | None:
    """Return the mean and variance that a linear map's output was drawn from, as the output is shaped.

    Expectations over this last draw need no draw then. None says that the tensor is no such output, nor a view of
    one, or has been changed in place.
    """
    drawn = output if output._base is None else output._base
    parts, version = getattr(drawn, "_drawn_from", (None, 0))
    if parts is None or drawn._version != version or not drawn.is_contiguous():
        return None
    view = output.shape, output.stride(), output.storage_offset()
    mean, variance = _moments_of_outputs(parts)
    assert variance is not None  # or nothing would have been drawn
    return mean.contiguous().as_strided(*view), variance.to(mean.dtype).contiguous().as_strided(*view)


def _moments(value: Tensor) -> tuple[Tensor, Tensor | None]:
    return value.moments if isinstance(value, LocalDraw) else (value, None)


def _of_squares(parts: _Parts, variance: Tensor) -> Tensor:
    """Return ``apply(x², Var θ)``; the squares, as large as x, are made anew for the backward pass."""
    x = parts.x
    half = parts.coarse and x.dtype is torch.float32 and _multiplies_bfloat16(x.device.type)
    dtype = torch.bfloat16 if half else x.dtype
    squares = _Square.apply(x, dtype)

    variance = variance.to(dtype)
    made: list[tuple[Tensor, Callable[[], Tensor]]] = [(squares, lambda: _square(x.detach(), dtype))]
    if isinstance(variance, ShardedTensor):
        again = variance.again
        variance = variance.whole()
        made.append((variance, again))
    with made_again(*made):
        return parts.apply(squares, variance)


@functools.cache
def _multiplies_bfloat16(device: str) -> bool:
    """Return whether a device has instructions for products of bfloat16: elsewhere they would take longer."""
    if device == "cpu":
        known: dict[str, Any] = getattr(torch.cpu, "get_capabilities", dict)()  # older releases do not tell
        return bool(known.get("avx512_bf16") or known.get("amx_bf16") or known.get("amx_tile"))
    return device == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)


class _Square(torch.autograd.Function):
    """``x²`` in another type of numbers, in one pass over memory."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, dtype: torch.dtype) -> Tensor:
        """Args: x; type of the result."""
        ctx.save_for_backward(x)
        return _square(x, dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        """Return the gradient of x."""
        (grad,) = grads
        (x,) = ctx.saved_tensors
        return torch.mul(grad, x).mul_(2), None


def _square(x: Tensor, dtype: torch.dtype) -> Tensor:
    return torch.mul(x, x, out=torch.empty_like(x, dtype=dtype))


class _NormalDraw(torch.autograd.Function):
    """``m + √v ε`` with ``ε ~ N(0, 1)``; of m, v and ε only ``ε / (2 √v)`` is kept."""

    @staticmethod
    def forward(ctx: Any, mean: Tensor, variance: Tensor) -> Tensor:
        """Args: m, v of one shape, v perhaps of less precision. Returns a draw."""
        noise = torch.randn_like(mean)
        # Above 0, where √v has no slope; what made v 0 multiplies this one by 0. Rounding may leave less than 0.
        least = max(_LEAST_VARIANCE, torch.finfo(mean.dtype).tiny)  # float16 would take it for 0
        scale = torch.clamp_min(variance.to(mean.dtype), least).sqrt_()
        draw = torch.addcmul(mean, noise, scale)
        ctx.save_for_backward(noise.div_(scale.mul_(2)))
        ctx.dtype = variance.dtype
        return draw

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor]:
        """Return gradients of m and v."""
        (grad,) = grads
        (slope,) = ctx.saved_tensors
        return grad, torch.mul(grad, slope, out=torch.empty_like(grad, dtype=ctx.dtype))


def _linear(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> _Parts | None:
    return None if isinstance(input, LocalDraw) else _Parts(F.linear, input, weight, bias)


def _convolution(convolve: Any, channel: int) -> Callable[..., _Parts | None]:
    """Return the parts of a convolution; channels of its outputs are in dimension ``-channel``."""

    def parts(
        input: Tensor, weight: Tensor, bias: Tensor | None = None, *args: Any, **kwargs: Any
    ) -> _Parts | None:
        if isinstance(input, LocalDraw):
            return None
        # [C] -> [C, 1..]: beside the places of an output.
        aligned = None if bias is None else _viewed(Tensor.reshape, bias, (-1, *[1] * (channel - 1)), {})

        def apply(x: Tensor, w: Tensor) -> Tensor:
            return convolve(x, w, None, *args, **kwargs)

        return _Parts(apply, input, weight, aligned, coarse=True)

    return parts


def _product(first: Tensor, second: Tensor) -> _Parts | None:
    """Return the parts of a matrix product, of which one factor is a draw."""
    if isinstance(first, LocalDraw) and isinstance(second, LocalDraw):
        return None  # a product of two draws is not linear
    if isinstance(second, LocalDraw):
        return _Parts(torch.matmul, first, second)
    return _Parts(lambda x, w: torch.matmul(w, x), second, first)


def _turned_product(second: Tensor, first: Tensor) -> _Parts | None:
    return _product(first, second)


def _sum(first: Any, second: Any) -> _Parts | None:
    """Return the parts of a sum of outputs and a bias, which has fewer numbers than they."""
    out, bias = (first, second) if isinstance(second, LocalDraw) else (second, first)
    if not isinstance(out, Tensor) or isinstance(out, LocalDraw) or out.numel() <= bias.numel():
        return None
    return _Parts(lambda x, one: x, out, torch.ones(()), bias)


def _shifted_product(input: Tensor, mat1: Tensor, mat2: Tensor, *, beta: Any = 1, alpha: Any = 1) -> _Parts | None:
    """Return the parts of ``addmm``, unless it scales or has no random factor."""
    random = isinstance(mat1, LocalDraw) or isinstance(mat2, LocalDraw)
    parts = _product(mat1, mat2) if random and (beta, alpha) == (1, 1) else None
    return None if parts is None else parts._replace(bias=input)


_LINEAR_MAPS: dict[Any, Callable[..., _Parts | None]] = {
    F.linear: _linear,
    F.conv1d: _convolution(F.conv1d, 2),
    F.conv2d: _convolution(F.conv2d, 3),
    F.conv3d: _convolution(F.conv3d, 4),
    F.conv_transpose1d: _convolution(F.conv_transpose1d, 2),
    F.conv_transpose2d: _convolution(F.conv_transpose2d, 3),
    F.conv_transpose3d: _convolution(F.conv_transpose3d, 4),
    torch.matmul: _product,
    torch.mm: _product,
    Tensor.matmul: _product,
    Tensor.mm: _product,
    Tensor.__matmul__: _product,
    Tensor.__rmatmul__: _turned_product,
    torch.addmm: _shifted_product,
    Tensor.addmm: _shifted_product,
    torch.add: _sum,
    Tensor.add: _sum,
    Tensor.__add__: _sum,
    Tensor.__radd__: _sum,
}

#: What only moves or casts values: done to the draw and to its moments.
_VIEWS = frozenset(
    {
        Tensor.to, Tensor.float, Tensor.double, Tensor.half, Tensor.bfloat16, Tensor.type_as, Tensor.contiguous,
        Tensor.expand, Tensor.expand_as, Tensor.reshape, Tensor.view, Tensor.flatten, Tensor.unflatten,
        Tensor.squeeze, Tensor.unsqueeze, Tensor.t, Tensor.transpose, Tensor.permute, Tensor.movedim,
        Tensor.T.__get__, Tensor.mT.__get__,  # type: ignore[attr-defined]
        Tensor.__getitem__, Tensor.chunk, Tensor.split, Tensor.unbind,
        Tensor.narrow, Tensor.select, torch.transpose, torch.permute, torch.t, torch.squeeze, torch.unsqueeze,
        torch.reshape, torch.flatten, torch.chunk, torch.split, torch.unbind, torch.movedim,
    }
)  # fmt: skip


def _viewed(func: Any, value: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Return a view of a draw with the same views of its moments; of a plain tensor just the view."""
    found = func(value, *args, **kwargs)
    if not isinstance(value, LocalDraw):
        return found
    mean, variance = (func(moment, *args, **kwargs) for moment in value.moments)
    if isinstance(found, Tensor):
        return LocalDraw.of(found, mean, variance)
    return type(found)(LocalDraw.of(*parts) for parts in zip(found, mean, variance, strict=True))
