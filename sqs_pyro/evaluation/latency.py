"""How long a call of a packed network takes beside the same network dense: calls in turn, in one process."""

import contextlib
import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from sqs_pyro.networks.calling import call_arguments, device_of, move_to, split_examples, tensors_in
from sqs_pyro.networks.modes import evaluating

Call = Callable[[], Any]

_ROUNDS, _FEWEST = 20, 3
_LAYERS = 3  # that lose most are named
_SECONDS = 1.0  # for the rounds of a batch, in which slow networks get fewer


def interleaved(
    calls: Mapping[str, Call],
    rounds: int,
    before: Callable[[Call], Any] = lambda call: call(),
    seconds: float = float("inf"),
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, list[float]]:
    """Return the seconds that calls take, one after another in turn, so that what disturbs one disturbs all.

    Args:
        calls: by name.
        rounds: of all; one more before them is not counted.
        before: done before each call and not counted; by default the call itself, whose caches are then warm.
        seconds: after which no further round begins, once there are three.
        clock: what times a call; ``time.process_time`` where other processes would be in its way.
    """
    taken: dict[str, list[float]] = {name: [] for name in calls}
    began = time.perf_counter()
    for turn in range(-1, rounds):  # one to warm up
        if turn >= _FEWEST and time.perf_counter() - began > seconds:
            break
        for name, call in calls.items():
            before(call)
            start = clock()
            call()
            if turn >= 0:
                taken[name].append(clock() - start)
    return taken


@torch.no_grad()
def latency(
    dense: nn.Module, packed: nn.Module, inputs: Any, batches: tuple[int, ...] = (1, 32)
) -> dict[str, Any]:
    """Return medians in milliseconds of a dense and a packed network, by batch, and how they were measured.

    On a CPU, of each batch also the layers that lose most time packed, if any do.

    Args:
        dense, packed: networks on one device.
        inputs: examples; batches that are larger than their number are measured with all of them.
        batches: examples of a call.
    """
    device = device_of(packed)
    inputs = move_to(inputs, device)
    most = len(tensors_in(inputs)[0])
    found: dict[str, dict[str, Any]] = {}
    rounds = _ROUNDS
    with evaluating(dense), evaluating(packed):
        for batch in sorted({min(batch, most) for batch in batches}):
            given = next(split_examples(inputs, batch))
            calls = {"dense": _call(dense, given, device), "packed": _call(packed, given, device)}
            taken = interleaved(calls, _ROUNDS, seconds=_SECONDS)
            found[str(batch)] = {f"{name}_ms": 1e3 * statistics.median(own) for name, own in taken.items()}
            if device.type == "cpu":
                found[str(batch)]["layers"] = _losing_layers(dense, packed, calls)
            rounds = min(rounds, len(taken["dense"]))
    threads = f", {torch.get_num_threads()} threads" if device.type == "cpu" else ""
    how = f"float32, eager, caches warm, medians of {rounds} to {_ROUNDS} calls in turn on {device.type}{threads}"
    return {"batch": found, "how": how}


def _losing_layers(dense: nn.Module, packed: nn.Module, calls: Mapping[str, Call]) -> dict[str, float]:
    """Return by how many milliseconds a call the layers are slower that lose most, by the names of modules."""
    taken: dict[str, dict[str, float]] = {"dense": {}, "packed": {}}
    known = {name for name, _ in dense.named_modules()}
    layers = [name for name, module in packed.named_modules() if name in known and not any(module.children())]
    with contextlib.ExitStack() as hooks:
        for kind, net in (("dense", dense), ("packed", packed)):
            for name in layers:
                for hook in _stopwatch(net.get_submodule(name), taken[kind], name):
                    hooks.callback(hook.remove)
        interleaved(calls, _FEWEST)
    turns = 2 * (_FEWEST + 1)  # a warm one before each
    lost = {
        name: 1e3 * (taken["packed"][name] - taken["dense"].get(name, 0.0)) / turns for name in taken["packed"]
    }
    most = sorted(lost, key=lambda name: -lost[name])[:_LAYERS]
    return {name: lost[name] for name in most if lost[name] > 0}


def _stopwatch(module: nn.Module, taken: dict[str, float], name: str) -> list[RemovableHandle]:
    """Add what each call of a module takes to its seconds."""
    start = 0.0

    def begin(*_: Any) -> None:
        nonlocal start
        start = time.perf_counter()

    def end(*_: Any) -> None:
        taken[name] = taken.get(name, 0.0) + time.perf_counter() - start

    return [module.register_forward_pre_hook(begin), module.register_forward_hook(end)]


def _call(net: nn.Module, inputs: Any, device: torch.device) -> Call:
    args, kwargs = call_arguments(inputs)
    return finished(lambda: net(*args, **kwargs), device)


def finished(call: Call, device: torch.device) -> Call:
    """Return a call that returns when its device is done."""
    wait = getattr(getattr(torch, device.type, None), "synchronize", None)
    if wait is None:
        return call

    def waiting() -> Any:
        found = call()
        wait()
        return found

    return waiting
