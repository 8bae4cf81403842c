"""Packed weights in the places of parameters: put there in a network's modules, and taken out again."""

import copy
import functools
from collections.abc import Collection, Iterable, Mapping
from typing import Any

import torch
from torch import nn

from sqs_pyro.errors import NetworkError, PackedFileError
from sqs_pyro.kernels.decode import decode
from sqs_pyro.kernels.heap import Heap
from sqs_pyro.kernels.modules import PackedModule, packed_type, product_of
from sqs_pyro.kernels.weight import PackedWeight, refuse_dense_weights
from sqs_pyro.packing.contents import parameters_to_pack
from sqs_pyro.packing.layouts import PackedTensor
from sqs_pyro.packing.stored import WEIGHT_PREFIX, StoredWeight

#: Attributes of a module in which torch keeps its own; all others may hold modules a second time.
_OF_TORCH = frozenset(vars(nn.Module()))

#: Weights by ``id`` of the module they belong to, and name of the parameter; one may stand in several modules.
Placed = dict[int, dict[str, StoredWeight]]


def copy_with_weights(
    net: nn.Module, tensors: Mapping[str, PackedTensor], draws: tuple[int, ...] = ()
) -> tuple[nn.Module, Placed]:
    """Return a deep copy of ``net`` without the named parameters, and the packed weights to put in their places.

    Modules that shared a parameter go on to share it. The compressed parameters are never copied.

    Args:
        net: the network.
        tensors: by parameter name.
        draws: ``(S,)``, where each tensor holds S draws, which are read decoded.

    Raises:
        NetworkError: see :func:`~sqs_pyro.packing.contents.parameters_to_pack`.
        PackedFileError: if the bytes of a tensor do not decode to what it says it is.
    """
    parameters = parameters_to_pack(net, tensors, draws)
    # What stands in for a parameter leads from the copy to the weight, in however many modules it is.
    stand_ins = {id(p): nn.Parameter(torch.empty(0), requires_grad=False) for p in parameters.values()}
    result = copy.deepcopy(net, dict(stand_ins))  # the memo says: these are copied already
    # The form depends on all uses of a weight, so they are known before it is written: tied modules share it.
    waiting = {id(stand_in) for stand_in in stand_ins.values()}
    found = {
        id(module): {name: p for name, p in module._parameters.items() if id(p) in waiting}
        for module in result.modules()
    }
    uses: dict[int, set[str]] = {key: set() for key in waiting}
    for module in result.modules():
        for parameter in found[id(module)].values():
            # Of all modules before any weight is made: its form has to suit every one that shares it.
            uses[id(parameter)].add("decoded" if draws else product_of(module, found[id(module)]))
    weights: dict[int, StoredWeight] = {}
    heap = Heap()
    # The largest first: what its bytes take beside its codes is not on top of all others.
    for name, parameter in sorted(parameters.items(), key=lambda item: -item[1].numel()):
        key = id(stand_ins[id(parameter)])
        weight = packed_weight(name, tensors[name].in_memory(), parameter.dtype, uses[key])
        # Where the parameter was, as everything else of the network is; but a file's values are never given up.
        weights[key] = weight if parameter.is_meta else weight.to(parameter.device)
        heap.freed(tensors[name].num_bytes)  # read, decoded and dropped
    placed = {module: {name: weights[id(p)] for name, p in own.items()} for module, own in found.items() if own}
    return result, placed


def put_weights(net: nn.Module, weights: Mapping[int, Mapping[str, StoredWeight]]) -> nn.Module:
    """Put weights in place of parameters, in place; returns ``net``, or what replaces it if it is one layer.

    Args:
        net: the network. Linear, convolution and embedding modules are replaced by packed ones. A parameter of any
            other module (say ``in_proj_weight`` of an attention) becomes a read-only attribute that gives its
            decoded value.
        weights: by ``id`` of the module and name of its parameter; a weight may stand in several modules.

    Raises:
        NetworkError: a module uses its parameter in a way that packing would break.
    """
    modules = [module for module in net.modules() if weights.get(id(module))]
    # First all replacements, then all swaps: a module may stand in several places, and in lists beside.
    return swap_modules(net, {id(module): _packed_module(module, weights[id(module)]) for module in modules})


def unpack_weights(
    net: nn.Module, dtype: torch.dtype | None = None, only: Collection[nn.Module] | None = None
) -> nn.Module:
    """Make a packed network a plain, trainable one, in place: the inverse of :func:`put_weights`.

    Modules that shared a weight share a parameter. Returns ``net``, or what replaces it if it is one layer.

    Args:
        net: a packed network.
        dtype: of the decoded parameters; None: the network's own.
        only: the packed weights to decode, all or none of a module; None: every one.
    """
    parameters: dict[int, nn.Parameter] = {}
    plain: dict[int, nn.Module] = {}
    for module in list(net.modules()):
        held = {
            name: child
            for name, child in module._modules.items()
            if isinstance(child, PackedWeight) and (only is None or child in only)
        }
        for weight in held.values():
            # Once: modules that shared the packed weight share the parameter.
            if id(weight) not in parameters:
                value = decode(weight.args).to(dtype or weight.like.dtype)
                parameters[id(weight)] = nn.Parameter(value)
        if held:
            found = {name.removeprefix(WEIGHT_PREFIX): parameters[id(weight)] for name, weight in held.items()}
            plain[id(module)] = _plain_module(module, found)
    return swap_modules(net, plain)


def swap_modules(net: nn.Module, replaced: Mapping[int, nn.Module]) -> nn.Module:
    """Put other modules in place of those with the given ``id``, in plain lists that modules keep of them, too.

    Returns ``net``, or what replaces it.
    """
    # A list: the children are exchanged while we walk.
    for module in list(net.modules()):
        for name, child in module._modules.items():
            if id(child) in replaced:
                module._modules[name] = replaced[id(child)]
        for name, value in vars(module).items():
            # Networks keep lists of their layers beside the registry, and call those: the old ones would go on to
            # be used.
            if isinstance(value, (list, tuple, dict)) and name not in _OF_TORCH:
                vars(module)[name] = _with_others(value, replaced)
    return replaced.get(id(net), net)


def _with_others(value: Any, replaced: Mapping[int, nn.Module]) -> Any:
    """Return a list, tuple or dictionary with other modules in it; the same one where nothing is replaced."""
    if isinstance(value, nn.Module):
        return replaced.get(id(value), value)
    # Exactly these types: how to rebuild a subclass, nobody knows.
    if type(value) is dict:
        found: Any = {key: _with_others(item, replaced) for key, item in value.items()}
        return found if any(found[key] is not value[key] for key in value) else value
    if type(value) not in (list, tuple):
        return value
    found = [_with_others(item, replaced) for item in value]
    return type(value)(found) if any(new is not old for new, old in zip(found, value, strict=True)) else value


def packed_weight(name: str, packed: PackedTensor, dtype: torch.dtype, uses: Collection[str] = ()) -> PackedWeight:
    """Return the run-time form of a tensor; what is wrong with it is told with its name."""
    try:
        return PackedWeight(packed, dtype, uses)
    except PackedFileError as error:
        raise PackedFileError(f"Tensor {name!r} cannot be unpacked: {error}.") from None


def _packed_module(module: nn.Module, weights: Mapping[str, StoredWeight]) -> nn.Module:
    replacement = packed_type(module)
    if replacement is not None and list(weights) == ["weight"]:
        packed = replacement(module, weights["weight"])
        if hasattr(module, "network_spec"):
            # A network that is one layer is replaced itself, and with it what says how to build it.
            packed.network_spec = module.network_spec
        return packed.train(module.training)
    # No packed module computes what this one does: it stays what it is, and reads properties instead of
    # parameters.
    check_reads_weights(module, weights)
    for name, weight in weights.items():
        if WEIGHT_PREFIX + name in module._modules:
            raise NetworkError(
                f"{type(module).__name__} has a child {WEIGHT_PREFIX + name!r} of its own, where the packed "
                f"{name!r} would be: rename the child, or exclude the parameter."
            )
        del module._parameters[name]  # else it would be found before the property
        module.add_module(WEIGHT_PREFIX + name, weight)
        weight.used_for("decoded")
    # Properties belong to classes, so that the instance gets a subclass that has them.
    plain: Any = type(module)
    # A property must be the class's: the instance gets a class of its own, under the same name.
    module.__class__ = _decoding_class(plain, tuple(weights))
    return module


def _plain_module(module: nn.Module, parameters: Mapping[str, nn.Parameter]) -> nn.Module:
    if isinstance(module, PackedModule):
        return module.plain(parameters["weight"])
    module.__class__ = type(module).__base__  # type: ignore[assignment]  # that of before _decoding_class
    for name, parameter in parameters.items():
        del module._modules[WEIGHT_PREFIX + name]
        module.register_parameter(name, parameter)
    return module


def check_reads_weights(module: nn.Module, names: Iterable[str]) -> None:
    """Check that a module reads its weights at each call.

    Raises:
        NetworkError: it keeps or rewrites them.
    """
    # Recurrent layers hand flattened weights to cuDNN; an embedding with max_norm writes to its rows.
    if isinstance(module, nn.RNNBase) or getattr(module, "max_norm", None) is not None:
        raise NetworkError(
            f"{type(module).__name__} keeps or rewrites its weights by itself, so {sorted(names)} cannot be "
            "packed: exclude them from compression."
        )


@functools.cache
def _decoding_class(plain: Any, names: tuple[str, ...]) -> type[nn.Module]:
    """Return a subclass whose attributes ``names`` decode the packed weights that hold them; one for each pair.

    It is found under no name of a module, so its instances are pickled as what it is made of.
    """

    def decoded(name: str) -> property:
        return property(lambda module: module._modules[WEIGHT_PREFIX + name].dense())

    def reduce(module: nn.Module, protocol: Any) -> tuple[Any, ...]:
        reduced: Any = plain.__reduce_ex__(module, protocol)
        return _empty_decoding, (plain, names), *reduced[2:]  # made anew, then given its state

    def load(module: nn.Module, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        refuse_dense_weights(names, state_dict, prefix)
        plain._load_from_state_dict(module, state_dict, prefix, *args)

    attributes: dict[str, Any] = {name: decoded(name) for name in names}
    # Pickling: by `_empty_decoding`, because the class has no importable name.
    attributes |= {"__reduce_ex__": reduce, "_load_from_state_dict": load}
    return type(plain.__name__, (plain,), attributes)


def _empty_decoding(plain: Any, names: tuple[str, ...]) -> nn.Module:
    """Return an instance without state, as unpickling starts from."""
    made = _decoding_class(plain, names)
    return made.__new__(made)
