"""Transformers architectures as tables of names: where the blocks are, and what their linear layers are for.

A network's ``config.model_type`` finds its table. One more architecture is one more table::

    register_architecture(
        Architecture(
            name="gemma",
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
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from sqs_pyro.errors import NetworkError

BLOCKS = "blocks"


@dataclass(frozen=True)
class Architecture:
    """Names in the networks of one ``model_type``, none of them with a prefix of the network around it.

    Attributes:
        name: ``config.model_type``.
        blocks: path of the list of blocks in the base model, such as ``"encoder.layer"``.
        groups: the linear layers of a block, ``role -> path in the block``. Layers of one group share their input;
            groups stand in the order in which a block calls them.
        parts: what else can be compressed, ``part -> paths of modules with a weight``, in the base model
            (``"embedding"``) or in the network around it (``"head"``). A network has those of its own head only.

    Raises:
        NetworkError: there is no layer, a group is empty, or a role or a layer stands twice.
    """

    name: str
    blocks: str
    groups: Sequence[Mapping[str, str]]
    parts: Mapping[str, Sequence[str]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        roles = [role for group in self.groups for role in group]
        if not all(self.groups) or not roles:
            raise NetworkError(
                f"Architecture {self.name!r} has a group without a layer, or no group: give a mapping from role "
                "to path in the block for each group of linear layers that share their input."
            )
        paths = [path for group in self.groups for path in group.values()]
        twice = [name for names in (roles, paths) for name, count in Counter(names).items() if count > 1]
        if twice:
            raise NetworkError(f"Architecture {self.name!r} names {twice[0]!r} twice: name every layer once.")
        if BLOCKS in self.parts:
            raise NetworkError(
                f"Architecture {self.name!r} has a part {BLOCKS!r}, which its groups are already: rename it."
            )

    @property
    def layers(self) -> dict[str, str]:
        """The linear layers of a block, ``role -> path in the block``, in the order of their calls."""
        return {role: path for group in self.groups for role, path in group.items()}


_architectures: dict[str, Architecture] = {}


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


def block_paths(model: nn.Module) -> list[str]:
    """Return paths of a network's blocks, such as ``"model.layers.0"``, in the order of their calls.

    Raises:
        NetworkError: the architecture is unknown, or the network has no blocks where it says.
    """
    architecture = architecture_of(model)
    path = _join(base_path(model), architecture.blocks)
    found = _modules(model).get(path)
    if not isinstance(found, nn.ModuleList) or not len(found):
        raise NetworkError(
            f"{type(model).__name__} has no list of blocks at '{path}', where architecture {architecture.name!r} "
            "says: register one with the right path."
        )
    return [f"{path}.{i}" for i in range(len(found))]


def blocks(model: nn.Module) -> list[nn.Module]:
    """Return a network's blocks in the order of their calls; errors as :func:`block_paths`."""
    return [model.get_submodule(path) for path in block_paths(model)]


def linear_layers(block: nn.Module, architecture: Architecture) -> dict[str, nn.Linear]:
    """Return the linear layers of a block by role, in the order of their calls.

    Raises:
        NetworkError: a layer is missing or is no ``nn.Linear``, or the block has one that has no role: none is
            left out unnoticed.
    """
    named = dict(block.named_modules())
    for role, path in architecture.layers.items():
        if not isinstance(named.get(path), nn.Linear):
            kind = type(named[path]).__name__ if path in named else "nothing"
            raise NetworkError(
                f"{type(block).__name__} has {kind} at '{path}', but architecture {architecture.name!r} expects "
                f"an nn.Linear there ({role!r}): register one with the right names."
            )
    left_out = {path for path, module in named.items() if isinstance(module, nn.Linear)}
    left_out -= set(architecture.layers.values())
    if left_out:
        raise NetworkError(
            f"{type(block).__name__} has linear layers to which architecture {architecture.name!r} gives no role: "
            f"{', '.join(sorted(left_out))}; register one that names them too."
        )
    return {role: named[path] for role, path in architecture.layers.items()}


def layer_names(model: nn.Module) -> dict[str, nn.Linear]:
    """Return the linear layers of all blocks of a model by their paths in it; errors as :func:`linear_layers`."""
    architecture = architecture_of(model)
    return {
        f"{path}.{name}": layer
        for path in block_paths(model)
        for group in layer_groups(model.get_submodule(path), architecture)
        for name, layer in group.items()
    }


def layer_groups(block: nn.Module, architecture: Architecture) -> list[dict[str, nn.Linear]]:
    """Return the linear layers of a block by path, in groups that share their input, in the order of their calls.

    Raises:
        NetworkError: as :func:`linear_layers`.
    """
    layers = linear_layers(block, architecture)
    return [{path: layers[role] for role, path in group.items()} for group in architecture.groups]


def parts_of(model: nn.Module) -> dict[str, list[str]]:
    """Return paths of the modules of each part that a network has, those of ``"blocks"`` first.

    Raises:
        NetworkError: the architecture is unknown, or there are no blocks where it says.
    """
    architecture, base, modules = architecture_of(model), base_path(model), _modules(model)
    layers = architecture.layers.values()
    found = {BLOCKS: [f"{block}.{layer}" for block in block_paths(model) for layer in layers]}
    for part, names in architecture.parts.items():
        # An embedding is in the base model, a head beside it: the table does not say which.
        places = [_join(base, name) if _join(base, name) in modules else name for name in names]
        found[part] = [place for place in places if place in modules]
    return {part: paths for part, paths in found.items() if paths}


def vocabulary_paths(model: nn.Module) -> tuple[str | None, str | None]:
    """Return paths of the embedding of tokens and of the head that gives their logits, None for what is not there.

    They are those of the architecture's parts ``"embedding"`` and ``"head"`` that have a row for each token.

    Raises:
        NetworkError: the architecture is unknown, or there are no blocks where it says.
    """
    parts, modules = parts_of(model), _modules(model)
    tables = [path for path in parts.get("embedding", ()) if isinstance(modules[path], nn.Embedding)]
    heads = {path: head for path in parts.get("head", ()) if isinstance(head := modules[path], nn.Linear)}
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
        architecture, stack = architecture_of(model), block_paths(model)[0].rpartition(".")[0]
        for block in blocks(model):
            linear_layers(block, architecture)  # raises, where a pattern would leave a layer out unnoticed
        layers = "|".join(re.escape(path) for path in architecture.layers.values())
        patterns.append(rf"^{re.escape(stack)}\.\d+\.(?:{layers})\.weight$")
    others = [path for part in parts if part != BLOCKS for path in found[part]]
    return patterns + [rf"^{re.escape(path)}\.weight$" for path in others]


def _join(prefix: str, path: str) -> str:
    return f"{prefix}.{path}" if prefix else path


def _modules(model: nn.Module) -> dict[str, nn.Module]:
    return dict(model.named_modules(remove_duplicate=False))  # a shared module by each of its names


_CAUSAL_PARTS = {
    "embedding": ("embed_tokens",),
    "head": ("lm_head",),
    "classifier": ("score", "qa_outputs"),
}
_LLAMA_GROUPS = (
    {"q": "self_attn.q_proj", "k": "self_attn.k_proj", "v": "self_attn.v_proj"},
    {"o": "self_attn.o_proj"},
    {"gate": "mlp.gate_proj", "up": "mlp.up_proj"},
    {"down": "mlp.down_proj"},
)

for _name in ("llama", "mistral", "qwen2", "qwen3"):
    register_architecture(Architecture(_name, "layers", _LLAMA_GROUPS, _CAUSAL_PARTS))

register_architecture(
    Architecture(
        name="bert",
        blocks="encoder.layer",
        groups=(
            {"q": "attention.self.query", "k": "attention.self.key", "v": "attention.self.value"},
            {"o": "attention.output.dense"},
            {"intermediate": "intermediate.dense"},
            {"output": "output.dense"},
        ),
        parts={
            "embedding": ("embeddings.word_embeddings",),
            "pooler": ("pooler.dense",),
            "head": ("cls.predictions.transform.dense", "cls.predictions.decoder"),
            "classifier": ("classifier", "qa_outputs", "cls.seq_relationship"),
        },
    )
)
