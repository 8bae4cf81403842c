"""Whether two networks give the same outputs on real inputs, and the first module in which they do not.

Both run in evaluation mode, from the same random state, without gradients; modes, buffers and random states are
afterwards as they were. Whole networks are compared first; only where they differ do they run again, module by
module.
"""

import math
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, fields, is_dataclass
from typing import Any

import torch
from torch import Tensor, nn

from sqs_pyro.errors import DataError, NetworkError, SQSError, first_line
from sqs_pyro.isolation import random_states_kept
from sqs_pyro.networks.calling import call_arguments, device_of, move_to, own_copy
from sqs_pyro.networks.modes import buffers_kept, evaluating

_EXACT = 2.0**-10  # of the largest output: sums of float32 in another order, through many layers
_COARSE = 2.0**-5  # the same for two-byte floats, and for GPUs, which multiply with fewer bits


#: What a forward raises that meets something it does not know.
_ERRORS = (RuntimeError, TypeError, ValueError, AttributeError, LookupError)


@dataclass(frozen=True)
class Difference:
    """Where two networks' outputs part.

    Attributes:
        module: name of the first module with other outputs; empty where only the network's own differ.
        relative: largest difference of the networks' outputs, in units of the largest of each tensor; infinite
            where forms differ or one is not finite.
        repeatable: whether the first network gives the same outputs twice; if not, nothing can be compared.
    """

    module: str
    relative: float
    repeatable: bool = True


def check_agreement(dense: nn.Module, packed: nn.Module, inputs: Any) -> Difference | None:
    """Check that a packed network computes what its dense twin does.

    Args:
        dense: the network with dense weights.
        packed: the same, packed.
        inputs: a minibatch's.

    Returns:
        None; or the difference, where the network's outputs change from call to call, so that nothing is said.

    Raises:
        NetworkError: it does not; the sentence names the module.
    """
    try:
        found = first_difference(dense, packed, inputs, tolerance(dense))
    except _CannotRun as error:
        raise NetworkError(
            f"Packed, the network cannot run where it can with dense weights ({error}): exclude the weights of "
            "the module that reads its weight in a way of its own."
        ) from error.__cause__
    if found is None or not found.repeatable:
        return found
    name = f"module '{found.module}'" if found.module else f"{type(dense).__name__} itself"
    raise NetworkError(
        f"Packed, {name} gives other outputs than with dense weights (the network's differ by "
        f"{found.relative:.2g} of the largest): its forward uses its weight in a way that packing does not know, "
        "so exclude it from compression."
    )


def tolerance(net: nn.Module) -> float:
    """Return the relative difference of outputs that rounding explains, in a network's dtype and on its device."""
    short = any(p.dtype in (torch.float16, torch.bfloat16) for p in (*net.parameters(), *net.buffers()))
    return _COARSE if short or device_of(net).type != "cpu" else _EXACT


def agree(first: nn.Module, second: nn.Module, inputs: Any, relative: float) -> bool:
    """Whether two networks run and give the same outputs; arguments as of :func:`first_difference`."""
    try:
        return _distance(outputs(first, inputs), outputs(second, inputs)) <= relative
    except _ERRORS:
        return False


def first_difference(first: nn.Module, second: nn.Module, inputs: Any, relative: float) -> Difference | None:
    """Compare two networks of the same modules' names.

    Args:
        first, second: networks; what the first one puts out is taken to be right.
        inputs: a minibatch's.
        relative: difference that is none, in units of the largest output of each tensor.

    Returns:
        None where they agree.

    Raises:
        DataError: the first one cannot run on these inputs.
    """
    try:
        # What the dense network raises is about the inputs; what only the packed one raises is about packing.
        expected = outputs(first, inputs)
    except SQSError:
        raise
    except _ERRORS as error:
        raise DataError(
            f"{type(first).__name__} cannot run on the inputs in evaluation mode ({first_line(error)}): give "
            "them as its forward takes them."
        ) from error
    try:
        found = outputs(second, inputs)
    except _ERRORS as error:
        raise _CannotRun(first_line(error)) from error
    distance = _distance(expected, found)
    # The usual case ends here: modules are watched only where whole networks differ.
    if distance <= relative:
        return None
    # The reference against itself: a network that differs from call to call convicts nobody.
    if _distance(expected, outputs(first, inputs)) > relative:
        return Difference("", distance, repeatable=False)
    return Difference(_first_module(first, second, inputs, relative), distance)


def outputs(net: nn.Module, inputs: Any) -> list[Tensor]:
    """Return every tensor that a network puts out in evaluation mode, in order."""
    # A copy: a forward may write to its inputs, and the second network must see the same ones.
    args, kwargs = call_arguments(own_copy(move_to(inputs, device_of(net))), net)
    # The same random numbers for both; statistics and caches that a forward writes are put back.
    with evaluating(net), buffers_kept(net), random_states_kept(seed=0), torch.no_grad(), _not_compiling(net):
        return list(_tensors(net(*args, **kwargs)))


class _CannotRun(Exception):
    """The second of two networks raises an error where the first does not."""


def _first_module(first: nn.Module, second: nn.Module, inputs: Any, relative: float) -> str:
    """Return the name of the first module, in the order in which they finish, whose outputs differ."""
    seen: dict[str, list[list[Tensor]]] = defaultdict(list)
    parted: list[str] = []
    calls: dict[str, int] = defaultdict(int)

    def note(name: str, output: Any) -> None:
        # Cloned: later modules may write into what earlier ones put out.
        seen[name].append([tensor.detach().clone() for tensor in _tensors(output)])

    def compare(name: str, output: Any) -> None:
        # A module may run several times, as one shared by layers does: calls are compared one by one.
        call, calls[name] = calls[name], calls[name] + 1
        if (
            not parted
            and call < len(seen[name])
            and _distance(seen[name][call], list(_tensors(output))) > relative
        ):
            parted.append(name)

    # One after the other: the second is compared with what was noted of the first.
    for net, tell in ((first, note), (second, compare)):
        with _watched(net, tell):
            outputs(net, inputs)
    return parted[0] if parted else ""


@contextmanager
def _watched(net: nn.Module, tell: Callable[[str, Any], None]) -> Iterator[None]:
    with ExitStack() as stack:
        for name, module in net.named_modules():
            hook = module.register_forward_hook(lambda _, __, output, name=name: tell(name, output))
            # Hooks go after an error as well: the networks are the caller's.
            stack.callback(hook.remove)
        yield


def _not_compiling(net: nn.Module) -> Any:
    """Return a context without the compiler: a few calls are not worth compiling for."""
    compiled = any(hasattr(m, "_orig_mod") or m._compiled_call_impl is not None for m in net.modules())
    return torch.compiler.set_stance("force_eager") if compiled else nullcontext()  # imports the compiler


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping):  # the outputs of transformers' networks as well
        for each in value.values():
            yield from _tensors(each)
    elif isinstance(value, (tuple, list)):
        for each in value:
            yield from _tensors(each)
    elif is_dataclass(value) and not isinstance(value, type):
        for field in fields(value):
            yield from _tensors(getattr(value, field.name))


def _distance(first: list[Tensor], second: list[Tensor]) -> float:
    """Return the largest relative difference of two outputs; integers, which may flip at ties, do not count."""
    # Another number or shape of outputs is no small difference.
    if [tensor.shape for tensor in first] != [tensor.shape for tensor in second]:
        return float("inf")
    pairs = zip(first, second, strict=True)
    return max((_relative(one, other) for one, other in pairs if one.is_floating_point()), default=0.0)


def _relative(one: Tensor, other: Tensor) -> float:
    # In float64: the difference of two nearly equal numbers has few digits left.
    one, other = one.detach().double().to_dense(), other.detach().double().to_dense()
    if not one.numel():
        return 0.0
    scale, difference = _largest(one), _largest(one - other)
    if not math.isfinite(scale) or not math.isfinite(difference):
        there = one.isfinite()  # masks of attention put out infinities, in the same places
        if not torch.equal(there, other.isfinite()):
            return float("inf")
        if not there.any():
            return 0.0
        scale, difference = _largest(one[there]), _largest((one - other)[there])
    return difference / scale if scale else (float("inf") if difference else 0.0)


def _largest(values: Tensor) -> float:
    """Return the largest size of numbers; no finite one if one of them is not."""
    return float(values.abs().max())
