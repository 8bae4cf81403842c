"""What a call may not change: the caller's networks, and what belongs to process or thread."""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pyro
import torch
from pyro.poutine import runtime
from torch import nn

_HOOKS = tuple(name for name in vars(nn.Module()) if name.endswith("_hooks"))


@contextmanager
def untouched(*networks: nn.Module) -> Iterator[None]:
    """Assert that networks and surroundings are as before at the end of a block, also of one that raises.

    Of a network: every parameter and buffer is the same object with the same bits, gradient, ``requires_grad``,
    version; every module has the same training flag, attributes and hooks. Of the surroundings: random states,
    default dtype and device, grad and inference mode, autocast, determinism, threads, Pyro's store, handlers and
    settings, filters of warnings.
    """
    networks_before, surroundings = [_network(net) for net in networks], _surroundings()
    try:
        yield
    finally:
        for net, before in zip(networks, networks_before, strict=True):
            _assert_same(before, _network(net), type(net).__name__)
        _assert_same(surroundings, _surroundings(), "surroundings")


def _network(net: nn.Module) -> dict[str, Any]:
    state: dict[str, Any] = {}
    for name, module in net.named_modules(remove_duplicate=False):
        state[f"module {name}"] = _Same(module)
        state[f"{name}.training"] = module.training
        state[f"{name}.attributes"] = sorted(vars(module))
        state[f"{name}.hooks"] = [list(getattr(module, hooks)) for hooks in _HOOKS]
        tensors = {**module._parameters, **module._buffers}
        for own, tensor in tensors.items():
            state[f"{name}.{own}"] = None if tensor is None else _tensor(tensor)
    return state


def _tensor(tensor: torch.Tensor) -> tuple[Any, ...]:
    # Counts writes in place: a value that was changed and put back is still told. Inference tensors have none.
    version = None if tensor.is_inference() else tensor._version
    grad = None if not tensor.is_leaf or tensor.grad is None else _tensor(tensor.grad)
    values = None if tensor.is_meta else _Bits(tensor)
    return _Same(tensor), tensor.requires_grad, version, values, grad


def _surroundings() -> dict[str, Any]:
    store = pyro.get_param_store()
    random_states = pyro.util.get_rng_state()
    state = {
        "Python's random state": random_states["random"],
        "NumPy's random state": [np.asarray(part).tobytes() for part in random_states["numpy"]],
        "torch's random state": random_states["torch"].numpy().tobytes(),
        "default dtype": torch.get_default_dtype(),
        "default device": str(torch.get_default_device()),
        "grad mode": torch.is_grad_enabled(),
        "inference mode": torch.is_inference_mode_enabled(),
        "autocast": (torch.is_autocast_enabled("cpu"), torch.get_autocast_dtype("cpu")),
        "determinism": (
            torch.are_deterministic_algorithms_enabled(),
            torch.is_deterministic_algorithms_warn_only_enabled(),
        ),
        "anomaly mode": torch.is_anomaly_enabled(),
        "threads": torch.get_num_threads(),
        "Pyro's handlers": list(map(id, runtime._PYRO_STACK)),
        "Pyro's plates": list(runtime._DIM_ALLOCATOR._stack),
        "Pyro's settings": pyro.settings.get(),
        "Pyro's store": {
            name: (_tensor(value), sorted(vars(value)), store._constraints[name])
            for name, value in store._params.items()
        },
        "filters of warnings": list(warnings.filters),
    }
    if torch.cuda.is_initialized():  # asking for a state would initialise it
        state["random states of GPUs"] = [gpu.numpy().tobytes() for gpu in torch.cuda.get_rng_state_all()]
    return state


class _Same:
    """Equal to nothing but the same object, which stays alive so that its id is not given away."""

    def __init__(self, value: Any) -> None:
        self.value = value

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Same) and other.value is self.value

    def __hash__(self) -> int:
        return id(self.value)

    def __repr__(self) -> str:
        return f"object {id(self.value)}"


class _Bits:
    """A tensor's bytes, so that NaN is equal to itself and -0.0 is not 0.0."""

    def __init__(self, tensor: torch.Tensor) -> None:
        # Looking must not depend on, or change, the modes that are looked at.
        with torch.inference_mode(False), torch.no_grad(), torch.device("cpu"):
            flat = tensor.detach().cpu().contiguous().flatten()
            self.bits = flat.view(torch.uint8).numpy().tobytes() if flat.numel() else b""
        self.said = str(tuple(tensor.shape))

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Bits) and (self.said, self.bits) == (other.said, other.bits)

    __hash__ = None  # type: ignore[assignment]

    def __repr__(self) -> str:
        return f"tensor {self.said}"


def _assert_same(before: dict[str, Any], after: dict[str, Any], of: str) -> None:
    changed = [name for name in {**before, **after} if before.get(name, _MISSING) != after.get(name, _MISSING)]
    assert not changed, f"{of}: {changed} changed: " + "; ".join(
        f"{name}: {before.get(name, 'nothing')!r} -> {after.get(name, 'nothing')!r}"[:300] for name in changed[:3]
    )


_MISSING = object()
