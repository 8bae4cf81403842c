"""A second device in a build that has none: its tensors say that they are elsewhere, and refuse to mix.

Arithmetic is the CPU's, on a tensor inside each of them. What a GPU would refuse is refused in torch's words: an
operation with tensors of both devices (but numbers without dimensions, and indices), and random numbers from the
other device's generator.
"""

from contextlib import contextmanager
from functools import cache

import torch
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.backend_registration import _DummyBackendModule, _setup_privateuseone_for_python_backend

aten = torch.ops.aten
NAME = "other"
# As on a GPU: copies go from device to device, indices may stay on the CPU.
_ACROSS = {aten.copy_.default, aten._to_copy.default, aten._copy_from.default}
_INDEXED = {aten.index.Tensor, aten.index_put.default, aten.index_put_.default, aten._unsafe_index.Tensor}


class _Module(_DummyBackendModule):
    """What torch asks of a device's module."""

    def get_amp_supported_dtype(self):
        return [torch.bfloat16, torch.float16]

    def is_autocast_enabled(self):
        return False


@cache
def register():
    """Make the device known, once a process; returns what has to live as long as it does."""
    _setup_privateuseone_for_python_backend(NAME, backend_module=_Module())
    library = torch.library.Library("aten", "IMPL")
    # torch.tensor and torch.as_tensor make and fill their tensors below every mode.
    library.impl(
        "empty.memory_format", lambda size, **how: OtherTensor(torch.empty(size, **_here(how))), "PrivateUse1"
    )
    library.impl(
        "empty_strided",
        lambda size, stride, **how: OtherTensor(torch.empty_strided(size, stride, **_here(how))),
        "PrivateUse1",
    )
    library.impl("_copy_from", _copied_from, "PrivateUse1")
    return library


def _here(how):
    return {**how, "device": "cpu"}


def _copied_from(source, target, non_blocking=False):
    source, target = (each.inside if isinstance(each, OtherTensor) else each for each in (source, target))
    target.copy_(source)
    return target


class OtherTensor(torch.Tensor):
    """A tensor of the other device."""

    @staticmethod
    def __new__(cls, inside):
        made = torch.Tensor._make_wrapper_subclass(
            cls,
            inside.size(),
            strides=inside.stride(),
            storage_offset=inside.storage_offset(),
            dtype=inside.dtype,
            layout=inside.layout,
            device=f"{NAME}:0",
        )
        made.inside = inside
        return made

    def __repr__(self):
        return f"OtherTensor({self.inside!r})"

    def __reduce_ex__(self, protocol):
        """Be saved as a tensor, not as this class."""
        return self.inside.__reduce_ex__(protocol)

    def tolist(self):
        """Return numbers, as tensors of any device do; torch refuses it to subclasses."""
        return self.inside.tolist()

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        return _run(function, args, kwargs or {})


class _Redirected(TorchDispatchMode):
    """What makes tensors of the other device out of nothing, or of the CPU's."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        return _run(function, args, kwargs or {})


@contextmanager
def other_device():
    """Let the device be there; yields its ``torch.device``."""
    register()
    with _Redirected():
        yield torch.device(NAME, 0)


def _run(function, args, kwargs):
    tensors = [leaf for leaf in pytree.tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
    ours = [tensor for tensor in tensors if isinstance(tensor, OtherTensor)]
    asked = kwargs.get("device")
    asked = None if asked is None else torch.device(asked).type
    if ours and function not in _ACROSS:
        _check_same_device(function, tensors)
    made_here = asked == NAME or (bool(ours) and asked is None)
    if made_here and isinstance(kwargs.get("generator"), torch.Generator):
        raise RuntimeError(f"Expected a '{NAME}' device type for generator but found 'cpu'")
    if asked == NAME:
        kwargs = {**kwargs, "device": torch.device("cpu")}
    wrappers = {id(tensor.inside): tensor for tensor in ours}

    def unwrapped(leaf):
        return leaf.inside if isinstance(leaf, OtherTensor) else leaf

    args, kwargs = pytree.tree_map(unwrapped, (args, kwargs))
    if function is aten.is_pinned.default:
        return False
    found = function(*args, **kwargs)
    if function is aten.copy_.default:  # to where the first one is
        made_here = bool(ours) and id(args[0]) in wrappers
        return wrappers[id(args[0])] if made_here else found

    def wrapped(leaf):
        if not isinstance(leaf, torch.Tensor) or not made_here:
            return leaf
        return wrappers.get(id(leaf)) if id(leaf) in wrappers else OtherTensor(leaf)

    return pytree.tree_map(wrapped, found)


def _check_same_device(function, tensors):
    for tensor in tensors[:1] if function in _INDEXED else tensors:
        if not isinstance(tensor, OtherTensor) and tensor.dim() > 0:
            raise RuntimeError(
                f"Expected all tensors to be on the same device, but found at least two devices, {NAME}:0 and "
                f"cpu! ({function})"
            )
