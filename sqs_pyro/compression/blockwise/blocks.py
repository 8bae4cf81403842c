"""Compression block after block, each from what the compressed blocks before it hand on.

For each block in turn, and in it for each group of layers that share their input, in the order of their calls:

1. The inputs x of the original network and x' of the network compressed so far give the curvature ``Σ x' x'ᵀ`` of
   the layers' likelihood and its mean (:mod:`~sqs_pyro.compression.blockwise.laplace`).
2. E- and M-steps choose symbols and codewords at β (:mod:`~sqs_pyro.compression.blockwise.sequential_coding`).

Then codebooks, norms and biases of the block settle by SVI (:mod:`~sqs_pyro.compression.blockwise.training`), and
the finished block is kept: an interrupted run goes on behind it and ends in the same network.

An embedding comes before all blocks, a head of its own behind them
(:mod:`~sqs_pyro.compression.blockwise.vocabulary`).

On several ranks each has the hidden states of its own minibatches and codes rows of its own, see
:mod:`~sqs_pyro.compression.blockwise.shares`; all have the same blocks behind it, and the first one keeps them.
"""

import copy
import itertools
import math
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from sqs_pyro.compression.blockwise.bit_budget import BitBudget
from sqs_pyro.compression.blockwise.block_layers import BlockLayers, LayerGroups
from sqs_pyro.compression.blockwise.channel_scales import check_room_for_scales
from sqs_pyro.compression.blockwise.file_size import bits_a_weight
from sqs_pyro.compression.blockwise.finishing import finish
from sqs_pyro.compression.blockwise.forecast import Forecast
from sqs_pyro.compression.blockwise.one_block import BlockCoder, shipped
from sqs_pyro.compression.blockwise.recipe import (
    BEHIND_BLOCKS,
    ROUNDING,
    SIZE,
    WITHOUT_EFFECT,
    BlockwiseRecipe,
)
from sqs_pyro.compression.blockwise.shares import Shares
from sqs_pyro.compression.blockwise.states import States, advance, behind
from sqs_pyro.compression.blockwise.store import (
    BlockRecord,
    BlockStore,
    FinishedBlock,
    FinishedTable,
    FinishRecord,
    Plan,
    TableRecord,
)
from sqs_pyro.compression.blockwise.tables import Tables
from sqs_pyro.compression.blockwise.token_fisher import HeadFisher
from sqs_pyro.compression.blockwise.vocabulary import Vocabulary, counted_tokens, rows_of
from sqs_pyro.compression.layers import check_layers
from sqs_pyro.compression.together import check_same_call, stopping_together
from sqs_pyro.errors import NetworkError, RecipeError
from sqs_pyro.fingerprint import (
    Fingerprint,
    described,
    fingerprint,
)
from sqs_pyro.inference.diagnostics import uncompressed
from sqs_pyro.inference.findings import Finding, finding, unrepeatable
from sqs_pyro.kernels import packed_network
from sqs_pyro.kernels.decode import decode
from sqs_pyro.kernels.weight import PackedWeight
from sqs_pyro.models.likelihoods import categorical_last
from sqs_pyro.models.observation import Likelihood
from sqs_pyro.networks.block_stack import BlockArguments, BlockStack, called_as
from sqs_pyro.networks.calling import device_of, move_to, split_examples
from sqs_pyro.networks.coverage import coverage
from sqs_pyro.networks.residency import InMemory, Residency, resident_fingerprint
from sqs_pyro.packing import CodedTensor, size_report
from sqs_pyro.packing.layouts import PackedTensor, pack_tensor
from sqs_pyro.packing.leftovers import round_leftovers
from sqs_pyro.packing.stored import check_storable, stored_weights
from sqs_pyro.ranks import ranks
from sqs_pyro.reporting.printed import Printed, Report
from sqs_pyro.shipping.agreement import check_agreement

#: Bits a weight that are missed without a word.
_UNSPENT = 0.1


@dataclass(frozen=True, eq=False, repr=False)
class BlockwiseResult(Printed):
    """What blockwise compression leaves; it prints itself in short.

    Attributes:
        network: the packed network.
        records: of each block.
        seconds: of the whole, without what earlier, interrupted calls took.
        vocabulary: records of embedding and head, if they are compressed.
        findings: what of the network is not compressed, if it is a good part.
        finish: record of the last steps, if there were any and they were taken.
    """

    network: nn.Module
    records: list[BlockRecord]
    seconds: float
    findings: list[Finding] = field(default_factory=list)
    vocabulary: list[TableRecord] = field(default_factory=list)
    finish: FinishRecord | None = None

    def table(self) -> Report:
        """Return a table of a row a block, and what the file weighs."""
        from sqs_pyro.reporting.tables import block_tables

        return block_tables(
            {
                "vocabulary": [asdict(record) for record in self.vocabulary],
                "blocks": [asdict(record) for record in self.records],
                "finish": None if self.finish is None else asdict(self.finish),
                "size": size_report(self.network).to_dict(),
                "seconds": self.seconds,
            }
        )


def compress_blocks(
    net: nn.Module,
    blocks: Sequence[nn.Module],
    layer_groups: LayerGroups,
    minibatches: Iterable[Any],
    recipe: BlockwiseRecipe,
    *,
    likelihood: Likelihood = categorical_last,
    stacks: Sequence[int] | None = None,
    stepped_over: bool = True,
    directory: str | Path | None = None,
    plan_directory: str | Path | None = None,
    residency: Residency | None = None,
    progress: Callable[[BlockRecord], None] | None = None,
    finishing: Callable[[int, int, float], None] | None = None,
    metadata: Mapping[str, Any] | None = None,
    vocabulary: Vocabulary | None = None,
    preceding: Mapping[str, str] | None = None,
) -> BlockwiseResult:
    """Compress the linear layers of a network's blocks, and embedding and head if asked to, from calibration data.

    Where torch.distributed has been started all ranks call this with the same arguments, and return the same
    network; the first one writes to the directories and tells of progress.

    Args:
        net: the network; it stays as it is.
        blocks: its blocks, see :class:`~sqs_pyro.networks.block_stack.BlockStack`.
        layer_groups: the layers to compress in a block.
        minibatches: inputs of the network; no labels.
        recipe: what to do.
        likelihood: of the network's output, for ``allocation: importance``.
        stacks: how many of the blocks belong to each of several stacks, such as an encoder and a decoder, none of
            which feeds one before it; all to one if left out.
        stepped_over: see :class:`~sqs_pyro.networks.block_stack.BlockStack`.
        directory: where finished blocks are kept, to go on from.
        plan_directory: where gradients are kept, for calls that differ in their size alone; as blocks if left out.
        residency: which weights are in memory; all of them if left out.
        progress: told of each finished block.
        finishing: told of each of the last steps: done, all of them, and nats an example between the networks.
        metadata: written into the packed file.
        vocabulary: embedding and head to compress, too, of a network of one stack; none if left out.
        preceding: of some layers' names in a block, what gives them their input, for ``method: awq``, see
            :attr:`~sqs_pyro.networks.architecture.Architecture.preceded`.

    Returns:
        The packed network and a record of each block.

    Raises:
        NetworkError, DataError, RecipeError, OutputError: one sentence; what was finished before stays in
            ``directory``.
        RankError: another rank has ended.
    """
    start, here = time.perf_counter(), ranks()
    here.check(recipe.units, "blockwise.units")
    residency = residency or InMemory()
    _check_allocation(net, recipe, residency)
    check_storable(net)
    ends = list(itertools.accumulate(stacks or [len(blocks)]))
    parts = [BlockStack(net, blocks[a:b], stepped_over=stepped_over) for a, b in itertools.pairwise([0, *ends])]
    if len(parts) > 1 and vocabulary is not None and vocabulary.paths:
        raise NetworkError(
            f"{type(net).__name__} has {len(parts)} stacks of blocks, but {', '.join(vocabulary.paths)} can be "
            "compressed of a network of one only: leave out vocabulary."
        )
    places = (directory, plan_directory) if here.leads else (None, None)
    kept, planned = (None if place is None else Path(place) for place in places)
    run = _Run(
        net,
        parts,
        layer_groups,
        list(minibatches),
        recipe,
        likelihood,
        kept,
        planned,
        residency,
        vocabulary or Vocabulary(),
        preceding or {},
    )
    with torch.no_grad():
        records = run.compress(progress if here.leads else None)
        finished_by = run.finish(finishing) if recipe.finish_steps else None
    findings = [*run.findings, *uncompressed(coverage(net, run.packed))]
    with residency.held(net, without=blocks):
        finished = run.finished_network()
        packed = packed_network(
            finished,
            run.packed,
            layout=recipe.layout,
            leftover_dtype=None,
            metadata=metadata,
        )
        if residency.whole:  # a streamed network cannot be called in one piece
            findings += run.compare(finished, packed)
    seconds = time.perf_counter() - start
    return BlockwiseResult(packed, records, seconds, findings, run.table_records, finished_by)


class _Run:
    """The state of one call: what is coded, and the hidden states of the original and the compressed network."""

    def __init__(
        self,
        net: nn.Module,
        stacks: list[BlockStack],
        layer_groups: LayerGroups,
        minibatches: list[Any],
        recipe: BlockwiseRecipe,
        likelihood: Likelihood,
        directory: Path | None,
        plan_directory: Path | None,
        residency: Residency,
        vocabulary: Vocabulary,
        preceding: Mapping[str, str],
    ) -> None:
        if recipe.method == "awq" and not preceding:
            raise RecipeError(
                f"Recipe key 'blockwise.method' is 'awq', but of {type(net).__name__} it is not known what stands "
                "before its layers and could take scales of their inputs: take 'gptq' or 'rtn', or register an "
                "architecture that says what is preceding."
            )
        self.net, self.stacks = net, stacks
        self.blocks = [block for stack in stacks for block in stack.blocks]
        self.minibatches, self.recipe, self.likelihood = minibatches, recipe, likelihood
        self.residency, self.ranks = residency, ranks()
        self.shares = Shares(len(minibatches), recipe.units, self.ranks)
        paths = {id(module): path for path, module in net.named_modules()}  # blocks are told by identity
        self.layers = BlockLayers(
            self.blocks, [paths[id(block)] for block in self.blocks], layer_groups, recipe, preceding
        )
        check_layers(recipe.layers, [*self.layers.every(skipped=True), *vocabulary.paths], "blockwise.layers")
        self.vocabulary = vocabulary = vocabulary.without_skipped(recipe)
        chosen = [*self.layers.every(), *vocabulary.paths]
        self.bits = bits_a_weight(net, {name: net.get_parameter(f"{name}.weight") for name in chosen}, recipe)
        inputs = {name: net.get_parameter(f"{name}.weight").shape[1] for name in chosen}
        by_bits = recipe.allocation == "even" and recipe.method not in ROUNDING
        shared = self.bits if by_bits else None
        bits = {name: recipe.bits_of(name) or shared for name in chosen}
        if recipe.grid == "uniform":
            check_room_for_scales(inputs, bits)
        if recipe.group_size is not None:
            check_room_for_scales({name: inputs[name] for name in self.layers.every()}, bits, recipe.group_size)
        self.store = self._store(directory, plan_directory or directory)
        self.packed: dict[str, PackedTensor] = {}
        self.leftovers: dict[str, Tensor] = {}
        with residency.held(net, without=self.blocks):
            device = device_of(net)
            if device.type != "meta":  # of a streamed network, whose weights are the CPU's
                self.minibatches = [move_to(inputs, device) for inputs in minibatches]
        self.own = self.minibatches[self.shares.own]
        read = None if vocabulary.embedding is None else net.get_submodule(vocabulary.embedding)
        with nullcontext(torch.empty(0)) if read is None else counted_tokens(read) as counts:
            self.states = self._entrance(0)  # here, so that what cannot be called is told at once
        counts = sum(self.ranks.gathered(counts), torch.zeros(()))  # whole numbers: in any order
        if read is not None and not counts.any():
            raise NetworkError(
                f"{type(net).__name__} reads nothing from its embedding '{vocabulary.embedding}' for these "
                "inputs: leave it as it is with blockwise.embedding: false."
            )
        self.tables = Tables(stacks[-1], vocabulary, recipe, self.own, self.shares, counts)
        self.table_records: list[TableRecord] = []
        self.findings: list[Finding] = []

    def _entrance(self, number: int, students: Sequence[nn.Module] = ()) -> States:
        """Return what the first block of a stack is called with, and the other arguments of each of its blocks.

        Args:
            number: of the stack.
            students: what stands for the blocks of the stacks before it; the original blocks if left out.
        """
        first = self._first(number)
        with (
            self.residency.held(self.net, without=self.blocks),
            called_as(self.blocks[: len(students)], students),
        ):
            entrances = [self.stacks[number].entrance(inputs) for inputs in self.own]
        # Blocks are numbered through all stacks: of earlier ones there are no arguments here.
        earlier: list[BlockArguments] = [((), {})] * first
        return [(entrance.hidden, earlier + entrance.arguments) for entrance in entrances]

    def _first(self, number: int) -> int:
        return sum(map(len, self.stacks[:number]))

    def _store(self, directory: Path | None, plan_directory: Path | None) -> BlockStore:
        """Return what keeps finished work; of a streamed network every weight is read for its fingerprint once."""
        if plan_directory is None and self.ranks.size == 1:
            return BlockStore(None, {})
        # What fixes the size comes after the plan, the last steps behind the blocks.
        blocks = WITHOUT_EFFECT | BEHIND_BLOCKS
        whole, planned, finished = self._fingerprints(blocks, blocks | SIZE, WITHOUT_EFFECT)
        check_same_call(self.ranks, finished)
        place = None if plan_directory is None else (plan_directory, planned)
        return BlockStore(directory, whole, place, finished, self.ranks)

    def _fingerprints(self, *excluded: set[str]) -> list[Fingerprint]:
        """Return what this call is made of, of the recipe all but some keys."""
        network = resident_fingerprint(self.net, self.blocks, self.residency)
        data = {"minibatches": len(self.minibatches), "sequences": described(self.minibatches)}
        # Of patterns the later one counts: their order, too, decides what comes out.
        setting = {
            "likelihood": described(self.likelihood),
            "patterns": list(self.recipe.layers),
            "vocabulary": described(self.vocabulary.paths),
        }
        return [
            fingerprint(self.recipe.model_dump(mode="json", exclude=keys), network, data, setting)
            for keys in excluded
        ]

    def compress(self, progress: Callable[[BlockRecord], None] | None) -> list[BlockRecord]:
        plan, budget = None, None
        if self.recipe.allocation == "importance":
            plan, budget = self._forecast()
        coder = BlockCoder(self.layers, plan.importance if plan is not None else {}, self.bits, self.shares)
        records: list[BlockRecord] = []
        students: list[nn.Module] = []
        embedding = None if self.vocabulary.embedding is None else self._embedding(plan, budget)
        for number, stack in enumerate(self.stacks):
            # Two streams of hidden states run side by side: of the network as it was, and of what ships. What a
            # later stack is called with has come through the earlier ones.
            original = self._entrance(number) if number else list(self.states)
            compressed = self._entrance(number, students) if number else list(embedding or original)
            for i, block in enumerate(stack.blocks, self._first(number)):
                kept = self._step(i, block, original, compressed, coder, budget)
                records.append(kept.record)
                if number + 1 < len(self.stacks):
                    with self.residency.held(block):
                        students.append(shipped(block, kept))
                if progress is not None:
                    progress(kept.record)
        if self.vocabulary.head is not None:
            self._head([hidden for hidden, _ in original], [hidden for hidden, _ in compressed], budget)
        if budget is not None and self.recipe.has_few_components(self.bits) and budget.unspent > _UNSPENT:
            took, values = self.bits - budget.unspent, self.recipe.num_components
            self.findings.append(finding("few_values", None, took / self.bits, asked=self.bits, values=values))
        return records

    def _step(
        self,
        i: int,
        block: nn.Module,
        original: States,
        compressed: States,
        coder: BlockCoder,
        budget: BitBudget | None,
    ) -> FinishedBlock:
        """Compress a block, or read it, and take both streams of hidden states behind it, in place."""
        kept, outputs = self.store.read(i), None
        # Ctrl-C waits until a block is whole and on disk: minutes of work, and never half a file.
        with self.residency.held(block), stopping_together(self.ranks) if kept is None else nullcontext():
            targets = advance(block, original, i)  # what the block's outputs should be
            if kept is None:
                beta = budget.beta() if budget is not None and budget.waits else None
                kept, outputs = coder.compress(i, original, compressed, targets, beta)
                self.store.write(i, kept)
            self._note(i, kept, budget)  # kept blocks count, too: the budget goes on where it stopped
            if outputs is None:
                outputs = advance(shipped(block, kept), compressed, i)
        # Later blocks see, and make up for, the errors so far.
        original[:] = behind(targets, original)
        compressed[:] = behind(outputs, compressed)
        return kept

    def _forecast(self) -> tuple[Plan, BitBudget]:
        """Return how much layers' outputs matter, found now or by an earlier call, and what spreads the bits."""
        forecast = Forecast(
            self.stacks,
            self.layers,
            self.tables,
            lambda number: self._entrance(number) if number else self.states,
            self.shares,
        )
        plan = self.store.read_plan()
        if plan is None:  # kept before the first block, as gradients may take as long as several blocks
            plan = forecast.plan(self.minibatches, self.likelihood)
            self.store.write_plan(plan)
        return plan, forecast.budget(plan, self.bits)

    def _embedding(self, plan: Plan | None, budget: BitBudget | None) -> States:
        """Compress the embedding; return what reaches the blocks from it."""
        path, kept = str(self.vocabulary.embedding), self.store.read_table("embedding")
        head = plan.head if plan is not None else self._tied_head() if kept is None else None
        with self.residency.held(self.net, without=self.blocks):
            if kept is None:
                with stopping_together(self.ranks):
                    own = self.tables.embedding_likelihood(plan, head)
                    asked = self.recipe.bits_of(path)
                    by_bits = asked is not None or budget is None
                    kept = self.tables.code(
                        path,
                        own,
                        bits=(asked or self.bits) if by_bits else None,
                        beta=None if by_bits or budget is None else budget.beta(),
                    )
                    self.store.write_table("embedding", kept)
            self._note_table(path, kept, budget)
            module = self.net.get_submodule(path)
            rows = kept.coded.dense().to(device_of(module))
        with rows_of(module, rows):
            return self._entrance(0)

    def _tied_head(self) -> HeadFisher | None:
        """Return what the original network says of a tied head, which is needed before any block is compressed."""
        if self.vocabulary.tied_head is None:
            return None
        states = self.states
        for i, block in enumerate(self.blocks):
            with self.residency.held(block):  # of a streamed network every block is read once more for it
                outputs = advance(block, states, i)
            states = behind(outputs, states)
        with self.residency.held(self.net, without=self.blocks):
            hidden = [each for each, _ in states]
            return self.tables.head_fisher(self.vocabulary.tied_head, hidden, hidden)

    def _head(self, before: list[Tensor], after: list[Tensor], budget: BitBudget | None) -> None:
        """Compress a head of its own, for the hidden states that the compressed blocks give."""
        path, kept = str(self.vocabulary.head), self.store.read_table("head")
        if kept is None:
            with self.residency.held(self.net, without=self.blocks), stopping_together(self.ranks):
                own = self.tables.head_likelihood(before, after)
                asked = self.recipe.bits_of(path)
                # The last of all has what the others have left, so that what was asked for is met.
                kept = self.tables.code(
                    path, own, bits=asked or (self.bits if budget is None else budget.left), beta=None
                )
                self.store.write_table("head", kept)
        self._note_table(path, kept, budget)

    def _note_table(self, path: str, kept: FinishedTable, budget: BitBudget | None) -> None:
        name = f"{path}.weight"
        self.packed[name] = pack_tensor(kept.coded, self.recipe.layout)
        self.table_records.append(kept.record)
        if budget is not None and self.recipe.bits_of(path) is None:
            budget.spend(path, self._spent(name, kept.record.bits), kept.record.beta)

    def _pack(self, coded: Mapping[str, CodedTensor]) -> dict[str, PackedTensor]:
        """Return weights packed, each of them by one rank."""
        sizes = {name: value.mask.numel() for name, value in coded.items()}
        return self.ranks.dealt(sizes, lambda name: pack_tensor(coded[name], self.recipe.layout))

    def _spent(self, name: str, forecast: float) -> float:
        """Return bits a weight of a packed tensor: those in the file, where the file's size was asked for."""
        packed = self.packed[name]
        return forecast if self.recipe.megabytes is None else 8 * packed.num_bytes / math.prod(packed.shape)

    def _note(self, i: int, kept: FinishedBlock, budget: BitBudget | None) -> None:
        path = partial(self.layers.path, i)
        self.packed |= {path(name): value for name, value in self._pack(kept.coded).items()}
        self.leftovers |= {path(name): value for name, value in kept.leftovers.items()}
        if budget is not None:
            for name, layer in kept.record.layers.items():
                if self.recipe.bits_of(path(name)) is None:
                    # What this layer took beyond its forecast is taken off those to come.
                    budget.spend(path(name), self._spent(path(f"{name}.weight"), layer["bits"]), layer["beta"])

    def finish(self, told: Callable[[int, int, float], None] | None) -> FinishRecord | None:
        """Let codebooks, scales, norms and biases of all blocks learn together."""
        found = None
        if self.ranks.leads:  # a step takes two sequences: there is little to share
            student = self._with_weights(self.finished_network())
            layers = {f"{name}.weight" for name in self.layers.every()}
            coded = {name: value.unpack() for name, value in self.packed.items() if name in layers}
            found = finish(
                self.net, student, coded, self.minibatches, self.recipe, self.likelihood, self.store, told
            )
        found = self.ranks.from_rank(found)
        assert found is not None
        record = found.record
        if not record.after < record.before:
            worse = record.before / record.after
            self.findings.append(finding("not_finished", None, worse, steps=record.steps))
            return None
        self.packed |= self._pack(found.coded)
        self.leftovers |= found.leftovers
        return record

    def _with_weights(self, net: nn.Module) -> nn.Module:
        """Return a finished network with the coded weights in it, dense."""
        for name, weight in self.packed.items():
            net.get_parameter(name).copy_(weight.unpack().dense())
        return net

    def finished_network(self) -> nn.Module:
        """Return the network as it ships, but for its compressed weights: what has settled, all of it rounded."""
        net = copy.deepcopy(self.net)
        with torch.no_grad():
            for name, value in self.leftovers.items():
                place = net.get_parameter(name)
                if place.is_meta:  # the block has been let go
                    owner, _, own = name.rpartition(".")
                    settled = nn.Parameter(value.to(place.dtype, copy=True), requires_grad=place.requires_grad)
                    setattr(net.get_submodule(owner), own, settled)
                else:
                    place.copy_(value)
        round_leftovers(net, {*self.packed, *self.leftovers}, self.recipe.leftover_dtype)  # blocks' are by now
        return net

    @torch.no_grad()
    def compare(self, finished: nn.Module, packed: nn.Module) -> list[Finding]:
        """Check on one example that the packed network computes what ``finished`` does with decoded weights."""
        for name, weight in stored_weights(packed, every_name=True).items():
            if name in self.packed:  # of shared ones one name
                assert isinstance(weight, PackedWeight)
                finished.get_parameter(name).copy_(decode(weight.args))
        example = next(split_examples(self.minibatches[0], 1))  # enough to tell networks apart
        found = check_agreement(finished, packed, example)
        return [] if found is None else [unrepeatable(found.relative)]


def _check_allocation(net: nn.Module, recipe: BlockwiseRecipe, residency: Residency) -> None:
    if recipe.allocation == "importance" and not residency.whole:
        weights = sum(value.numel() * value.element_size() for value in net.parameters())
        raise NetworkError(
            "allocation 'importance' needs gradients through the whole network, whose weights alone take "
            f"{weights / 1e9:.2f} GB in memory: load it and call compress_transformer, or take allocation 'even'."
        )
