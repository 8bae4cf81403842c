"""One block compressed: its layers in groups, each from the inputs that the groups before it give as they ship.

Ranks share it twice over: each runs the block on minibatches of its own, and then codes small layers of its own,
where there are as many of one shape as ranks, and rows of its own of every other layer, so that a layer alone in
its group is shared, too. Behind each group every rank has the same student.
"""

import copy
import time
from collections.abc import Iterable, Mapping
from dataclasses import replace

import torch
from torch import Tensor, nn

from sqs_pyro.compression.blockwise.activation_scales import activation_moments, fold, input_scales
from sqs_pyro.compression.blockwise.block_layers import BlockLayers
from sqs_pyro.compression.blockwise.coded_weight import coded_weight
from sqs_pyro.compression.blockwise.laplace import LayerLikelihood, input_moments
from sqs_pyro.compression.blockwise.recipe import ROUNDING
from sqs_pyro.compression.blockwise.rounding import rounded_weight
from sqs_pyro.compression.blockwise.shares import Shares, whole_layers
from sqs_pyro.compression.blockwise.states import States, advance
from sqs_pyro.compression.blockwise.store import BlockRecord, FinishedBlock
from sqs_pyro.compression.blockwise.training import relative_error, settle
from sqs_pyro.errors import NetworkError
from sqs_pyro.networks.block_stack import input_of, run_block
from sqs_pyro.networks.calling import device_of
from sqs_pyro.packing import CodedTensor
from sqs_pyro.packing.leftovers import round_to
from sqs_pyro.ranks import ALONE, Ranks, owners_of

_FOLDED = 0.03  # of a block's output: what it may change by where numbers of bfloat16 are multiplied by scales


class BlockCoder:
    """Compresses the blocks of a network, one at a time.

    Args:
        layers: those that are compressed.
        importance: of layers' outputs ``[N]``, by the layers' names in the network; 1 where there is none.
        bits: a weight, of layers without bits of their own where no β is given.
        shares: the minibatches of the calibration.
    """

    def __init__(self, layers: BlockLayers, importance: Mapping[str, Tensor], bits: float, shares: Shares) -> None:
        self.layers, self.importance, self.bits, self.shares = layers, importance, bits, shares
        self.recipe = layers.recipe

    def compress(
        self, i: int, original: States, compressed: States, targets: list[Tensor], beta: float | None
    ) -> tuple[FinishedBlock, list[Tensor]]:
        """Return block i as it ships, and the hidden states behind it; all ranks call it together.

        Args:
            i: the block's number.
            original: hidden states before it in the original network, of this rank's minibatches, as all below.
            compressed: those that the blocks compressed so far give.
            targets: hidden states behind the original block.
            beta: β of its layers; None gives each ``bits``.
        """
        start = time.perf_counter()
        # The student is coded layer by layer; a later group's inputs come through its earlier, coded layers.
        teacher = self.layers.blocks[i]
        student = copy.deepcopy(teacher)
        if self.recipe.method == "awq":
            self._scale_inputs(i, teacher, student, original)
        coded: dict[str, CodedTensor] = {}
        figures: dict[str, dict[str, float]] = {}
        for before, group in zip(self.layers.groups(i, teacher), self.layers.groups(i, student), strict=True):
            likelihoods = self._likelihoods(i, (teacher, before, original), (student, group, compressed))
            for name, (weight, row) in self._coded(i, before, likelihoods, beta).items():
                coded[f"{name}.weight"], figures[name] = weight, row
                # As float16 codewords will have it: the next group's inputs come through it.
                group[name].weight.copy_(weight.dense().to(group[name].weight))
        if (self.recipe.moving_steps or self.recipe.settle_steps) and coded:
            coded = self._settled(i, student, coded, compressed, targets)
            _put(student, {name: value.dense() for name, value in coded.items()})
        leftovers = {
            name: round_to(value.detach(), self.recipe.leftover_dtype)
            for name, value in student.named_parameters()
            if name not in coded
        }
        # The error is of the block as it ships, rounded leftovers included.
        _put(student, leftovers)
        finished = FinishedBlock(coded, leftovers, BlockRecord(i, _mean_bits(coded, figures), 0.0, figures, 0.0))
        outputs = advance(student, compressed, i)
        error = relative_error(outputs, targets, self.shares)
        record = replace(finished.record, error=error, seconds=time.perf_counter() - start)
        return replace(finished, record=record), outputs

    def _coded(
        self,
        i: int,
        group: Mapping[str, nn.Linear],
        likelihoods: Mapping[str, LayerLikelihood],
        beta: float | None,
    ) -> dict[str, tuple[CodedTensor, dict[str, float]]]:
        """Return what is packed of each layer of a group, and figures of it.

        Args:
            i: the block's number.
            group: the layers, as they were.
            likelihoods: of those that this rank codes, or rows of.
            beta: β.
        """

        def code(name: str) -> tuple[CodedTensor, dict[str, float]]:
            return self._code(self.layers.path(i, name), group[name].weight, likelihoods[name], beta)

        found = {name: code(name) for name in likelihoods}
        if owners := self._owners(group):
            own = {name: found[name] for name in owners if name in found}
            found |= self.shares.ranks.every(own, owners)
        return {name: found[name] for name in group}

    def _owners(self, group: Mapping[str, nn.Linear]) -> dict[str, int]:
        """Return which rank codes a layer, of those that one codes as a whole."""
        shapes = {name: (layer.out_features, layer.in_features) for name, layer in group.items()}
        size = self.shares.ranks.size
        return owners_of(dict.fromkeys(whole_layers(shapes, size), 1.0), size)

    def _code(
        self, path: str, weight: Tensor, own: LayerLikelihood, beta: float | None
    ) -> tuple[CodedTensor, dict[str, float]]:
        asked, values = self.recipe.bits_of(path), self.recipe.components_of(path)
        if self.recipe.method in ROUNDING:
            return rounded_weight(own, self.recipe.method, values, self.recipe.group_size)
        # Of the weight as it was, so that the forecast and the coding take the same scales; by the precisions of
        # inputs, which the forecast has none of, where values are few or groups have scales.
        g, precisions = self._importance(path, weight), own.factors.precisions
        scales = self.layers.scales(weight, g, asked or self.bits, precisions)
        if asked is not None or beta is None:
            bits = asked or self.bits
            return coded_weight(own, scales, self.recipe, bits=bits, beta=None, max_components=values)
        return coded_weight(own, scales, self.recipe, bits=None, beta=beta, max_components=values)

    def _scale_inputs(self, i: int, teacher: nn.Module, student: nn.Module, original: States) -> None:
        """Bring a block to units of inputs in which rounding loses least, in place; it says the same as before."""
        for before, group, compressed in self.layers.preceded(i, teacher):
            inputs = (input_of(group[compressed[0]], teacher, x, arguments[i]) for x, arguments in original)
            sizes, curvature = activation_moments(inputs, self.shares)
            layers = []
            for name in compressed:
                weight = group[name].weight.float()
                every = LayerLikelihood(weight, curvature, torch.ones(len(weight)).to(curvature))
                values = self.recipe.components_of(self.layers.path(i, name))
                layers.append((every.of_rows(self._rows(weight, self.shares.ranks)), values))
            scales = input_scales(sizes, layers, self.recipe.group_size)
            fold(scales, student.get_submodule(before), [student.get_submodule(name) for name in group])
        for hidden, arguments in original[:1]:
            expected, found = (run_block(block, hidden, arguments[i]) for block in (teacher, student))
            if float((found - expected).norm()) > _FOLDED * float(expected.norm()):
                raise NetworkError(
                    f"Block '{self.layers.paths[i]}' does not say the same with scales of inputs folded into what "
                    "its architecture calls preceding: correct the architecture, or take method gptq or rtn."
                )

    def _likelihoods(self, i: int, before: "_Side", now: "_Side") -> dict[str, LayerLikelihood]:
        """Return those of a group of layers, which share their input: one pass for all of them.

        A layer that another rank codes as a whole has none here.
        """
        (teacher, originals, original), (student, group, compressed) = before, now
        first, coded_next = next(iter(originals.values())), next(iter(group.values()))

        def pairs() -> Iterable[tuple[Tensor, Tensor]]:
            for (hidden, arguments), (seen, others) in zip(original, compressed, strict=True):
                x = input_of(coded_next, student, seen, others[i])
                yield (input_of(first, teacher, hidden, arguments[i]) if self.recipe.adapt_inputs else x), x

        cross, curvature = input_moments(pairs(), self.shares)  # E x xₛᵀ and E xₛ xₛᵀ, [M, M]
        found, owners, ranks = {}, self._owners(group), self.shares.ranks
        for name, every in self.layers.likelihoods(i, group, curvature, self.importance).items():
            if owners.get(name, ranks.rank) != ranks.rank:
                continue
            own = every.of_rows(self._rows(every.mean, ALONE if name in owners else ranks))
            if self.recipe.adapt_inputs:
                ridge = own.curvature - curvature  # pulls towards the weight itself
                own = own.given_inputs(cross + ridge, own.curvature)
            found[name] = own
        return found

    def _rows(self, weight: Tensor, ranks: Ranks) -> Shares:
        return Shares(len(weight), self.recipe.units, ranks)

    def _importance(self, path: str, weight: Tensor) -> Tensor:
        """Return how much each output of a layer matters, ``[N]``."""
        return self.importance.get(path, torch.ones(len(weight))).to(weight.device)

    def _settled(
        self,
        i: int,
        student: nn.Module,
        coded: Mapping[str, CodedTensor],
        compressed: States,
        targets: list[Tensor],
    ) -> dict[str, CodedTensor]:
        """Let the block settle, in place, and return the coded weights: each rank makes every step."""
        pairs = zip(compressed, targets, strict=True)
        inputs = [(hidden, arguments[i], target) for (hidden, arguments), target in pairs]
        # A seed for each block, so that one that goes on from kept blocks draws as it would have drawn.
        minibatches = self.shares.everywhere(inputs, device_of(student))
        settled = settle(student, coded, minibatches, self.recipe, self.recipe.seed + i)
        # One rank's, as a minibatch that was sent may lie elsewhere in memory than one that was computed.
        values = [value.detach().cpu() for value in student.parameters()]
        found, values = self.shares.ranks.from_rank((settled, values))
        for parameter, value in zip(student.parameters(), values, strict=True):
            parameter.copy_(value)
        return found


#: A block, layers in it that share their input, and the hidden states before it.
_Side = tuple[nn.Module, Mapping[str, nn.Linear], States]


def shipped(block: nn.Module, finished: FinishedBlock) -> nn.Module:
    """Return a copy of a block as it is shipped, dense."""
    student = copy.deepcopy(block)
    dense = {name: value.dense() for name, value in finished.coded.items()}
    _put(student, {**dense, **finished.leftovers})  # everything that a block has
    return student


def _put(block: nn.Module, values: Mapping[str, Tensor]) -> None:
    for name, value in values.items():
        block.get_parameter(name).copy_(value)


def _mean_bits(coded: Mapping[str, CodedTensor], figures: Mapping[str, Mapping[str, float]]) -> float | None:
    """Return each layer's bits by how many weights have them, not a mean of layers; None of no layer."""
    weights = {name.removesuffix(".weight"): value.mask.numel() for name, value in coded.items()}
    if not weights:
        return None
    return sum(figures[name]["bits"] * count for name, count in weights.items()) / sum(weights.values())
