"""Matrices of a network that have a row for each token: which are compressed, and how the network reads them.

The embedding comes first of all, so that blocks are calibrated on what it gives once it is compressed, and a head
of its own comes last, on what the compressed blocks give. A head that is tied to the embedding is the same tensor:
it has to come first as well, and is coded for both its readers at once.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from sqs_pyro.compression.blockwise.recipe import BlockwiseRecipe
from sqs_pyro.errors import RecipeError
from sqs_pyro.kernels.modules import PackedEmbedding, packed_type
from sqs_pyro.networks.architecture import Architecture
from sqs_pyro.networks.architectures import architecture_of, layer_names, vocabulary_paths


@dataclass(frozen=True)
class Vocabulary:
    """Paths of what is compressed beside the blocks' layers; None for what is not.

    Attributes:
        embedding: an ``nn.Embedding``.
        tied_head: the head that reads the embedding's weight, too.
        head: a head of its own.
    """

    embedding: str | None = None
    tied_head: str | None = None
    head: str | None = None

    @property
    def paths(self) -> list[str]:
        """Paths of the matrices, each tensor once."""
        return [path for path in (self.embedding, self.head) if path is not None]

    def without_skipped(self, recipe: BlockwiseRecipe) -> "Vocabulary":
        """Return it without what the recipe's patterns leave uncompressed."""
        embedding, head = (None if path and recipe.skips(path) else path for path in (self.embedding, self.head))
        return Vocabulary(embedding, self.tied_head if embedding else None, head)

    @property
    def any_head(self) -> str | None:
        """Path of the head whose weight is compressed, tied or not."""
        return self.tied_head or self.head


def vocabulary_of(net: nn.Module, recipe: BlockwiseRecipe, architecture: Architecture | None = None) -> Vocabulary:
    """Return the matrices with a row for each token that a recipe compresses, its patterns apart.

    Args:
        net: the network.
        recipe: its ``embedding`` and ``head``.
        architecture: of the network; that of its ``model_type`` if left out.

    Raises:
        NetworkError: the architecture is unknown.
        RecipeError: what the recipe asks for explicitly cannot be compressed.
    """
    architecture = architecture or architecture_of(net)
    embedding, head = vocabulary_paths(net, architecture)
    first = _wanted("embedding", embedding, net, recipe, architecture)
    last = _wanted("head", head, net, recipe, architecture)
    if embedding is None or head is None:
        return Vocabulary(first, None, last)
    if net.get_submodule(embedding).weight is not net.get_submodule(head).weight:
        return Vocabulary(first, None, last)
    if first is None and recipe.head:
        raise _refused("head", f"'{head}' is tied to the embedding, which is left as it is")
    return Vocabulary(first, head) if first is not None else Vocabulary()


def _wanted(
    key: str, path: str | None, net: nn.Module, recipe: BlockwiseRecipe, architecture: Architecture
) -> str | None:
    """Return the path of what is compressed under a key of the recipe; None if it is left as it is."""
    asked = getattr(recipe, key)
    if asked is False:
        return None
    why = None
    if len(architecture.stacks) > 1:
        # A later stack's embedding is read behind the blocks of an earlier one, and both may share one.
        why = f"architecture {architecture.name!r} has several stacks of blocks"
    elif path is None:
        why = f"{type(net).__name__} has no {key} with a row for each token where {architecture.name!r} says"
    elif key == "embedding" and not recipe.skips(path):
        module = net.get_submodule(path)
        if packed_type(module) is not PackedEmbedding:
            why = f"'{path}' is a {type(module).__name__}, which computes more than a look-up of rows"
        elif _is_last_parameter(path, net, recipe, architecture):
            why = f"without '{path}' no parameter is left, by which transformers tells a network's device"
    if why is not None and asked:
        raise _refused(key, why)
    return path if why is None else None


def _is_last_parameter(path: str, net: nn.Module, recipe: BlockwiseRecipe, architecture: Architecture) -> bool:
    """Return whether all is compressed beside an embedding, as of OLMo, whose norms have no weights."""
    _, head = vocabulary_paths(net, architecture)
    layers: dict[str, Any] = {**layer_names(net, architecture), path: net.get_submodule(path)}
    layers |= {} if head is None or recipe.head is False else {head: net.get_submodule(head)}
    coded = {id(layer.weight) for name, layer in layers.items() if not recipe.skips(name)}
    return all(id(value) in coded for value in net.parameters())


def _refused(key: str, why: str) -> RecipeError:
    return RecipeError(
        f"Recipe key 'blockwise.{key}' is true, but {why}: leave the key out, which compresses it where it can be."
    )


def candidates(
    net: nn.Module, recipe: BlockwiseRecipe, architecture: Architecture | None = None
) -> dict[str, nn.Module]:
    """Return every module that a recipe can compress by its path, those included that its patterns leave out.

    Arguments as of :func:`vocabulary_of`.

    Raises:
        NetworkError, RecipeError: as :func:`vocabulary_of`, or a block has a layer that its architecture does not
            name.
    """
    paths = vocabulary_of(net, recipe, architecture).paths
    return {**layer_names(net, architecture), **{path: net.get_submodule(path) for path in paths}}


@contextmanager
def counted_tokens(embedding: nn.Module) -> Iterator[Tensor]:
    """Count how often each row of an embedding is read inside: float64 ``[V]``, added to in place."""
    assert isinstance(embedding, nn.Embedding)
    counts = torch.zeros(embedding.num_embeddings, dtype=torch.float64)

    def count(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        counts.add_(torch.bincount(inputs[0].reshape(-1).cpu(), minlength=len(counts)))

    hook = embedding.register_forward_pre_hook(count)
    try:
        yield counts
    finally:
        hook.remove()


@contextmanager
def rows_of(embedding: nn.Module, table: Tensor) -> Iterator[None]:
    """Let an embedding look up rows of another table ``[V, D]`` inside; its own weight stays."""

    def look_up(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
        return nn.functional.embedding(inputs[0], table).to(output)

    hook = embedding.register_forward_hook(look_up)
    try:
        yield
    finally:
        hook.remove()
