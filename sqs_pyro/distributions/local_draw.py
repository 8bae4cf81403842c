"""A draw that knows its moments, so that what is linear in it is drawn output by output.

Local reparametrisation (Kingma, Salimans, Welling 2015, arXiv 1506.02557): an output ``y = Σ_i x_i θ_i`` of many
independent weights is close to normal, with ``E y = Σ x_i E θ_i`` and ``Var y = Σ x_i² Var θ_i``. Drawn from
that, every example and every place of an image has noise of its own, and gates, which as draws are zeros and ones,
act through moments that are smooth in them.
"""

from collections.abc import Callable
from typing import Any, Self

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F


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
            arguments = _LINEAR_MAPS[func](*args, **kwargs) if func in _LINEAR_MAPS else None
            return func(*args, **kwargs) if arguments is None else _draw_outputs(*arguments)


#: A linear map of data and weights, its data, its weight, and a bias that is added to its outputs.
_Parts = tuple[Callable[[Tensor, Tensor], Tensor], Tensor, Tensor, Tensor | None]


def _draw_outputs(apply: Callable[[Tensor, Tensor], Tensor], x: Tensor, weight: Tensor, bias: Any) -> Tensor:
    """Draw the outputs of ``apply(x, weight) + bias`` from their moments."""
    mean, variance = _moments(weight)
    out = apply(x, mean)
    spread = None if variance is None else _of_squares(apply, x, variance)
    if bias is not None:
        mean, variance = _moments(bias)
        out = out + mean
        if variance is not None:
            spread = variance.expand_as(out) if spread is None else spread + variance
    return out if spread is None else _NormalDraw.apply(out, spread)


def _moments(value: Tensor) -> tuple[Tensor, Tensor | None]:
    return value.moments if isinstance(value, LocalDraw) else (value, None)


def _of_squares(apply: Callable[[Tensor, Tensor], Tensor], x: Tensor, variance: Tensor) -> Tensor:
    """Return ``apply(x², Var θ)``; the squares, as large as x, are made anew for the backward pass."""
    squares = x.square()

    def pack(saved: Tensor) -> Tensor | tuple[torch.Size, tuple[int, ...]]:
        same = saved.data_ptr() == squares.data_ptr() and saved.numel() == squares.numel()
        return (saved.shape, saved.stride()) if same else saved  # itself, or a view of it

    def unpack(packed: Tensor | tuple[torch.Size, tuple[int, ...]]) -> Tensor:
        return packed if isinstance(packed, Tensor) else x.square().as_strided(*packed)

    with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
        return apply(squares, variance)


class _NormalDraw(torch.autograd.Function):
    """``m + √v ε`` with ``ε ~ N(0, 1)``; of m, v and ε only ``ε / (2 √v)`` is kept, 0 where v is 0."""

    @staticmethod
    def forward(ctx: Any, mean: Tensor, variance: Tensor) -> Tensor:
        """Args: m, v of one shape. Returns a draw."""
        noise = torch.randn_like(mean)
        scale = variance.clamp_min(0).sqrt_()  # rounding of a convolution may leave a sum of squares below 0
        draw = torch.addcmul(mean, noise, scale)
        slope = noise.div_(scale.mul_(2)).masked_fill_(scale == 0, 0.0)  # no noise, no slope: √v has none at 0
        ctx.save_for_backward(slope)
        return draw

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor]:
        """Return gradients of m and v."""
        (grad,) = grads
        (slope,) = ctx.saved_tensors
        return grad, grad * slope


def _linear(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> _Parts | None:
    return None if isinstance(input, LocalDraw) else (F.linear, input, weight, bias)


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

        return apply, input, weight, aligned

    return parts


def _product(first: Tensor, second: Tensor) -> _Parts | None:
    """Return the parts of a matrix product, of which one factor is a draw."""
    if isinstance(first, LocalDraw) and isinstance(second, LocalDraw):
        return None  # a product of two draws is not linear
    if isinstance(second, LocalDraw):
        return torch.matmul, first, second, None
    return (lambda x, w: torch.matmul(w, x)), second, first, None


def _turned_product(second: Tensor, first: Tensor) -> _Parts | None:
    return _product(first, second)


def _sum(first: Any, second: Any) -> _Parts | None:
    """Return the parts of a sum of outputs and a bias, which has fewer numbers than they."""
    out, bias = (first, second) if isinstance(second, LocalDraw) else (second, first)
    if not isinstance(out, Tensor) or isinstance(out, LocalDraw) or out.numel() <= bias.numel():
        return None
    return (lambda x, one: x), out, torch.ones(()), bias


def _shifted_product(input: Tensor, mat1: Tensor, mat2: Tensor, *, beta: Any = 1, alpha: Any = 1) -> _Parts | None:
    """Return the parts of ``addmm``, unless it scales or has no random factor."""
    random = isinstance(mat1, LocalDraw) or isinstance(mat2, LocalDraw)
    parts = _product(mat1, mat2) if random and (beta, alpha) == (1, 1) else None
    return None if parts is None else (*parts[:3], input)


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
