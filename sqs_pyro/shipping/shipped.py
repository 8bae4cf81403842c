"""What ships: the hard network with what is not compressed folded and rounded, as the file will hold it.

The one way from weights to what is judged and written: validation in training, ``CompressionResult.hard`` and the
packed file all pass through :func:`shipped_network`.
"""

import copy
from collections.abc import Callable, Collection, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

from sqs_pyro.errors import NetworkError, first_line
from sqs_pyro.networks.calling import tensors_in
from sqs_pyro.packing.leftovers import check_leftover_dtype, round_leftovers
from sqs_pyro.shipping.agreement import agree, first_difference, outputs, tolerance
from sqs_pyro.shipping.batch_norm import fold_batch_norm

# Relative difference of outputs that rounding to float16 explains; beyond it something else than digits is lost.
_ROUNDING = 2.0**-5


def shipped_network(
    hard: nn.Module,
    coded: Collection[str],
    leftover_dtype: str,
    inputs: Any | None = None,
    kept: Collection[str] = (),
) -> nn.Module:
    """Return a copy of a hard network as it ships, in evaluation mode: norms folded, other parameters rounded.

    Both are done where they keep the network's function by construction (see
    :func:`~sqs_pyro.shipping.batch_norm.fold_batch_norm` and
    :func:`~sqs_pyro.packing.leftovers.round_leftovers`) and, where inputs are given, where outputs stay what they
    were: a module that they change stays as it is. (A forward may read a norm's statistics by itself; a bias may
    be the offset that its inputs are measured from.)

    Args:
        hard: the network with dense weights; it stays as it is.
        coded: names of the compressed parameters, which the copy shares.
        leftover_dtype: of what is not compressed.
        inputs: a minibatch's, or None.
        kept: names of modules whose norms are not folded whatever the inputs say.

    Raises:
        NetworkError: an unknown dtype, or a network that cannot be copied.
    """
    shipped = folded_and_rounded(hard, coded, leftover_dtype, kept)
    # Nearly always both keep outputs, which two forwards tell; only else is it asked which of them does not.
    if inputs is None or keeps_outputs(hard, shipped, inputs):
        return shipped

    def fold(net: nn.Module, changed_by_it: Collection[str]) -> None:
        fold_batch_norm(net, coded, {*kept, *changed_by_it})

    def round_others(net: nn.Module, changed_by_it: Collection[str]) -> None:
        round_leftovers(net, coded, leftover_dtype, changed_by_it)

    # Folding first: rounding is then of the numbers that the file has. Folding changes last digits only, hence the
    # narrower tolerance.
    folded = _where_it_keeps_outputs(hard, coded, fold, inputs, 4 * tolerance(hard))
    return _where_it_keeps_outputs(folded, coded, round_others, inputs, _ROUNDING).eval()


def folded_and_rounded(
    hard: nn.Module, coded: Collection[str], leftover_dtype: str, kept: Collection[str] = ()
) -> nn.Module:
    """A copy of a hard network with its batch norms folded and other parameters rounded; arguments as above."""
    check_leftover_dtype(leftover_dtype)
    shipped = copied(hard, _parameters(hard, coded))
    fold_batch_norm(shipped, coded, kept)
    round_leftovers(shipped, coded, leftover_dtype)
    return shipped.eval()


def keeps_outputs(hard: nn.Module, shipped: nn.Module, inputs: Any) -> bool:
    """Whether what :func:`folded_and_rounded` made of a network computes the same, but for rounding."""
    return agree(hard, shipped, inputs, min(4 * tolerance(hard), _ROUNDING))


def copied(net: nn.Module, memo: dict[int, Any] | None = None) -> nn.Module:
    """Return a deep copy; results that a forward has left in attributes are copied without their graph.

    Raises:
        NetworkError: the network holds what cannot be copied.
    """
    # Torch refuses to copy what has a graph
    results = {id(tensor): tensor.detach().clone() for _, tensor in _results(net)}
    try:
        return copy.deepcopy(net, {**(memo or {}), **results})
    except (RuntimeError, TypeError, AttributeError) as error:
        reason = first_line(error)
        raise NetworkError(
            f"{type(net).__name__} cannot be copied ({reason}): make its tensors parameters or buffers of their "
            "own (torch.nn.utils.remove_weight_norm, torch.nn.utils.prune.remove), and hold no files or locks."
        ) from error


def check_stands_alone(copy_of_it: nn.Module, net: nn.Module, inputs: Any | None) -> None:
    """Check that a copy of a network computes with its own tensors, and not with those that it was copied from.

    Functions are not copied: a lambda or a closure that has the network in it goes on to call the original, whose
    weights are never trained, pruned or packed.

    Args:
        copy_of_it: the copy.
        net: what it was copied from.
        inputs: of a minibatch, on which the copy runs; None leaves the check out.

    Raises:
        NetworkError: it reads a tensor of the original.
    """
    if inputs is None:
        return
    _check_results(copy_of_it, net, inputs)
    # Tensors that may be shared
    held = {id(tensor) for tensor in (*copy_of_it.parameters(), *copy_of_it.buffers())}
    named = (*net.named_parameters(), *net.named_buffers())  # read by the copy: a leak
    reads = _Reads({id(tensor): name for name, tensor in named if id(tensor) not in held})
    with reads:
        outputs(copy_of_it, inputs)
    if reads.found is not None:
        raise NetworkError(
            f"A copy of {type(net).__name__} still computes with '{reads.found}' of the original, because its "
            "forward calls a function that has the network in it (a lambda, a closure, a patched forward), and "
            "functions are not copied: make it a method that calls modules through `self`."
        )


def _check_results(copy_of_it: nn.Module, net: nn.Module, inputs: Any) -> None:
    """Raise if a forward needs what was computed from parameters before it, which training cannot follow."""
    copies = dict(copy_of_it.named_modules())
    owners = {name: name.rpartition(".") for name, _ in _results(net)}
    # In the copy: that is the network that runs.
    there = {name: vars(copies[owner])[attribute] for name, (owner, _, attribute) in owners.items()}
    reads = _Reads({id(tensor): name for name, held in there.items() for tensor in tensors_in(held)})
    if there:
        with reads:
            outputs(copy_of_it, inputs)
    if reads.found is not None:
        raise NetworkError(
            f"The forward of {type(net).__name__} reads '{reads.found}', a tensor that was computed from others "
            "before the call, so that no training reaches it: make it a parameter, or compute it within `forward`."
        )


def _results(net: nn.Module) -> list[tuple[str, Tensor]]:
    """Return tensors with a graph in attributes of a network's modules, by name."""
    return [
        (f"{path}.{name}".removeprefix("."), value)
        for path, module in net.named_modules()
        for name, held in vars(module).items()
        for value in (tensors_in(held) if isinstance(held, (Tensor, list, tuple, dict)) else ())
        if value.grad_fn is not None
    ]


class _Reads(TorchFunctionMode):
    """Notes which of some tensors anything is computed from.

    Attributes:
        found: name of the first; None as long as there is none.
    """

    def __init__(self, names: Mapping[int, str]) -> None:
        super().__init__()
        self.names = names
        self.found: str | None = None

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        # Every torch function that the forward calls passes here, with the tensors that it is given.
        result = func(*args, **(kwargs or {}))
        if self.found is None and any(isinstance(leaf, Tensor) for leaf in tree_leaves(result)):  # no mere shape
            given = (self.names.get(id(leaf)) for leaf in tree_leaves((args, kwargs)))
            self.found = next((name for name in given if name is not None), None)
        return result


def _parameters(net: nn.Module, names: Collection[str]) -> dict[int, Any]:
    """Parameters by ``id``: a copy with this memo shares them."""
    found = net.named_parameters(remove_duplicate=False)
    return {id(value): value for name, value in found if name in names}


def _where_it_keeps_outputs(
    net: nn.Module,
    coded: Collection[str],
    change: Callable[[nn.Module, Collection[str]], None],
    inputs: Any,
    relative: float,
) -> nn.Module:
    """A changed copy of a network; modules whose outputs would change are left out, one after the other."""
    everything = {name for name, _ in net.named_modules(remove_duplicate=False)}
    kept: set[str] = set()
    while True:
        changed = copied(net, _parameters(net, coded))
        with torch.no_grad():
            change(changed, kept)
        if kept == everything:
            return changed
        found = first_difference(net, changed, inputs, relative)
        if found is None or not found.repeatable:
            return changed
        # One module at a time; where leaving it out does not help, or it has nothing of its own, all are left.
        kept = everything if found.module in kept or not _has_own(net, found.module) else {*kept, found.module}


def _has_own(net: nn.Module, name: str) -> bool:
    module = net.get_submodule(name)
    return any(True for _ in module.parameters(recurse=False)) or any(True for _ in module.buffers(recurse=False))
