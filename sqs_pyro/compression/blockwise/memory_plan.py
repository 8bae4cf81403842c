"""How much memory blockwise compression is going to take, told from shapes alone before anything is loaded.

A plan follows what :mod:`~sqs_pyro.compression.blockwise.blocks` holds at its moments: when gradients tell
the importance of outputs, while an embedding or a head is coded, in the middle of a block, and when the packed
network is put together. Tensors that live
through a moment are counted; the allocator's overhead and the libraries themselves (some 0.5 GB) are not.

Of ranks it tells what one takes: hidden states and rows that are coded are divided, all else each of them has.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from sqs_pyro.compression.blockwise.file_size import bits_a_weight
from sqs_pyro.compression.blockwise.forecast import IMPORTANCE_BATCH
from sqs_pyro.compression.blockwise.recipe import BlockwiseRecipe
from sqs_pyro.compression.blockwise.shares import largest_share, whole_layers
from sqs_pyro.compression.blockwise.vocabulary import candidates, vocabulary_of
from sqs_pyro.compression.layers import check_layers
from sqs_pyro.networks.architectures import architecture_of, block_paths, blocks, layer_groups, layer_names
from sqs_pyro.networks.linear_form import in_linear_form
from sqs_pyro.ranks import Ranks
from sqs_pyro.recipes import parse

_FLOAT, _DOUBLE = 4, 8
#: Copies of a block's weights: the original, the one whose layers are coded in turn, the finished one.
_BLOCKS = 3
#: Hidden states of all sequences: before the block and behind it, of the original and of the compressed network.
_STATES = 4
#: Of one input's row of H, in bytes: two moments and their sum in float32; H in order, its Cholesky factor, that
#: one's inverse and the same the other way round in float64; U and H in order in float32.
_CURVATURE = 3 * _FLOAT + 4 * _DOUBLE + 2 * _FLOAT
#: The same while two moments are summed: for each of the tree's branches that a rank's units have, and one more
#: that is added; and, on several ranks, for what one sum sends and receives.
_SUMMED, _SENT = 2 * _FLOAT, 3 * _FLOAT
#: Of one weight of the layer that is coded: its mean, that in units of scales, and in order; prices; symbols; in
#: the M-step its symbol's number and the products that are summed in float64.
_WEIGHT = 5 * _FLOAT + 1 + 2 * _DOUBLE + 2 * _FLOAT
#: The same of scales of groups of inputs: units of codewords, in order, and the mean in them.
_UNITS = 3 * _FLOAT
#: Hidden states inside a block, in units of its widest layer, that one minibatch holds at once.
_INSIDE = 4
#: What autograd keeps of a token in a block, in units of its hidden size and of its widest layer.
_KEPT_HIDDEN, _KEPT_WIDEST = 8, 4
#: Numbers of the size of the vocabulary that a token has while gradients are taken.
_KEPT_LOGITS = 4


@dataclass(frozen=True)
class MemoryPlan:
    """Bytes at the moments of blockwise compression.

    Attributes:
        weights: of the network in memory: all of them, or with streaming those of one block.
        block: further copies of a block's weights.
        curvature: moments of the widest layer's inputs, and what is computed from them.
        coding: of the largest layer, while its symbols are chosen.
        table: the same, with its curvature, of the larger of embedding and head; 0 where neither is compressed.
        held: of a streamed network, all beside the blocks, which are in memory then.
        states: hidden states of all calibration sequences, or of a rank's own.
        inside: what a block computes for one minibatch.
        packed: finished blocks in their packed form.
        gradients: what autograd keeps for the importance of outputs; 0 with allocation `even`.
        ends: embeddings, head, norms, and layers that are left as they are, as often as they are held when the
            packed network is put together.
        parameters: of the whole network.
        tokens: of the calibration.
    """

    weights: int
    block: int
    curvature: int
    coding: int
    table: int
    held: int
    states: int
    inside: int
    packed: int
    gradients: int
    ends: int
    parameters: int
    tokens: int

    @property
    def moments(self) -> dict[str, dict[str, int]]:
        """What each of the moments consists of."""
        work = {"curvature": self.curvature, "coding": self.coding}
        # Inputs are computed minibatch by minibatch, and only then are symbols chosen: the larger counts.
        if self.inside > sum(work.values()):
            work = {"inside": self.inside}
        held = {"states": self.states, "packed": self.packed}
        return {
            "importance": {"weights": self.weights, "gradients": self.gradients},
            **({"vocabulary": self._of_table(held)} if self.table else {}),
            "block": {"weights": self.weights, "block": self.block, **work, **held},
            "end": {"ends": self.ends, **held},
        }

    def _of_table(self, held: dict[str, int]) -> dict[str, int]:
        # Of a streamed network no block is in memory then.
        weights = {"ends": self.held} if self.held else {"weights": self.weights}
        return {**weights, "table": self.table, **held}

    @property
    def peak(self) -> int:
        """The most that any of them takes."""
        return max(sum(parts.values()) for parts in self.moments.values())


def plan_memory(
    net: nn.Module,
    sequences: int,
    length: int,
    recipe: BlockwiseRecipe | Mapping[str, Any] | None = None,
    *,
    streamed: bool = True,
    ranks: int = 1,
) -> MemoryPlan:
    """Return what compression of a network takes; its weights may be on the meta device.

    Args:
        net: of an architecture that :mod:`~sqs_pyro.networks.architectures` knows.
        sequences: n of the calibration's ``[n, T]``.
        length: T.
        recipe: what is going to be done; ``bits``, ``batch_size``, ``units`` and the file's layout matter.
        streamed: whether one block at a time is read from the checkpoint
            (:func:`~sqs_pyro.integrations.checkpoint.compress_checkpoint`) or the whole network is in memory.
        ranks: how many share the work; the plan is of the one that has most.

    Raises:
        NetworkError, RecipeError: an unknown architecture, an impossible recipe, more ranks than units.
    """
    recipe = parse(BlockwiseRecipe, recipe or {}, "blockwise")
    Ranks(0, ranks).check(recipe.units, "blockwise.units")
    with in_linear_form(net):
        return _plan(net, sequences, length, recipe, streamed, ranks)


def _plan(
    net: nn.Module, sequences: int, length: int, recipe: BlockwiseRecipe, streamed: bool, ranks: int
) -> MemoryPlan:
    found, layers = blocks(net), layer_names(net).values()
    in_block = max(map(_count, found))
    weights = _compressed(net, recipe)
    tables = [weights[path] for path in vocabulary_of(net, recipe).without_skipped(recipe).paths]
    left = sum(layer.weight.numel() for name, layer in layer_names(net).items() if name not in weights)
    total = _count(net)
    outside = total - sum(_count(block) for block in found)
    config: Any = net.config
    tokens, width = sequences * length, config.hidden_size
    own = min(
        sequences, recipe.batch_size * largest_share(-(-sequences // recipe.batch_size), recipe.units, ranks)
    )
    row = max(_SUMMED * (1 + _units(recipe.units, ranks).bit_length()) + _SENT * (ranks > 1), _CURVATURE)
    whole = {name for group in _groups(net, recipe) for name in whole_layers(group, ranks)}
    widest = max(max(layer.in_features, layer.out_features) for layer in layers)
    return MemoryPlan(
        weights=_FLOAT * (in_block if streamed else total),
        block=(_BLOCKS - 1) * _FLOAT * in_block,
        curvature=row * max(layer.in_features for layer in layers) ** 2,
        coding=max(
            _coding(layer.weight, recipe, ranks, name in whole) for name, layer in layer_names(net).items()
        ),
        table=max((row * each.shape[1] ** 2 + _coding(each, recipe, ranks) for each in tables), default=0),
        held=_FLOAT * outside if streamed else 0,
        states=_STATES * _FLOAT * own * length * width,
        inside=_INSIDE * _FLOAT * min(recipe.batch_size, sequences) * length * widest,
        packed=_finished(net, weights, left, recipe),
        gradients=_gradients(net, recipe, length, widest),
        # The network as it is held, a copy that is rounded, and the packed network's own; the last has of blocks
        # what is left as it is, and of a streamed network the copy has no more of them, either.
        ends=_FLOAT * ((3 * outside + 2 * left) if streamed else (2 * total + outside + left)),
        parameters=total,
        tokens=tokens,
    )


def _units(units: int, ranks: int) -> int:
    """Return how many units the rank has that has most."""
    return -(-units // ranks)


def _groups(net: nn.Module, recipe: BlockwiseRecipe) -> Iterator[dict[str, torch.Size]]:
    """Yield shapes of coded layers that share their input, by name."""
    for path in block_paths(net):
        for group in layer_groups(net.get_submodule(path), architecture_of(net)):
            shapes = {f"{path}.{name}": layer.weight.shape for name, layer in group.items()}
            yield {name: shape for name, shape in shapes.items() if not recipe.skips(name)}


def _coding(weight: Tensor, recipe: BlockwiseRecipe, ranks: int, whole: bool = False) -> int:
    """Return bytes while a weight is coded: of a rank's own rows, and on several ranks all symbols twice.

    Args:
        weight: of any shape ``[N, M]``.
        recipe: its ``group_size`` and ``units``.
        ranks: how many there are.
        whole: whether one rank codes all rows.
    """
    rows, inputs = weight.shape
    each = _WEIGHT if recipe.group_size is None else _WEIGHT + _UNITS
    own = rows if whole else largest_share(rows, recipe.units, ranks)
    return each * own * inputs + 2 * weight.numel() * (ranks > 1)


def _compressed(net: nn.Module, recipe: BlockwiseRecipe) -> dict[str, Tensor]:
    """Return what is compressed: embedding and head, and of the blocks what is not left as it is."""
    found: dict[str, Any] = candidates(net, recipe)
    check_layers(recipe.layers, found, "blockwise.layers")
    return {name: module.weight for name, module in found.items() if not recipe.skips(name)}


def _finished(net: nn.Module, weights: Mapping[str, Tensor], left: int, recipe: BlockwiseRecipe) -> int:
    """Return bytes of what is coded, and of ``left`` weights of blocks that are as they were but rounded."""
    rounded = 8 * getattr(torch, recipe.leftover_dtype).itemsize
    bits = bits_a_weight(net, weights, recipe)
    coded = sum(value.numel() * (recipe.bits_of(name) or bits) for name, value in weights.items())
    return int((coded + rounded * left) / 8)


def _gradients(net: nn.Module, recipe: BlockwiseRecipe, length: int, widest: int) -> int:
    if recipe.allocation != "importance":
        return 0
    config: Any = net.config
    inside = len(blocks(net)) * (_KEPT_HIDDEN * config.hidden_size + _KEPT_WIDEST * widest)
    outside = _KEPT_LOGITS * config.vocab_size
    return _FLOAT * IMPORTANCE_BATCH * length * (inside + outside)


def _count(module: nn.Module) -> int:
    """Count parameters, shared ones once."""
    return sum(value.numel() for value in module.parameters())
