"""How long blockwise compression is going to take on ranks: counts of its work over throughputs of a machine.

Work is counted from shapes, as :mod:`~sqs_pyro.compression.blockwise.blocks` does it. Some of it ranks divide
(gradients, calibration, coding, packing), some each of them has (an E-step's inputs, one after the other; factors
of the curvature; rounding and judging), and messages grow with their number. What is not counted: that one rank
waits for a slower one, and that ranks on one machine share its memory's bandwidth.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import nn

from sqs_pyro.compression.blockwise.activation_scales import TRIED
from sqs_pyro.compression.blockwise.file_size import bits_a_weight
from sqs_pyro.compression.blockwise.forecast import IMPORTANCE_BATCH, TOKENS_AN_INPUT
from sqs_pyro.compression.blockwise.machines import Machine
from sqs_pyro.compression.blockwise.recipe import ROUNDING, BlockwiseRecipe
from sqs_pyro.compression.blockwise.rounding import CLIPPED
from sqs_pyro.compression.blockwise.shares import largest_share, whole_layers
from sqs_pyro.compression.blockwise.vocabulary import vocabulary_of
from sqs_pyro.networks.architectures import architecture_of, block_paths, layer_groups
from sqs_pyro.networks.linear_form import in_linear_form
from sqs_pyro.ranks import Ranks, numbers_sent
from sqs_pyro.recipes import parse

_FLOAT = 4
#: Steps of conjugate gradients that codewords take, a mean: 8.6 of SmolLM2's layers.
_GRADIENT_STEPS = 9
#: Fits of a weight for which bits are asked: β is corrected once, usually.
_FITS = 2
#: Products of all rows with H of methods that round: half a one for GPTQ's chain, one for each α and each share of
#: clipping of AWQ, and two for the error that is told.
_ROUNDED = {"rtn": 2.0, "gptq": 2.5, "awq": 2.0 + TRIED + len(CLIPPED)}
#: Numbers that are gone through for each weight in a product by symbols, and in the look at the weights before.
_OF_PRODUCT, _OF_LOOK = 4, 4
#: The same for a logit of which a label is drawn and a gradient taken, and for one whose variance is summed up.
_DRAWN, _SAID = 28, 8
#: Operations on M³, in float64: a factor; a factor and its inverse, by eighths of the columns; the traces by which
#: a table that is read at both ends weighs its two curvatures, with the factor of their sum.
_FACTOR, _CONDITIONING, _TRACES = 1 / 3, 1 / 3 + 0.4, 1 / 3 + 4
#: Bytes of a weight in a checkpoint that is streamed.
_STORED = 2
#: Bytes that a weight is sent as by the rank that has coded all of its layer: its code, and whether it is zero.
_SENT = 2


@dataclass(frozen=True)
class Messages:
    """What a rank sends and receives.

    Attributes:
        number: of messages.
        summed: bytes that it sends for sums of moments.
        symbols: bytes that it receives of symbols.
        packed: bytes that it receives of packed weights.
    """

    number: int = 0
    summed: int = 0
    symbols: int = 0
    packed: int = 0

    def seconds(self, machine: Machine, ranks: int) -> float:
        """Return how long they take."""
        if ranks == 1:
            return 0.0
        way = machine.near if ranks <= machine.node else machine.far
        waits = self.number * (machine.latency + machine.hop * (ranks - 2))
        return waits + self.summed / way + (self.symbols + self.packed) / machine.symbols


@dataclass(frozen=True)
class TimePlan:
    """Seconds of the rank that has most to do.

    Attributes:
        gradients: importance of outputs; 0 with allocation `even`. Divided among ranks, as the next two.
        calibration: blocks at work, and moments of inputs.
        coding: of rows.
        packing: of weights.
        steps: of E-steps, one input after the other: of layers whose rows ranks divide the same on every rank.
        factors: of the curvature: the same on every rank, but those of the forecast.
        messages: between ranks.
        serial: rounding and judging of all parameters; reading, of a streamed checkpoint.
        sent: what messages there are.
    """

    gradients: float
    calibration: float
    coding: float
    packing: float
    steps: float
    factors: float
    messages: float
    serial: float
    sent: Messages

    @property
    def parts(self) -> dict[str, float]:
        """All of them by name."""
        return {each.name: getattr(self, each.name) for each in fields(self) if each.name != "sent"}

    @property
    def seconds(self) -> float:
        """All of it."""
        return sum(self.parts.values())

    @property
    def undivided(self) -> float:
        """What no number of ranks makes shorter, messages apart."""
        return self.steps + self.factors + self.serial


def plan_time(
    net: nn.Module,
    sequences: int,
    length: int,
    recipe: BlockwiseRecipe | Mapping[str, Any] | None,
    machine: Machine,
    *,
    streamed: bool = True,
    ranks: int = 1,
) -> TimePlan:
    """Return how long compression of a network takes, without `moving_steps`, `settle_steps` and `finish_steps`.

    Arguments and errors as of :func:`~sqs_pyro.compression.blockwise.memory_plan.plan_memory`, and what machine
    ranks run on.
    """
    recipe = parse(BlockwiseRecipe, recipe or {}, "blockwise")
    Ranks(0, ranks).check(recipe.units, "blockwise.units")
    with in_linear_form(net):
        counts = _Counts(net, sequences, length, recipe, streamed, ranks)
        sent = counts.messages()
        return TimePlan(
            gradients=counts.gradients(machine),
            calibration=counts.calibration(machine),
            coding=sum(each.coding(machine, recipe, ranks) for each in counts.weights),
            packing=counts.packing(machine),
            steps=machine.step * sum(each.steps(recipe, ranks) for each in counts.weights),
            factors=counts.factors / machine.doubles,
            messages=sent.seconds(machine, ranks),
            serial=counts.parameters / machine.parameters + counts.read / machine.reading,
            sent=sent,
        )


@dataclass(frozen=True)
class _Weight:
    """A matrix that is coded.

    Attributes:
        rows, inputs: N and M.
        by_bits: whether bits are asked for, so that β is looked for.
        fitted: whether it is fitted to other inputs first.
        whole: whether one rank codes all of it, and each other one a weight like it.
    """

    rows: int
    inputs: int
    by_bits: bool
    fitted: bool
    whole: bool = False

    @property
    def fits(self) -> int:
        return _FITS if self.by_bits else 1

    def chains(self, recipe: BlockwiseRecipe) -> int:
        """Return how often its inputs are gone through one after the other."""
        return self.fits * (1 + recipe.rounds) if recipe.method == "sqs" else int(recipe.method == "gptq")

    def steps(self, recipe: BlockwiseRecipe, ranks: int) -> float:
        """Return how many inputs a rank goes through one after the other."""
        return self.chains(recipe) * self.inputs / (ranks if self.whole else 1)

    def coding(self, machine: Machine, recipe: BlockwiseRecipe, ranks: int) -> float:
        """Return seconds of the rank that has most to do."""
        if self.whole:
            return replace(self, whole=False).coding(machine, recipe, 1) / ranks
        rounds, symbols = recipe.rounds, 1 + recipe.num_components
        steps = 0 if recipe.grid == "uniform" else _GRADIENT_STEPS
        own = largest_share(self.rows, recipe.units, ranks) * self.inputs
        # Of all rows with H: an E-step half of one, each further one half more, two for each size of an error.
        products = self.fits * (0.5 + 1.5 * rounds + (1 + rounds) * (2 + steps)) + 2
        # A unit of few rows reads all of H for them.
        units = -(-min(recipe.units, self.rows) // ranks)
        product = max(2 * own * self.inputs / machine.products, units * _FLOAT * self.inputs**2 / machine.memory)
        compared = self.chains(recipe) * symbols
        elements: float = self.fits * (1 + rounds) * _OF_PRODUCT * (3 + steps) + _OF_LOOK
        if recipe.method in ROUNDING:
            products = _ROUNDED[recipe.method]
            elements = _OF_PRODUCT * products
        numbers = own * (compared / machine.comparisons + elements / machine.elements)
        solved = 4 * own * self.inputs * self.fitted
        return products * product + numbers + solved / machine.doubles

    def sums(self, recipe: BlockwiseRecipe) -> float:
        """Return how many sums of a few numbers its coding takes."""
        if recipe.method in ROUNDING:
            return 2 + TRIED * (recipe.method == "awq")
        best = 1 if recipe.grid == "uniform" else 1 + _GRADIENT_STEPS
        # And once: the mean precision, a histogram of the weights, and two sizes of its error.
        return self.fits * (recipe.rounds + (1 + recipe.rounds) * best) + 4


class _Counts:
    """What there is to do, whatever does it."""

    def __init__(
        self, net: nn.Module, sequences: int, length: int, recipe: BlockwiseRecipe, streamed: bool, ranks: int
    ) -> None:
        config: Any = net.config
        self.recipe, self.streamed, self.ranks = recipe, streamed, ranks
        self.sequences, self.length, self.tokens = sequences, length, sequences * length
        self.width, self.logits = config.hidden_size, config.vocab_size
        self.important = recipe.allocation == "importance"
        self.parameters = sum(value.numel() for value in net.parameters())
        self.vocabulary = vocabulary_of(net, recipe).without_skipped(recipe)
        self.blocks = [_Block.of(net, path, recipe, 4 * length * self.width) for path in block_paths(net)]
        #: The layers' names and shapes in groups, each of which shares a curvature.
        self.groups = [dict(group) for block in self.blocks for _, group in block.groups]
        self.tables = {path: net.get_parameter(f"{path}.weight").shape for path in self.vocabulary.paths}
        wholes = {name for group in self.groups for name in whole_layers(group, ranks)}
        inside = {name: shape for group in self.groups for name, shape in group.items()}
        self.weights = [
            self._weight(*each, fitted=recipe.adapt_inputs, whole=each[0] in wholes) for each in inside.items()
        ]
        for path, shape in self.tables.items():
            head = path == self.vocabulary.head
            self.weights.append(self._weight(path, shape, last=head, fitted=head and recipe.adapt_inputs))
        # Tables are packed by each rank.
        self.packed_alone = sum(shape.numel() for shape in self.tables.values())
        self.packed = sum(shape.numel() for shape in inside.values())
        weights = {path: net.get_parameter(f"{path}.weight") for path in [*inside, *self.tables]}
        bits = bits_a_weight(net, weights, recipe)
        self.stored = sum(shape.numel() * (recipe.bits_of(name) or bits) for name, shape in inside.items()) / 8

    def _weight(
        self, path: str, shape: torch.Size, *, fitted: bool, last: bool = False, whole: bool = False
    ) -> _Weight:
        rows, inputs = shape
        by_bits = last or not self.important or self.recipe.bits_of(path) is not None
        return _Weight(rows, inputs, by_bits and self.recipe.method not in ROUNDING, fitted, whole)

    def packing(self, machine: Machine) -> float:
        """Return seconds of packing."""
        return (self.packed / self.ranks + self.packed_alone) / machine.packing

    @property
    def factors(self) -> float:
        """Operations of curvatures' factors: of each group of layers one, of the forecast one more."""
        inside = sum(next(iter(group.values()))[1] ** 3 for group in self.groups)
        if self.recipe.method in ROUNDING:
            chain = _CONDITIONING if self.recipe.method == "gptq" else 0.0
            solved = max(chain, _FACTOR * self.recipe.adapt_inputs)
            ends = sum(
                shape[1] ** 3 * (solved if path == self.vocabulary.head else chain)
                for path, shape in self.tables.items()
            )
            return inside * solved + ends
        # A rank has one block's in as many blocks as there are ranks.
        own = -(-len(self.blocks) // self.ranks) / len(self.blocks)
        tied = self.vocabulary.tied_head is not None
        each = _CONDITIONING + _FACTOR * self.important + _TRACES * tied * (1 + self.important)
        return inside * (_CONDITIONING + own * _FACTOR * self.important) + each * sum(
            shape[1] ** 3 for shape in self.tables.values()
        )

    @property
    def _share(self) -> float:
        """How much of the calibration the rank has that has most."""
        return largest_share(self._minibatches, self.recipe.units, self.ranks) / self._minibatches

    @property
    def _minibatches(self) -> int:
        return -(-self.sequences // self.recipe.batch_size)

    @property
    def _parts(self) -> int:
        """How many parts of minibatches gradients are taken of."""
        some = min(-(-self.recipe.importance_sequences // self.recipe.batch_size), self._minibatches)
        return some * -(-self.recipe.batch_size // IMPORTANCE_BATCH)

    @property
    def _heads(self) -> int:
        """How often it is summed up what a head says."""
        own, tied = self.vocabulary.head is not None, self.vocabulary.tied_head is not None
        return (own or tied) * self.important + own + (tied and not self.important)

    def gradients(self, machine: Machine) -> float:
        """Return seconds of the importance of outputs."""
        if not self.important:
            return 0.0
        share = largest_share(self._parts, self.recipe.units, self.ranks) / self._parts
        sequences = min(self._parts * min(IMPORTANCE_BATCH, self.recipe.batch_size), self.sequences)
        # Forward, and backward to outputs alone.
        products = 2 * (sum(block.whole for block in self.blocks) + 2 * self.logits * self.width)
        each = products / machine.products + _DRAWN * self.logits / machine.elements
        return share * sequences * self.length * each

    def calibration(self, machine: Machine) -> float:
        """Return seconds of blocks at work, and of moments; of a head what it says."""
        sides = 1 + (self.recipe.adapt_inputs or self.recipe.method == "awq")
        tied_alone = not self.important and self.vocabulary.tied_head is not None
        each = 0.0
        for block in self.blocks:
            # The original and the finished block; and for the forecast, or for a tied head, the original.
            each += (2 + (self.important or tied_alone)) * block.whole
            for before, group in block.groups:
                inputs = group[0][1][1]
                taken = before + 2 * inputs**2  # one of the two moments
                each += sides * taken + self.important * min(1.0, TOKENS_AN_INPUT * inputs / self.tokens) * taken
        seconds = each / machine.products
        said = (2 * self.logits * self.width + 4 * self.width**2) / machine.products
        seconds += self._heads * (said + _SAID * self.logits / machine.elements)
        return self._share * self.tokens * seconds

    @property
    def read(self) -> int:
        """Bytes of a streamed checkpoint: for its fingerprint, for a tied head, and while blocks are at work."""
        return self.streamed * _STORED * self.parameters * (2 + (self.vocabulary.tied_head is not None))

    def messages(self) -> Messages:
        """Return what a rank sends and receives; without what it says once a call, and of how long a step took."""
        if self.ranks == 1:
            return Messages()
        large = list(self._large_sums())
        summed = sum(size * numbers_sent(numbers, units, self.ranks) for numbers, size, units in large)
        # And errors of blocks; numbers of gradients, and of places behind a head.
        divided = [each for each in self.weights if not each.whole]
        small = sum(each.sums(self.recipe) for each in divided) + len(self.blocks)
        small += self.important + self._heads
        symbols = sum(each.fits * each.rows * each.inputs for each in divided)
        symbols += _SENT * sum(each.rows * each.inputs for each in self.weights if each.whole)
        # Of a sum a slice is sent, and then what it comes to; of a weight the largest, and its symbols, unless one
        # rank has all of it; of a block whether to stop, and what is packed.
        gathered = sum(1 + each.fits for each in divided) + 2 * len(self.blocks)
        gathered += sum(bool(whole_layers(group, self.ranks)) for group in self.groups)
        return Messages(round(small) + gathered + 2 * len(large), summed, symbols, round(self.stored))

    def _large_sums(self) -> Iterator[tuple[int, int, int]]:
        """Yield numbers, bytes of each, and units of each sum of moments or squared gradients."""
        units, parts = min(self.recipe.units, self._minibatches), min(self.recipe.units, self._parts)
        for block in self.blocks:
            for _, group in block.groups:
                moments = group[0][1][1] ** 2
                times = 1 + self.recipe.adapt_inputs + (self.recipe.method == "awq") + self.important
                yield from [(moments, _FLOAT, units)] * times
                if self.important:
                    yield from ((shape[0], _FLOAT, parts) for _, shape in group)
        if self.important and self.vocabulary.embedding is not None:
            yield self.width**2, _FLOAT, parts
        for _ in range(self._heads):
            yield self.logits, 2 * _FLOAT, units
            yield from [(self.width**2, _FLOAT, units)] * 2


@dataclass(frozen=True)
class _Block:
    """Operations a token of a block: of all of it, and before each group of layers that are coded.

    Attributes:
        whole: all.
        groups: what is before it, and the layers' names and shapes.
    """

    whole: int
    groups: list[tuple[int, list[tuple[str, torch.Size]]]]

    @classmethod
    def of(cls, net: nn.Module, path: str, recipe: BlockwiseRecipe, attention: int) -> "_Block":
        """Count: products with weights, and attention, behind the first group of layers."""
        before, groups = 0, []
        for number, group in enumerate(layer_groups(net.get_submodule(path), architecture_of(net))):
            shapes = [(f"{path}.{name}", layer.weight.shape) for name, layer in group.items()]
            coded = [each for each in shapes if not recipe.skips(each[0])]
            groups += [(before, coded)] if coded else []
            before += sum(2 * shape.numel() for _, shape in shapes) + (attention if number == 0 else 0)
        return cls(before, groups)
