"""What is found out before the first block: how much outputs matter, and how many bits each layer is to take."""

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

from torch import Tensor, nn

from sqs_pyro.compression.blockwise.bit_budget import BitBudget, LayerRate
from sqs_pyro.compression.blockwise.block_layers import BlockLayers
from sqs_pyro.compression.blockwise.channel_scales import in_units_of, scale_bits
from sqs_pyro.compression.blockwise.importance import output_importance
from sqs_pyro.compression.blockwise.laplace import input_moments
from sqs_pyro.compression.blockwise.shares import Shares
from sqs_pyro.compression.blockwise.states import States, advance, behind
from sqs_pyro.compression.blockwise.store import Plan
from sqs_pyro.compression.blockwise.tables import Tables
from sqs_pyro.models.observation import Likelihood
from sqs_pyro.networks.block_stack import BlockStack, input_of
from sqs_pyro.networks.calling import split_examples

#: Sequences whose gradients are taken at once: autograd keeps the activations of the whole network for each.
IMPORTANCE_BATCH = 2
#: Tokens for each of a layer's inputs whose moments say how precise its weights are: more only make it longer.
TOKENS_AN_INPUT = 16


class Forecast:
    """Of allocation ``importance``, from the original network; its weights must be held.

    Args:
        stacks: the network's blocks.
        layers: those that are compressed.
        tables: embedding and head.
        entrance: from a stack's number to what its first block is called with, of this rank's minibatches.
        shares: the minibatches of the calibration.
    """

    def __init__(
        self,
        stacks: Sequence[BlockStack],
        layers: BlockLayers,
        tables: Tables,
        entrance: Callable[[int], States],
        shares: Shares,
    ) -> None:
        self.stacks, self.layers, self.tables, self.entrance = stacks, layers, tables, entrance
        self.recipe, self.shares = layers.recipe, shares

    def plan(self, minibatches: Sequence[Any], likelihood: Likelihood) -> Plan:
        """Return how much the outputs of layers matter; all ranks call it together.

        Args:
            minibatches: the calibration, all of it.
            likelihood: of the network's output.
        """
        net, vocabulary = self.stacks[0].net, self.tables.vocabulary
        some = minibatches[: -(-self.recipe.importance_sequences // self.recipe.batch_size)]
        # Gradients of the whole network need the memory of the whole network's activations.
        some = [part for inputs in some for part in split_examples(inputs, IMPORTANCE_BATCH)]
        whole = [] if vocabulary.embedding is None else [vocabulary.embedding]
        watched: dict[str, nn.Module] = {name: net.get_submodule(name) for name in [*self.layers.every(), *whole]}
        # Of these each rank has others than of the calibration, in as many units.
        shares = Shares(len(some), self.recipe.units, self.shares.ranks)
        importance = output_importance(
            net, watched, some, likelihood, self.recipe.seed, whole=whole, shares=shares
        )
        precisions, states = self._precisions(importance)
        head = vocabulary.any_head
        hidden = [each for each, _ in states]
        fisher = None if head is None else self.tables.head_fisher(head, hidden, hidden)
        return Plan(importance, precisions, fisher)

    def budget(self, plan: Plan, bits: float) -> BitBudget:
        """Return what spreads ``bits`` a weight over all layers and tables without bits of their own."""
        few, layers = self.recipe.has_few_components(bits), self.layers.every()

        def rate(name: str) -> LayerRate:
            if name not in layers:
                return self.tables.rate(name, plan, few)
            layer = layers[name]
            g = plan.importance[name]
            scales = self.layers.scales(layer.weight, g, bits)
            weight, extra = in_units_of(scales, layer.weight), scale_bits(scales, layer.in_features)
            # An error e in w / s is one of s e in w.
            finer = 1.0 if scales is None else float((g @ scales.square().view(len(g), -1)).mean() / g.sum())
            values = self.recipe.components_of(name) if few else None
            return LayerRate.of(weight, finer * plan.precisions[name], extra, values)

        sizes = {name: layer.weight.numel() for name, layer in layers.items()} | self.tables.sizes()
        waiting = {name: size for name, size in sizes.items() if self.recipe.bits_of(name) is None}
        return BitBudget(self.shares.ranks.dealt(waiting, rate), bits)

    def _precisions(self, importance: Mapping[str, Tensor]) -> tuple[dict[str, float], States]:
        """Return the mean precision of layers' weights with the original network's inputs, and its last states."""
        found: dict[str, float] = {}
        first = 0
        for number, stack in enumerate(self.stacks):
            # Of compressed layers there are none yet: this is a forecast.
            inside, states = self._stack_precisions(stack, first, self.entrance(number), importance)
            found |= inside
            first += len(stack)
        dealt = dict(itertools.chain.from_iterable(each.items() for each in self.shares.ranks.gathered(found)))
        return {name: dealt[name] for name in self.layers.every()}, states

    def _tokens(self, states: States) -> list[list[int]]:
        """Return how many tokens the minibatches have, of each unit of all ranks."""
        own = [math.prod(hidden.shape[:-1]) for hidden, _ in states]
        every = self.shares.ranks.gathered([own[part] for part in self.shares.parts])
        return list(itertools.chain.from_iterable(every))

    def _stack_precisions(
        self, stack: BlockStack, first_block: int, states: States, importance: Mapping[str, Tensor]
    ) -> tuple[dict[str, float], States]:
        """Return the same of one stack, of the layers that are this rank's."""
        found: dict[str, float] = {}
        tokens, size = self._tokens(states), self.shares.ranks.size
        dealt: list[tuple[int, dict[str, nn.Linear], Tensor]] = []
        for i, block in enumerate(stack.blocks, first_block):
            for number, group in enumerate(self.layers.groups(i, block)):
                first = next(iter(group.values()))
                some, share = _enough(tokens, first.in_features)
                curvature = self.shares.sum(partial(_moments, i, block, first, states, some))
                curvature /= share  # of all inputs, as the coding will have it
                # A curvature for each rank in turn, and for another one in the next block: one of a block is wide.
                if (i + number) % size == self.shares.ranks.rank:
                    dealt.append((i, group, curvature))
            # Of as many blocks as ranks, so that all have as much to do before they wait for each other.
            if (i + 1) % size == 0 or block is stack.blocks[-1]:
                for own in dealt:
                    found |= self._precision(*own, importance)
                dealt.clear()
            states = behind(advance(block, states, i), states)
        return found, states

    def _precision(
        self, i: int, group: Mapping[str, nn.Linear], curvature: Tensor, importance: Mapping[str, Tensor]
    ) -> dict[str, float]:
        inside = self.layers.likelihoods(i, group, curvature, importance)
        return {self.layers.path(i, name): own.mean_precision for name, own in inside.items()}


def _moments(i: int, block: nn.Module, layer: nn.Module, states: States, each: int, part: slice) -> Tensor:
    """Return ``Σ x xᵀ`` of a layer's inputs in the first minibatches of a unit, ``each`` of them."""
    some = states[part][:each]
    seen = (input_of(layer, block, hidden, arguments[i]) for hidden, arguments in some)
    return input_moments((x, x) for x in seen)[1]


def _enough(tokens: Sequence[Sequence[int]], inputs: int) -> tuple[int, float]:
    """Return how many minibatches of each unit are enough for a layer of so many inputs, their first ones.

    Args:
        tokens: of each unit's minibatches.
        inputs: M.

    Returns:
        how many, and their share of all tokens.
    """
    most = max(map(len, tokens))
    reached = [sum(sum(unit[:each]) for unit in tokens) for each in range(1, most + 1)]
    each = next((n for n, total in enumerate(reached, 1) if total >= TOKENS_AN_INPUT * inputs), most)
    return each, reached[each - 1] / reached[-1]
