"""Calls that leave the process as they found it and do not depend on how they found it.

Pyro's parameter store and handlers, random states and the default dtype belong to the process, so two calls at
once would see each other's. Calls therefore take turns, whichever threads they come from, and everything that
belongs to the process, the thread or the caller's networks is put back at the end, also after an error or Ctrl-C.

The caller's *own* code in another thread is not waited for: if it draws with ``torch.rand`` or trains with Pyro
while a call runs, both see one state. Processes do not share any of it.
"""

import copy
import functools
import inspect
import operator
import os
import random
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import ParamSpec, TypeVar

import numpy as np
import pyro
import torch
from pyro.poutine import runtime
from torch import nn

from sqs_pyro.errors import ArgumentError

Parameters = ParamSpec("Parameters")
Result = TypeVar("Result")

_turn = threading.RLock()  # re-entrant: public calls call each other
# Pyro's four switches of validation, which others turn off for speed: errors of users are found by it.
_VALIDATION = ("validate_distributions_pyro", "validate_distributions_torch", "validate_infer", "validate_poutine")


def _renew_turn() -> None:
    """A forked process has one thread, and none that would ever give the turn back."""
    global _turn
    _turn = threading.RLock()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_renew_turn)


@contextmanager
def isolated(
    *networks: nn.Module | None,
    seed: int | None = None,
    sees_parameters: bool = False,
    sees_autocast: bool = False,
    sees_dtype: bool = False,
) -> Iterator[None]:
    """Run a block that leaves everything outside as it was.

    Inside, gradients are on, inference mode is off, Pyro has no handlers, its validation is on, and its parameter
    store is empty. Default dtype and device are float32 and the CPU, unless those of the caller are a network's.
    Afterwards all of this, the random states of torch, NumPy and Python, and the networks' training flags are as
    before. A block in another thread waits until this one has ended; one inside this one does not.

    Args:
        networks: those of the caller that the block runs; None is left out.
        seed: of torch, NumPy and Python; without it they go on from where they are.
        sees_parameters: whether the store holds the caller's parameters at the beginning.
        sees_autocast: whether the caller's autocast stays on.
        sees_dtype: whether the caller's default dtype stays, whatever the networks.
    """
    given = [net for net in networks if net is not None]
    with _turn, ExitStack() as undo:  # undone in the opposite order, each also after an error in another
        undo.enter_context(modes_kept(*given))
        undo.enter_context(_pyro(sees_parameters))
        undo.enter_context(random_states_kept(seed))
        undo.enter_context(_defaults(given, sees_dtype))
        undo.enter_context(torch.inference_mode(False))  # tensors of that mode could not be trained later
        undo.enter_context(torch.enable_grad())
        if not sees_autocast:
            undo.enter_context(_no_autocast())
        yield


def isolating(
    *networks: str, sees_parameters: bool = False, sees_autocast: bool = False
) -> Callable[[Callable[Parameters, Result]], Callable[Parameters, Result]]:
    """Decorator: every call is :func:`isolated`.

    Args:
        networks: the arguments that are networks of the caller; anything else given for them is left alone. An
            argument ``seed`` is taken as such.
        sees_parameters, sees_autocast: see :func:`isolated`.
    """

    def decorate(function: Callable[Parameters, Result]) -> Callable[Parameters, Result]:
        signature = inspect.signature(function)

        @functools.wraps(function)
        def call(*args: Parameters.args, **kwargs: Parameters.kwargs) -> Result:
            bound = signature.bind(*args, **kwargs)
            bound.apply_defaults()  # a network or a seed that is left out counts as given
            given = [bound.arguments[name] for name in networks if isinstance(bound.arguments[name], nn.Module)]
            seed = bound.arguments.get("seed")
            with isolated(*given, seed=seed, sees_parameters=sees_parameters, sees_autocast=sees_autocast):
                return function(*args, **kwargs)

        return call

    return decorate


@contextmanager
def lasting_tensors() -> Iterator[None]:
    """Make tensors that outlive the caller's modes: none of inference mode, on the CPU if nothing else is said.

    For what neither draws nor uses Pyro, which need not wait for its turn; a decorator, too.
    """
    with torch.inference_mode(False), torch.device("cpu"):
        yield


@contextmanager
def _no_autocast() -> Iterator[None]:
    """Run a block as outside of every ``torch.autocast``.

    Autocast keeps the casts of weights until the outermost of its contexts ends. Within another one (of the
    caller's, or one that only switches it off) training would go on with the casts of the first step's weights.
    """
    devices = [device for device in ("cpu", "cuda") if torch.is_autocast_enabled(device)]
    depth = torch.autocast_increment_nesting() - 1  # there is no function that only tells it
    for _ in range(depth + 1):
        torch.autocast_decrement_nesting()
    torch.clear_autocast_cache()
    for device in devices:
        torch.set_autocast_enabled(device, False)
    try:
        yield
    finally:
        torch.clear_autocast_cache()
        for device in devices:
            torch.set_autocast_enabled(device, True)
        for _ in range(depth):
            torch.autocast_increment_nesting()


@contextmanager
def modes_kept(*networks: nn.Module) -> Iterator[None]:
    """Run a block after which every module of the networks is in the mode it was in."""
    # The flag itself, not `train()`, which a module may override with work that cannot be undone.
    flags = [(module, module.training) for net in networks for module in net.modules()]
    try:
        yield
    finally:
        for module, training in flags:
            module.training = training


@contextmanager
def _pyro(sees_parameters: bool) -> Iterator[None]:
    """Run a block with handlers, plate dimensions, settings and parameters of its own.

    (The store's own ``scope`` would take the attribute ``unconstrained`` off the caller's parameters.)
    """
    store = pyro.get_param_store()
    # The objects stay, for others hold them; what is in them is exchanged.
    inside = vars(copy.copy(store) if sees_parameters else type(store)())
    inside = {name: copy.copy(tables) for name, tables in inside.items()}
    own = [
        (vars(store), inside),
        (vars(runtime._DIM_ALLOCATOR), {"_stack": []}),
        (vars(runtime._ENUM_ALLOCATOR), {}),  # dimensions that enumeration of the caller's has taken
    ]
    before = [dict(outside) for outside, _ in own]
    handlers = list(runtime._PYRO_STACK)
    try:
        runtime._PYRO_STACK.clear()  # in place: Pyro's modules have imported this very list
        for outside, replaced in own:
            outside.clear()
            outside.update(replaced)
        with pyro.settings.context(**dict.fromkeys(_VALIDATION, True)):
            yield
    finally:
        runtime._PYRO_STACK[:] = handlers
        for (outside, _), saved in zip(own, before, strict=True):
            outside.clear()
            outside.update(saved)


@contextmanager
def random_states_kept(seed: int | None = None) -> Iterator[None]:
    """Run a block after which torch, NumPy and Python draw as if it had drawn nothing.

    Args:
        seed: of all of them in the block; without it they go on from where they are.
    """
    seed = None if seed is None else _checked(seed)
    # GPUs that are not in use yet have no state to keep; seeding them would be remembered until they are.
    before = pyro.util.get_rng_state()  # of torch on the CPU, NumPy and Python
    on_gpu = torch.cuda.is_initialized()  # asking for a state would initialise it
    gpus = torch.cuda.get_rng_state_all() if on_gpu else []
    try:
        if seed is not None:
            random.seed(seed)
            np.random.seed(seed % 2**32)  # noqa: NPY002  data of others may use it
            torch.default_generator.manual_seed(seed)
            if on_gpu:
                torch.cuda.manual_seed_all(seed)
        yield
    finally:
        pyro.util.set_rng_state(before)
        if on_gpu:
            torch.cuda.set_rng_state_all(gpus)


def _checked(seed: object) -> int:
    """Return a seed as all three random number generators take it."""
    try:
        number = None if isinstance(seed, bool) else operator.index(seed)  # type: ignore[arg-type]
    except TypeError:
        number = None
    if number is None or not -(2**63) <= number < 2**64:
        given = repr(seed) if isinstance(seed, int | float | str) else f"a {type(seed).__name__}"
        raise ArgumentError(
            f"The seed is {given:.40}, but must be a whole number from -2^63 to 2^64 - 1: give one, say 0."
        )
    return number


@contextmanager
def _defaults(networks: list[nn.Module], sees_dtype: bool) -> Iterator[None]:
    """Set default dtype and device: the caller's code may count on the caller's, ours may not."""
    dtype, device = torch.get_default_dtype(), torch.get_default_device()
    tensors = [tensor for net in networks for tensor in net.parameters() if not tensor.is_meta]
    # A forward may make tensors of the default dtype, and count on it where it is the network's own.
    if not sees_dtype and not any(tensor.dtype == dtype for tensor in tensors):
        torch.set_default_dtype(torch.float32)
    try:
        if device.type == "cpu" or any(tensor.device == device for tensor in tensors):
            yield
        else:
            with torch.device("cpu"):
                yield
    finally:
        torch.set_default_dtype(dtype)
