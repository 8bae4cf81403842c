"""What tells the inputs of two calls apart: networks, data and settings, as plain text that is cheap to compare.

State that is kept to go on from carries the fingerprint of the call that made it. Another call takes it only if
its own is equal, and names the first thing that differs if it is not.
"""

import contextlib
import functools
import hashlib
import re
from collections.abc import Iterator, Mapping, Sequence
from types import CellType, CodeType, FunctionType
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from sqs_pyro.isolation import random_states_kept

#: Of each part (``recipe``, ``network``, ``data``, ``setting``...) what is known of it, by key.
Fingerprint = dict[str, dict[str, Any]]

LAYOUT = 4  # of kept state; another one is of another version of this library
_EXAMPLES = 256  # of a data set that makes its examples
_DIGEST = " digest "
_ADDRESS = re.compile(r" at 0x[0-9a-f]+")  # in a `repr`: another one in every process
# Of one call, or of where a network was found; the rest of a module's attributes may enter its forward.
_NOT_OF_MODULE = {"training", "name_or_path"}
_LIBRARIES = ("torch.", "sqs_pyro.")  # whose functions are known by name, from release to release
_NUMBERS = (bool, int, float, str)
_NOT_OF_CONFIG = {"transformers_version", "dtype", "torch_dtype"}  # of the file, not of the network


def fingerprint(
    recipe: Mapping[str, Any],
    network: Mapping[str, Any],
    data: Mapping[str, Any],
    setting: Mapping[str, Any] | None = None,
) -> Fingerprint:
    """Return the fingerprint of a call.

    Args:
        recipe: plain data, nested or not.
        network: of :func:`network_fingerprint`.
        data: of :func:`loader_fingerprint`, or digests by name.
        setting: everything else that decides what comes out: seed, likelihood.

    Returns:
        Its parts in the order in which they are compared.
    """
    return {
        "version of sqs-pyro's kept state": {"layout": LAYOUT},
        "recipe": _flat(recipe),
        "network": dict(network),
        "data": dict(data),
        "setting": _flat(setting or {}),
    }


def first_difference(saved: Mapping[str, Any], now: Fingerprint) -> tuple[str, str] | None:
    """Return the first part in which two fingerprints differ, and what differs in it; None if they are equal."""
    for part, values in now.items():
        before = saved.get(part, {})
        keys = list(dict.fromkeys([*values, *before]))
        changed = [key for key in keys if before.get(key, _ABSENT) != values.get(key, _ABSENT)]
        if changed:
            said = [_change(key, before.get(key, _ABSENT), values.get(key, _ABSENT)) for key in changed]
            # Of a network the first: all layers behind it usually differ, too.
            return part, said[0] if part == "network" else ", ".join(said[:5])
    return None


_ABSENT = "absent"


def _change(key: str, before: Any, now: Any) -> str:
    if isinstance(before, str) and isinstance(now, str):
        (old, old_digest, _), (new, new_digest, _) = before.partition(_DIGEST), now.partition(_DIGEST)
        if old_digest and new_digest and old == new:
            return f"'{key}' has other values"
        if old_digest or new_digest:
            return f"'{key}' is {old} there and {new} here"
    return f"{key}: {before!r} -> {now!r}"


def _flat(values: Mapping[str, Any], before: str = "") -> dict[str, Any]:
    """Bring nested mappings into one, with dots in its keys."""
    found: dict[str, Any] = {}
    for key, value in values.items():
        name = f"{before}{key}"
        found |= _flat(value, f"{name}.") if isinstance(value, Mapping) and value else {name: value}
    return found


# ---- networks ----


def network_fingerprint(net: nn.Module) -> dict[str, str]:
    """Return modules with their options, configuration, parameters and buffers of a network, by name.

    Tensors on the meta device are left out: :func:`tensors_fingerprint` of a part tells them when they are there.
    """
    modules: dict[str, str] = {}
    for path, module in net.named_modules():
        name = f"module {path or 'of all'}"
        modules[name] = _module(module)
        modules |= {f"{name}, {key}": described(value) for key, value in _attributes(module)}
    config: Any = getattr(net, "config", None)
    options = config.to_dict() if hasattr(config, "to_dict") else {}
    said = {f"config.{key}": described(value) for key, value in options.items() if _of_network(key)}
    return modules | said | tensors_fingerprint(net)


def _of_network(key: str) -> bool:
    return not key.startswith("_") and key not in _NOT_OF_CONFIG


def _module(module: nn.Module) -> str:
    return f"{type(module).__qualname__}({_ADDRESS.sub('', module.extra_repr())})"


def tensors_fingerprint(net: nn.Module, prefix: str = "") -> dict[str, str]:
    """Return dtype, shape and digest of each parameter and buffer in memory, by name behind ``prefix``."""
    named = [*net.named_parameters(), *net.named_buffers()]
    return {f"{prefix}{name}": described(value.detach()) for name, value in named if not value.is_meta}


def _attributes(module: nn.Module) -> Iterator[tuple[str, Any]]:
    """Yield numbers and texts that somebody's own module may compute with; tensors may be what it computed."""
    if not type(module).__module__.startswith("torch."):  # of those `extra_repr` says it
        for key, value in vars(module).items():
            parts = value if isinstance(value, tuple) else (value,)
            if key[0] != "_" and key not in _NOT_OF_MODULE and all(isinstance(p, _NUMBERS) for p in parts):
                yield key, value


# ---- data ----


def loader_fingerprint(loader: Any) -> dict[str, Any]:
    """Return how many minibatches and examples of which content a loader has, and in which order it gives them.

    Tensors in memory are read as a whole. Of a data set that makes its examples, up to 256 are asked for, evenly
    spread; of a loader without one, the first minibatch. Random numbers, and an attribute ``epoch``, are
    afterwards as before.
    """
    dataset: Any = getattr(loader, "dataset", None)
    inner = getattr(loader, "loader", loader)  # what the user gave, under our own that adds a teacher's opinion
    found: dict[str, Any] = {"minibatches": len(loader)}
    if hasattr(dataset, "__len__"):
        found["examples"] = len(dataset)
    for name in ("batch_size", "shuffle", "seed", "drop_last"):
        value = getattr(inner, name, None)
        if value is None or isinstance(value, bool | int):
            found[name] = value
    found["order"] = _order(inner)
    if getattr(inner, "collate_fn", None) is not None:
        found["collate_fn"] = described(inner.collate_fn)
    with random_states_kept(seed=0):  # a data set may augment
        found["content"] = described(_content(inner, dataset))
    return found


def _order(loader: Any) -> str:
    sampler = getattr(loader, "sampler", None)
    # Seeds as they were given: a generator's state moves on with every epoch.
    generators = [getattr(owner, "generator", None) for owner in (loader, sampler)]
    seeds = [each.initial_seed() for each in generators if isinstance(each, torch.Generator)]
    kept = {"itself": sampler} if isinstance(sampler, Sequence) else getattr(sampler, "__dict__", {})
    settings = {key: kept[key] for key in kept if key[0] != "_" and key != "epoch" and _is_plain(kept[key])}
    said = "of its own" if sampler is None else type(sampler).__name__
    has_any = any(value is not False for value in settings.values())  # indices, weights, rank
    chosen = f" of {_digest(settings)}" if has_any else ""
    return f"{said}{chosen}{f', seed {seeds[0]}' if seeds else ''}"


def _content(loader: Any, dataset: Any) -> Any:
    """Return something that differs between data sets, cheaply."""
    if type(dataset) is TensorDataset:  # a class of somebody's own may do something to them
        return dataset.tensors
    if hasattr(dataset, "inputs") and hasattr(dataset, "targets"):
        return [dataset.inputs, dataset.targets]
    if hasattr(dataset, "__getitem__") and hasattr(dataset, "__len__"):
        with contextlib.suppress(Exception):  # training meets the same error, and has a sentence for it
            size = len(dataset)
            some = [dataset[i] for i in sorted({i * (size - 1) // (_EXAMPLES - 1) for i in range(_EXAMPLES)})]
            return [some, getattr(dataset, "tensors", None)]
    return _first_minibatch(loader)


def _first_minibatch(loader: Any) -> Any:
    epoch = getattr(loader, "epoch", None)
    try:
        minibatches = iter(loader)
        return None if minibatches is loader else next(minibatches)  # of an iterator there is no way back
    except Exception:  # training meets the same error, and has a sentence for it
        return None
    finally:
        if epoch is not None:
            loader.epoch = epoch


# ---- anything ----


def described(value: Any) -> str:
    """Return a short text that differs between values: numbers as they are, tensors and long ones by a digest."""
    if isinstance(value, Tensor):
        return f"{str(value.dtype).removeprefix('torch.')} {list(value.shape)}{_DIGEST}{_digest(value)}"
    if value is None or isinstance(value, bool | int | float | str):
        return repr(value) if len(repr(value)) <= 80 else f"a {type(value).__name__}{_DIGEST}{_digest(value)}"
    if isinstance(value, FunctionType) and not value.__module__.startswith(_LIBRARIES):
        return f"{value.__module__}.{value.__qualname__}{_DIGEST}{_digest(value)}"
    if isinstance(value, functools.partial) or not callable(value) or not hasattr(value, "__qualname__"):
        return f"{type(value).__qualname__}{_DIGEST}{_digest(value)}"
    return f"{value.__module__}.{value.__qualname__}"


def _is_plain(value: Any) -> bool:
    """Return whether a value is numbers, texts or tensors, whose digest is the same in every process."""
    if isinstance(value, Mapping):
        return all(_is_plain(each) for each in value.values())
    if isinstance(value, list | tuple | range):
        return isinstance(value, range) or all(_is_plain(each) for each in value)
    return value is None or isinstance(value, bool | int | float | str | Tensor | np.ndarray)


def _digest(value: Any) -> str:
    digest = hashlib.sha256()
    _update(digest, value, set())
    return digest.hexdigest()[:16]  # 64 bits: against mistakes, not against forgers


def _update(digest: Any, value: Any, seen: set[int]) -> None:
    """Add a value, whatever it is made of; an object is its class and its attributes."""
    digest.update(f"<{type(value).__qualname__}>".encode())
    if isinstance(value, Tensor):
        digest.update(f"{value.dtype} {list(value.shape)}".encode())
        if not value.is_meta:
            digest.update(_bytes(value))
    elif isinstance(value, np.ndarray) and value.dtype != object:
        digest.update(f"{value.dtype} {value.shape}".encode())
        digest.update(np.ascontiguousarray(value).view(np.uint8).reshape(-1))
    elif isinstance(value, bytes | bytearray | memoryview):
        digest.update(value)
    elif id(value) in seen:
        digest.update(b"again")  # an object that holds itself
    elif isinstance(value, Mapping):
        for key in value:
            _update(digest, key, seen | {id(value)})
            _update(digest, value[key], seen | {id(value)})
    elif isinstance(value, Sequence) and not isinstance(value, str):
        for each in value:
            _update(digest, each, seen | {id(value)})
    elif isinstance(value, functools.partial):
        _update(digest, [described(value.func), value.args, value.keywords], seen | {id(value)})
    elif isinstance(value, FunctionType):
        # What it closes over, if it is plain: a network or a loader is compared by itself.
        held = [cell.cell_contents for cell in value.__closure__ or () if cell != CellType()]
        plain = [each for each in held if _is_plain(each) or isinstance(each, FunctionType)]
        _update(digest, [value.__code__, value.__defaults__, value.__kwdefaults__, plain], seen | {id(value)})
    elif isinstance(value, CodeType):  # what it does, not where it stands
        _update(digest, [value.co_code, value.co_names, value.co_consts], seen | {id(value)})
    elif isinstance(value, frozenset | set):
        # Sets of texts are in another order in every process.
        _update(digest, sorted(map(repr, value)), seen | {id(value)})
    elif isinstance(value, nn.Module):
        _update(digest, network_fingerprint(value), seen | {id(value)})
    elif hasattr(value, "tobytes"):  # an image
        digest.update(value.tobytes())
    elif getattr(value, "__dict__", None) and not hasattr(value, "__qualname__"):
        _update(digest, vars(value), seen | {id(value)})
    else:
        digest.update(_ADDRESS.sub("", repr(value)).encode())


def _bytes(value: Tensor) -> Any:
    dense = value.detach().resolve_conj().resolve_neg()  # both are flags, not values, until resolved
    if dense.layout != torch.strided:
        dense = dense.to_dense()
    return dense.cpu().contiguous().flatten().view(torch.uint8).numpy()
