"""A tensor of which each rank holds some rows: whole for an operation that needs it, and let go after it.

A network whose drawn weights are such tensors runs as it is. What an operation keeps of a whole weight for its
backward pass is not kept either: the rows are gathered again there.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, Self

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

#: What a tensor tells without its values.
_TOLD = frozenset(
    {
        Tensor.shape.__get__, Tensor.dtype.__get__, Tensor.device.__get__, Tensor.ndim.__get__,  # type: ignore[attr-defined]
        Tensor.layout.__get__, Tensor.requires_grad.__get__, Tensor.is_leaf.__get__,  # type: ignore[attr-defined]
        Tensor.is_cuda.__get__, Tensor.is_meta.__get__, Tensor.is_sparse.__get__,  # type: ignore[attr-defined]
        Tensor.size, Tensor.dim, Tensor.numel, Tensor.__len__, Tensor.is_floating_point, Tensor.is_complex,
        torch.is_floating_point, torch.is_complex, torch.numel,
    }
)  # fmt: skip


class ShardedTensor(Tensor):
    """A tensor whose rows, along its first dimension, ranks hold; operations gather it.

    Every rank must do the same operations in the same order. The gradient of the rows is the mean of the ranks'
    gradients: each has a minibatch of its own.
    """

    _rows: Tensor
    _like: Any

    @classmethod
    def of(cls, rows: Tensor, like: Any) -> Self:
        """Return the tensor of which a rank holds rows.

        Args:
            rows: this rank's, differentiable.
            like: a ``DTensor`` that is sharded so, of the whole shape.
        """
        # A shape without memory behind it: values are the rows' alone.
        new = rows.detach().new_empty(()).expand(like.shape).as_subclass(cls)
        new._rows, new._like = rows, like
        return new

    def whole(self) -> Tensor:
        """Gather the tensor; differentiable."""
        from torch.distributed.tensor import Partial  # heavy, and of no use to one rank

        mesh, parts = self._like.device_mesh, as_rows(self._rows.contiguous(), self._like)
        if parts.requires_grad:
            parts.register_hook(lambda grad: grad / mesh.size())  # of a sum over ranks
        return parts.full_tensor(grad_placements=[Partial()])

    @torch.no_grad()
    def again(self) -> Tensor:
        """Gather the tensor without a gradient: once more, for a backward pass."""
        return self.whole()

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Answer what is known without values, cast rows as rows, and give any other operation the whole."""
        kwargs = kwargs or {}
        with torch._C.DisableTorchFunctionSubclass():
            if func in _TOLD:
                return func(*args, **kwargs)
        if func is Tensor.to and isinstance(args[0], ShardedTensor):
            return ShardedTensor.of(args[0]._rows.to(*args[1:], **kwargs), args[0]._like)
        gathered: list[tuple[Tensor, Callable[[], Tensor]]] = []

        def whole(sharded: ShardedTensor) -> Tensor:
            gathered.append((sharded.whole(), sharded.again))
            return gathered[-1][0]

        args, kwargs = tree_map_only(ShardedTensor, whole, (args, kwargs))
        with made_again(*gathered):
            return func(*args, **kwargs)


def as_rows(rows: Tensor, like: Any) -> Any:
    """Return the ``DTensor`` that is divided as another one is, of which this rank has rows; differentiable."""
    from torch.distributed.tensor import DTensor

    return DTensor.from_local(
        rows, like.device_mesh, like.placements, run_check=False, shape=like.shape, stride=like.stride()
    )


def anywhere(found: Tensor) -> bool:
    """Return whether any is True, of all ranks' where they have rows of a ``DTensor``."""
    count: Any = found.sum()  # of which a DTensor's `bool` would be this rank's
    return bool(count.full_tensor() if hasattr(count, "full_tensor") else count)


@contextmanager
def made_again(*made: tuple[Tensor, Callable[[], Tensor]]) -> Iterator[None]:
    """Let what the body computes keep nothing of some tensors for its backward pass, which makes them anew.

    Args:
        *made: tensors, and how each is made.
    """
    # Addresses: torch keeps both functions as long as the graph, and with them what they know.
    places = [(tensor.untyped_storage().data_ptr(), make) for tensor, make in made]
    del made

    def pack(saved: Tensor) -> Tensor | Callable[[], Tensor]:
        for place, make in places:
            if saved.untyped_storage().data_ptr() == place:  # itself, or a view of it
                return partial(_viewed, make, saved.shape, saved.stride(), saved.storage_offset())
        return saved

    def unpack(packed: Tensor | Callable[[], Tensor]) -> Tensor:
        return packed if isinstance(packed, Tensor) else packed()

    with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
        yield


def _viewed(make: Callable[[], Tensor], *view: Any) -> Tensor:
    return make().as_strided(*view)
