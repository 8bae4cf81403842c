"""Modules with a packed weight: drop-in replacements of torch's linear, convolution and embedding modules."""

import copy
import itertools
from collections.abc import Collection
from typing import Any, ClassVar

import torch
import torch.fx
import torch.nn.functional as F
from torch import Tensor, nn

from sqs_pyro.kernels.decode import PackedArgs
from sqs_pyro.kernels.ops import call
from sqs_pyro.kernels.weight import PackedWeight, refuse_dense_weights
from sqs_pyro.packing.stored import StoredWeight

# torch.fx.symbolic_trace records the products as they are.
torch.fx.wrap("call")
torch.fx.wrap("_convolution")


class PackedModule(nn.Module):
    """Base: holds its weight in ``packed_weight`` and everything else as the module that it replaces.

    ``weight`` gives the decoded weight to code that reads it, such as ``nn.MultiheadAttention``.
    """

    packed_weight: PackedWeight

    def __init__(self, replaced: nn.Module, weight: StoredWeight) -> None:
        super().__init__()
        # Kept for `plain`: everything that the packed module does not know of it comes back with it.
        self._replaced = (replaced,)  # in a tuple: no child, so that it is in no state dict and is never moved
        # Before the weight becomes a child: it may rewrite its codes once, for all that use it.
        weight.used_for(self.product(replaced))
        self.add_module("packed_weight", weight)

    @classmethod
    def product(cls, replaced: Any) -> str:
        """Say what a packed module does with its weight: see :meth:`StoredWeight.used_for`."""
        raise NotImplementedError

    def plain(self, weight: nn.Parameter) -> nn.Module:
        """Return a module of the kind that this one replaces, with ``weight`` and everything else as here."""
        # Shallow, and other parameters: the replaced module itself belongs to the caller's network.
        module = copy.copy(self._replaced[0])
        module._parameters = {"weight": weight, **self._parameters}
        return module.train(self.training)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        refuse_dense_weights(["weight"], state_dict, prefix)
        super()._load_from_state_dict(state_dict, prefix, *args)

    @property
    def weight(self) -> Tensor:
        """The decoded weight in the network's dtype: one shared copy, not to be written to."""
        return self.packed_weight.dense()


class PackedLinear(PackedModule):
    """``x @ W.T + bias`` for x ``[..., in_features]`` with a packed W ``[out_features, in_features]``.

    Attributes:
        int8_block: so many inputs in a row are rounded to 8 bits together before they are multiplied; 0: none are.
            See :func:`~sqs_pyro.kernels.int8.round_inputs`.
    """

    def __init__(self, linear: nn.Linear, weight: StoredWeight) -> None:
        super().__init__(linear, weight)
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.int8_block = 0
        self.register_parameter("bias", linear.bias)

    @classmethod
    def product(cls, replaced: nn.Linear) -> str:
        """Return ``"linear"``, but in attention ``"decoded"``: its C++ code reads the weight of ``out_proj``."""
        return "decoded" if isinstance(replaced, nn.modules.linear.NonDynamicallyQuantizableLinear) else "linear"

    def forward(self, x: Tensor) -> Tensor:
        """Return ``[..., out_features]`` in the dtype of x."""
        weight: Any = self._modules["packed_weight"]  # faster than as attributes
        if self.int8_block and weight.args.form == "tiled":  # elsewhere there is no kernel for it
            return call("linear_int8", weight.args, x, self._parameters["bias"], self.int8_block)
        return call("linear", weight.args, x, self._parameters["bias"])

    def extra_repr(self) -> str:
        """Say what the replaced module would."""
        rounded = f", int8_block={self.int8_block}" if self.int8_block else ""
        said = f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}"
        return said + rounded


class PackedEmbedding(PackedModule):
    """Rows of a packed table ``[num_embeddings, embedding_dim]``, in the network's dtype."""

    def __init__(self, embedding: nn.Embedding, weight: StoredWeight) -> None:
        super().__init__(embedding, weight)
        self.num_embeddings, self.embedding_dim = embedding.num_embeddings, embedding.embedding_dim
        self.padding_idx = embedding.padding_idx

    @classmethod
    def product(cls, replaced: nn.Embedding) -> str:
        """Return ``"embedding"``, a look-up of rows."""
        return "embedding"

    def forward(self, indices: Tensor) -> Tensor:
        """Return ``[*indices.shape, embedding_dim]``."""
        return call("embedding", self.packed_weight.args, indices, self.packed_weight.like.dtype)

    def extra_repr(self) -> str:
        """Say what the replaced module would."""
        return f"{self.num_embeddings}, {self.embedding_dim}"


class _PackedConv(PackedModule):
    """Convolution over ``num_dims`` spatial dimensions: x ``[batch, channels, *space]`` or without batch."""

    num_dims: ClassVar[int]

    bias: nn.Parameter | None

    def __init__(self, conv: nn.modules.conv._ConvNd, weight: StoredWeight) -> None:
        super().__init__(conv, weight)
        self.in_channels, self.out_channels = conv.in_channels, conv.out_channels
        self.kernel_size, self.stride, self.dilation = conv.kernel_size, conv.stride, conv.dilation
        self.groups, self.transposed, self.output_padding = conv.groups, conv.transposed, conv.output_padding
        self.padding_mode = conv.padding_mode
        self.padding, self.pad_first = _paddings(conv)
        self.register_parameter("bias", conv._parameters["bias"])

    @classmethod
    def product(cls, replaced: nn.modules.conv._ConvNd) -> str:
        """Return ``"convolution"`` where there is a kernel for it, else ``"decoded"``."""
        return "convolution" if cls.num_dims < 3 else "decoded"  # what convolution.h multiplies with

    def forward(self, x: Tensor) -> Tensor:
        """Return ``[batch, out_channels, *space]``, without batch if x had none, in the dtype of x."""
        return self._convolve(x, self.output_padding)

    def _convolve(self, x: Tensor, output_padding: tuple[int, ...]) -> Tensor:
        geometry = (self.stride, self.padding, self.dilation, self.transposed, output_padding, self.groups)
        mode = "constant" if self.padding_mode == "zeros" else self.padding_mode  # names of F.pad
        return _convolution(x, self.packed_weight.args, self.bias, self.num_dims, self.pad_first, mode, geometry)

    def extra_repr(self) -> str:
        """Say what the replaced module would."""
        return (
            f"{self.in_channels}, {self.out_channels}, kernel_size={self.kernel_size}, stride={self.stride}, "
            f"padding={self.padding}, groups={self.groups}, bias={self.bias is not None}"
        )


def _convolution(
    x: Tensor,
    packed: PackedArgs,
    bias: Tensor | None,
    num_dims: int,
    pad_first: tuple[int, ...],
    padding_mode: str,
    geometry: tuple[Any, ...],
) -> Tensor:
    batched = x.dim() == num_dims + 2  # [channels, *space] else
    x = x if batched else x.unsqueeze(0)
    if any(pad_first):
        x = F.pad(x, pad_first, mode=padding_mode)
    if torch.compiler.is_compiling() and packed.form == "tiled" and num_dims == 2:
        # The kernel is fastest with channels last. A compiler makes the change of order, there and back, a part of
        # what comes before and behind. Said by `movedim`, as vmap knows no memory format; of one channel there is
        # nothing to change.
        x = x.movedim(1, -1).contiguous().movedim(-1, 1) if x.shape[1] != 1 else x
        y = call("convolution", packed, x, bias, *geometry).contiguous()
    else:
        y = call("convolution", packed, x, bias, *geometry)
        # Of one channel x is in both orders, and the kernel takes that which suits a compiler.
        y = y.contiguous() if num_dims == 2 and x.shape[1] == 1 else y
    return y if batched else y.squeeze(0)


class PackedConv1d(_PackedConv):
    """``nn.Conv1d`` with a packed weight."""

    num_dims = 1


class PackedConv2d(_PackedConv):
    """``nn.Conv2d`` with a packed weight."""

    num_dims = 2


class PackedConv3d(_PackedConv):
    """``nn.Conv3d`` with a packed weight."""

    num_dims = 3


class _PackedConvTranspose(_PackedConv):
    """Transposed convolution; ``output_size`` works as in torch."""

    def forward(self, x: Tensor, output_size: list[int] | None = None) -> Tensor:
        """Return ``[batch, out_channels, *space]``, without batch if x had none, in the dtype of x."""
        if output_size is None:
            return self._convolve(x, self.output_padding)
        # torch's own arithmetic and errors; of `self` it reads nothing that we lack.
        padding = nn.modules.conv._ConvTransposeNd._output_padding(
            self,  # type: ignore[arg-type]
            x,
            output_size,
            list(self.stride),
            list(self.padding),
            list(self.kernel_size),
            self.num_dims,
            list(self.dilation),
        )
        return self._convolve(x, tuple(padding))


class PackedConvTranspose1d(_PackedConvTranspose):
    """``nn.ConvTranspose1d`` with a packed weight."""

    num_dims = 1


class PackedConvTranspose2d(_PackedConvTranspose):
    """``nn.ConvTranspose2d`` with a packed weight."""

    num_dims = 2


class PackedConvTranspose3d(_PackedConvTranspose):
    """``nn.ConvTranspose3d`` with a packed weight."""

    num_dims = 3


def _paddings(conv: nn.modules.conv._ConvNd) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Return the convolution's own padding and what is padded before it, in the order of ``F.pad``."""
    dims = len(conv.kernel_size)
    none, nothing = (0,) * dims, (0,) * (2 * dims)
    if conv.padding == "valid":
        return none, nothing
    if conv.padding_mode != "zeros":
        return none, tuple(conv._reversed_padding_repeated_twice)
    if conv.padding != "same":
        return tuple(int(p) for p in conv.padding), nothing
    # "same": d (k - 1) zeros in all; where that is odd, one side gets one more, which a convolution cannot say.
    totals = [d * (k - 1) for d, k in zip(conv.dilation, conv.kernel_size, strict=True)]
    if not any(total % 2 for total in totals):
        return tuple(total // 2 for total in totals), nothing
    # F.pad begins with the last dimension.
    return none, tuple(itertools.chain(*((t // 2, t - t // 2) for t in reversed(totals))))


_PACKED: dict[type[nn.Module], type[PackedModule]] = {
    nn.Linear: PackedLinear,
    nn.Embedding: PackedEmbedding,
    nn.Conv1d: PackedConv1d,
    nn.Conv2d: PackedConv2d,
    nn.Conv3d: PackedConv3d,
    nn.ConvTranspose1d: PackedConvTranspose1d,
    nn.ConvTranspose2d: PackedConvTranspose2d,
    nn.ConvTranspose3d: PackedConvTranspose3d,
}


# Subclasses with a forward of their own that computes what torch's does; by name, as none of their libraries is
# imported for it.
_AS_TORCH = frozenset({"transformers.models.falcon.modeling_falcon.FalconLinear"})
# What decides what a module computes; ``get_extra_state``: what it stores beside its weights.
_FORWARD = ("forward", "__call__", "_conv_forward", "_output_padding", "get_extra_state")


def packed_type(module: nn.Module) -> type[PackedModule] | None:
    """Return the packed module that can replace ``module``; None where it computes or holds more than torch's."""
    for plain, packed in _PACKED.items():
        # A subclass that changes neither forward nor state is as good as torch's own.
        if isinstance(module, plain) and (_computes_as(type(module), plain) or _path_of(module) in _AS_TORCH):
            renormalises = isinstance(module, nn.Embedding) and module.max_norm is not None
            return None if renormalises or _has_extras(module) else packed
    return None


def product_of(module: nn.Module, names: Collection[str]) -> str:
    """Return what ``module``, or what replaces it, does with those of its parameters that are packed."""
    replacement = packed_type(module)
    return replacement.product(module) if replacement is not None and list(names) == ["weight"] else "decoded"


def _path_of(module: nn.Module) -> str:
    return f"{type(module).__module__}.{type(module).__qualname__}"


def _computes_as(kind: type[nn.Module], plain: type[nn.Module]) -> bool:
    """Return whether a subclass overrides nothing that its forward runs through."""
    return all(getattr(kind, name, None) is getattr(plain, name, None) for name in _FORWARD)


def _has_extras(module: nn.Module) -> bool:
    """Return whether it has hooks, a parametrisation, tensors or modules of its own: it then stays, decoded."""
    # A packed module would lose them.
    if not module._parameters.keys() <= {"weight", "bias"} or module._buffers or module._modules:
        return True
    hooks = (module._forward_hooks, module._forward_pre_hooks, module._backward_hooks)
    return any(hooks) or torch.nn.utils.parametrize.is_parametrized(module)
