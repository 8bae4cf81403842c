"""Transformers architectures as tables of names: where the blocks are, and what their linear layers are for.

A network's ``config.model_type`` finds its table. One more architecture is one more table::

    register_architecture(
        Architecture(
            name="mine",
            blocks="layers",
            groups=(
                {"q": "self_attn.q_proj", "k": "self_attn.k_proj", "v": "self_attn.v_proj"},
                {"o": "self_attn.o_proj"},
                {"gate": "mlp.gate_proj", "up": "mlp.up_proj"},
                {"down": "mlp.down_proj"},
            ),
            parts={"embedding": ("embed_tokens",), "head": ("lm_head",)},
        )
    )
"""

import re
from collections.abc import Sequence
from typing import Any

from torch import nn

from sqs_pyro.errors import NetworkError
from sqs_pyro.networks.architecture import BLOCKS, Architecture
from sqs_pyro.networks.architecture_tables import TABLES
from sqs_pyro.networks.linear_form import LINEAR

_architectures: dict[str, Architecture] = {table.name: table for table in TABLES}


def register_architecture(architecture: Architecture, *, override: bool = False) -> Architecture:
    """Make an architecture known under its name, for this process.

    Args:
        architecture: the table.
        override: replace another table of the same name.

    Returns:
        The architecture.

    Raises:
        NetworkError: the name has another table, and ``override`` is False.
    """
    known = _architectures.get(architecture.name, architecture)  # the same table again is no mistake
    if known != architecture and not override:
        raise NetworkError(
            f"Architecture {architecture.name!r} is known already, with other names in it: give override=True "
            "to replace them."
        )
    _architectures[architecture.name] = architecture
    return architecture


def architecture_names() -> list[str]:
    """Return the names of all known architectures, sorted."""
    return sorted(_architectures)


def is_known(model_or_config: Any) -> bool:
    """Return whether the architecture of a network, or of its configuration, is known."""
    return getattr(getattr(model_or_config, "config", model_or_config), "model_type", None) in _architectures


def architecture_of(model_or_config: Any) -> Architecture:
    """Return the architecture of a transformers network, or of its configuration, by ``model_type``.

    Raises:
        NetworkError: there is no ``model_type``, or it is unknown.
    """
    config = getattr(model_or_config, "config", model_or_config)
    name = getattr(config, "model_type", None)
    if name in _architectures:
        return _architectures[name]
    given = type(model_or_config).__name__
    what = f"{given} has no model_type" if not name else f"The architecture {name!r} of this {given} is unknown"
    raise NetworkError(
        f"{what}: known are {', '.join(architecture_names())}; add one with "
        "sqs_pyro.networks.architectures.register_architecture(Architecture(name=..., blocks=..., groups=...))."
    )


def base_path(model: nn.Module) -> str:
    """Return the path of the base model in a network with a head, say ``"bert"``; ``""`` for the base model."""
    base = getattr(model, "base_model", model)
    return next((path for path, module in model.named_modules() if module is base), "")


def stack_paths(model: nn.Module, architecture: Architecture | None = None) -> list[list[str]]:
    """Return paths of the blocks of each stack that a network has, in the order of their calls.

    Args:
        model: the network.
        architecture: its table; that of its ``model_type`` if left out.

    Raises:
        NetworkError: the architecture is unknown, or the network has no blocks where it says.
    """
    architecture = architecture or architecture_of(model)
    base, modules = base_path(model), _modules(model)
    stacks = []
    for stack in architecture.stacks:
        path = _join(base, stack) if _join(base, stack) in modules else stack
        found = modules.get(path)
        if isinstance(found, nn.ModuleList) and len(found):
            stacks.append([f"{path}.{i}" for i in range(len(found))])
    if not stacks:
        where = " or ".join(f"'{_join(base, stack)}'" for stack in architecture.stacks)
        raise NetworkError(
            f"{type(model).__name__} has no list of blocks at {where}, where architecture {architecture.name!r} "
            "says: register one with the right path."
        )
    return stacks


def block_paths(model: nn.Module, architecture: Architecture | None = None) -> list[str]:
    """Return paths of a network's blocks, such as ``"model.layers.0"``, in the order of their calls.

    Arguments and errors as of :func:`stack_paths`.
    """
    return [path for stack in stack_paths(model, architecture) for path in stack]


def blocks(model: nn.Module, architecture: Architecture | None = None) -> list[nn.Module]:
    """Return a network's blocks in the order of their calls; arguments and errors as of :func:`stack_paths`."""
    return [model.get_submodule(path) for path in block_paths(model, architecture)]


def linear_layers(block: nn.Module, architecture: Architecture) -> dict[str, nn.Linear]:
    """Return the linear layers of a block by role, in the order of their calls; many of a role are numbered.

    Raises:
        NetworkError: a layer is missing or is no ``nn.Linear``, or the block has one that has no role: none is
            left out unnoticed.
    """
    return {
        f"{role}.{i}" if "*" in architecture.layers[role] else role: _checked(
            block, architecture, role, path, layer
        )
        for role, found in _found(block, architecture).items()
        for i, (path, layer) in enumerate(found.items())
    }


def layer_groups(block: nn.Module, architecture: Architecture) -> list[dict[str, nn.Linear]]:
    """Return the linear layers of a block by path, in groups that share their input, in the order of their calls.

    Raises:
        NetworkError: as :func:`linear_layers`.
    """
    found = _found(block, architecture)
    groups: list[dict[str, nn.Linear]] = []
    for roles in architecture.groups:
        layers = {
            role: {path: _checked(block, architecture, role, path, layer) for path, layer in found[role].items()}
            for role in roles
            if role in found
        }
        apart = [role for role in layers if role in architecture.apart]
        groups.append(
            {path: layer for role in layers if role not in apart for path, layer in layers[role].items()}
        )
        groups += [{path: layer} for role in apart for path, layer in layers[role].items()]
    return [group for group in groups if group]


def layer_names(model: nn.Module, architecture: Architecture | None = None) -> dict[str, nn.Linear]:
    """Return the linear layers of all blocks of a model by their paths in it.

    Arguments and errors as of :func:`stack_paths` and :func:`linear_layers`.
    """
    architecture = architecture or architecture_of(model)
    return {
        f"{path}.{name}": layer
        for path in block_paths(model, architecture)
        for group in layer_groups(model.get_submodule(path), architecture)
        for name, layer in group.items()
    }


def _found(block: nn.Module, architecture: Architecture) -> dict[str, dict[str, Any]]:
    """Return what stands at the paths of each role that a block has: modules, or fused experts' parameter."""
    modules, parameters = dict(block.named_modules()), dict(block.named_parameters())
    found: dict[str, dict[str, Any]] = {}
    for role, path in architecture.layers.items():
        fused = path.removesuffix(".*")
        if fused in parameters:
            found[role] = {fused: parameters[fused]}
            continue
        pattern = re.compile(re.escape(path).replace(r"\*", r"\d+"))
        # Of a module that was no linear layer before it got one: sqs_pyro.networks.linear_form.
        places = [name for name in modules if pattern.fullmatch(name)]
        places = [f"{name}.{LINEAR}" if f"{name}.{LINEAR}" in modules else name for name in places]
        found[role] = {name: modules[name] for name in places}
        if not found[role]:
            if role not in architecture.optional:
                raise _no_linear(block, architecture, role, path, "nothing")
            del found[role]
    named = {path for each in found.values() for path in each} | {*architecture.kept}
    left_out = {path for path, module in modules.items() if isinstance(module, nn.Linear)} - named
    if left_out:
        raise NetworkError(
            f"{type(block).__name__} has linear layers to which architecture {architecture.name!r} gives no role: "
            f"{', '.join(sorted(left_out))}; register one that names them too."
        )
    return found


def _checked(block: nn.Module, architecture: Architecture, role: str, path: str, layer: Any) -> nn.Linear:
    if not isinstance(layer, nn.Linear):
        raise _no_linear(block, architecture, role, path, f"a {type(layer).__name__}")
    return layer


def _no_linear(block: nn.Module, architecture: Architecture, role: str, path: str, found: str) -> NetworkError:
    return NetworkError(
        f"{type(block).__name__} has {found} at '{path}', but architecture {architecture.name!r} expects "
        f"an nn.Linear there ({role!r}): register one with the right names."
    )


def _block_weights(model: nn.Module, stack: Sequence[str]) -> list[str]:
    """Return names of the weights of all linear layers in the blocks of a stack."""
    architecture = architecture_of(model)
    return [
        f"{block}.{path}" if isinstance(value, nn.Parameter) else f"{block}.{path}.weight"
        for block in stack
        for found in _found(model.get_submodule(block), architecture).values()
        for path, value in found.items()
    ]


def parts_of(model: nn.Module) -> dict[str, list[str]]:
    """Return paths of the modules of each part that a network has, those of ``"blocks"`` first.

    Raises:
        NetworkError: the architecture is unknown, there are no blocks where it says, or a block has a linear layer
            that it does not name.
    """
    inside = [name for stack in stack_paths(model) for name in _block_weights(model, stack)]
    found = {BLOCKS: [name.removesuffix(".weight") for name in inside]}
    found |= {part: list(modules) for part, modules in _beside_blocks(model, architecture_of(model)).items()}
    return {part: paths for part, paths in found.items() if paths}


def _beside_blocks(model: nn.Module, architecture: Architecture) -> dict[str, dict[str, nn.Module]]:
    """Return the modules of an architecture's own parts by path, as far as the network has them."""
    base, modules = base_path(model), _modules(model)
    found = {}
    for part, names in architecture.parts.items():
        # An embedding is in the base model, a head beside it: the table does not say which.
        places = [_join(base, name) if _join(base, name) in modules else name for name in names]
        found[part] = {place: modules[place] for place in places if place in modules}
    return found


def vocabulary_paths(model: nn.Module, architecture: Architecture | None = None) -> tuple[str | None, str | None]:
    """Return paths of the embedding of tokens and of the head that gives their logits, None for what is not there.

    They are those of the architecture's parts ``"embedding"`` and ``"head"`` that have a row for each token.

    Args:
        model: the network.
        architecture: its table; that of its ``model_type`` if left out.

    Raises:
        NetworkError: the architecture is unknown.
    """
    parts = _beside_blocks(model, architecture or architecture_of(model))
    tables = [path for path, table in parts.get("embedding", {}).items() if isinstance(table, nn.Embedding)]
    heads = {path: head for path, head in parts.get("head", {}).items() if isinstance(head, nn.Linear)}
    tokens = getattr(getattr(model, "config", None), "vocab_size", None)
    logits = [path for path, head in heads.items() if head.out_features == tokens]
    return next(iter(tables), None), next(iter(logits), None)


def include_patterns(model: nn.Module, parts: Sequence[str] = (BLOCKS,)) -> list[str]:
    """Return regular expressions of the weights of some parts of a network, for ``BayesianNetwork(include=...)``.

    A head that is tied to the embedding is one site with it, under the embedding's name, whichever of the two
    parts is asked for.

    Args:
        model: a network of a known architecture.
        parts: ``"blocks"`` (the linear layers of all blocks) and parts of the architecture, such as
            ``"embedding"``, ``"pooler"``, ``"head"`` (of a language model) or ``"classifier"`` (of anything else).

    Raises:
        NetworkError: the architecture is unknown, the network has no such part, none is given, or a block has a
            linear layer that the architecture does not name.
    """
    found, parts = parts_of(model), [parts] if isinstance(parts, str) else parts
    for part in parts:
        if part not in found:
            raise NetworkError(f"{type(model).__name__} has no part {part!r}: it has {', '.join(found)}.")
    if not parts:
        raise NetworkError(f"There is no part to include: name some of {', '.join(found)}.")
    patterns = []
    if BLOCKS in parts:
        for stack in stack_paths(model):
            start = stack[0].rpartition(".")[0]
            inside = [name.removeprefix(f"{start}.").partition(".")[2] for name in _block_weights(model, stack)]
            layers = "|".join(re.escape(name) for name in dict.fromkeys(inside))
            patterns.append(rf"^{re.escape(start)}\.\d+\.(?:{layers})$")
    others = [path for part in parts if part != BLOCKS for path in found[part]]
    return patterns + [rf"^{re.escape(path)}\.weight$" for path in others]


def _join(prefix: str, path: str) -> str:
    return f"{prefix}.{path}" if prefix else path


def _modules(model: nn.Module) -> dict[str, nn.Module]:
    return dict(model.named_modules(remove_duplicate=False))  # a shared module by each of its names
