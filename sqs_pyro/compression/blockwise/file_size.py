"""How many bits a weight may have, so that the whole file has the megabytes that were asked for."""

import math
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from sqs_pyro.compression.blockwise.recipe import BlockwiseRecipe
from sqs_pyro.errors import RecipeError
from sqs_pyro.packing.leftovers import leftover_state

_ENVELOPE = 700  # bytes of a file's header and of what its manifest says once
_ENTRY = 20  # bytes that a compressed tensor has in the manifest, which is compressed itself
_LEAST, _MOST = 0.5, 8.0  # bits a weight: fewer are met by zeros alone, more no recipe has
_UNUSED = 0.75  # bits below log2 of the values' number at which an even grid still has a place for every weight


def bits_a_weight(net: nn.Module, weights: Mapping[str, Tensor], recipe: BlockwiseRecipe) -> float:
    """Return the bits a weight of those without bits of their own: as given, or what the file leaves for them.

    Told from shapes alone, so that a streamed network has the same.

    Args:
        net: the network; its weights may be on the meta device.
        weights: what is compressed, by the path of its module.
        recipe: its ``bits`` or ``megabytes``.

    Raises:
        RecipeError: so small, or so large, a file cannot be had; naming what can.
    """
    if recipe.megabytes is None:
        assert recipe.bits is not None  # a recipe has one of the two
        return recipe.bits
    compressed = {id(value) for value in weights.values()}
    trained = {id(value) for value in net.parameters()}
    rounded = getattr(torch, recipe.leftover_dtype).itemsize
    others = _ENVELOPE + _ENTRY * len(weights)
    for value in leftover_state(net, compressed).values():
        size = value.element_size()
        others += value.numel() * (min(size, rounded) if id(value) in trained else size)
    own = {name: recipe.bits_of(name) for name in weights}
    fixed = sum((own[name] or 0.0) * value.numel() for name, value in weights.items())
    waiting = sum(value.numel() for name, value in weights.items() if own[name] is None)
    if not waiting:
        raise RecipeError(
            "Recipe key 'blockwise.megabytes' is given, but every layer has bits of its own, so that nothing is "
            "left to be chosen: leave out one of them."
        )
    bits = (8e6 * recipe.megabytes - 8 * others - fixed) / waiting
    finest = min(_MOST, math.log2(1 + recipe.num_components) - _UNUSED)
    least, most = ((8 * others + fixed + each * waiting) / 8e6 for each in (_LEAST, finest))
    if not _LEAST <= bits <= finest:
        raise RecipeError(
            f"Recipe key 'blockwise.megabytes' is {recipe.megabytes:g}, which comes to {bits:.2f} bits for each "
            f"of {waiting:,} weights beside {others / 1e6:.3g} MB that are not compressed: give {least:.3g} to "
            f"{most:.3g}; less is had with more of the network compressed (blockwise.embedding, blockwise.head), "
            "more with more codewords (blockwise.num_components)."
        )
    return bits
