"""What blockwise compression keeps on disk: a plan, finished blocks and what is beside them, to go on from."""

from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from torch import Tensor

from sqs_pyro.compression.blockwise.token_fisher import HeadFisher
from sqs_pyro.compression.checkpoint import check_same, read_checkpoint, write_checkpoint
from sqs_pyro.fingerprint import Fingerprint
from sqs_pyro.packing import CodedTensor
from sqs_pyro.ranks import ALONE, Ranks


@dataclass(frozen=True)
class BlockRecord:
    """What became of a block.

    Attributes:
        block: its number, from 0.
        bits: bits a weight of its compressed layers, as forecast for the file; None: all are left uncompressed.
        error: mean over tokens of the squared error of its output, relative to the output; what the blocks before
            it lost included.
        layers: of each layer, by name: ``bits``, ``beta``, and ``error``, the relative error of its outputs.
        seconds: it took.
    """

    block: int
    bits: float | None
    error: float
    layers: dict[str, dict[str, float]]
    seconds: float


@dataclass(frozen=True)
class TableRecord:
    """What became of an embedding or a head.

    Attributes:
        name: its path in the network.
        bits: bits a weight, as forecast for the file.
        beta: β.
        error: what its rows lose of what they give, by the likelihood: of a head relative to no logits at all.
        seconds: it took.
    """

    name: str
    bits: float
    beta: float
    error: float
    seconds: float


@dataclass(frozen=True, eq=False)
class Plan:
    """What the original network says before anything is compressed.

    Attributes:
        importance: of each layer's outputs by name, ``[N]``; of an embedding's ``[D, D]``.
        precisions: mean precision of each layer's weights by name, scales left out; of the blocks' layers only.
        head: of the head that is compressed, tied or not, if there is one.
    """

    importance: dict[str, Tensor]
    precisions: dict[str, float]
    head: HeadFisher | None = None


@dataclass(frozen=True, eq=False)
class FinishedBlock:
    """A block that is compressed; names are those of its own parameters.

    Attributes:
        coded: compressed weights.
        leftovers: all its other parameters, as they are shipped.
        record: what is told of it.
    """

    coded: dict[str, CodedTensor]
    leftovers: dict[str, Tensor]
    record: BlockRecord


@dataclass(frozen=True, eq=False)
class FinishedTable:
    """An embedding or a head that is compressed: its weight, and what is told of it."""

    coded: CodedTensor
    record: TableRecord


@dataclass(frozen=True)
class FinishRecord:
    """What became of the last steps, of the whole network.

    Attributes:
        steps: of SVI.
        before: mean divergence of the compressed network from the original one, nats an example, on calibration
            data that was not learned from.
        after: the same behind the steps, as it ships.
        seconds: they took, without those of earlier, interrupted calls.
    """

    steps: int
    before: float
    after: float
    seconds: float


class BlockStore:
    """Plan and finished blocks on disk, one file each, written whole or not at all.

    Args:
        directory: where to; None keeps nothing.
        fingerprint: of the call at hand; what another one kept is refused.
        planned: where the plan is, and the fingerprint of all calls that share it; as the blocks if left out.
        finished: fingerprint of the call with its last steps, which come behind blocks that calls share; as the
            blocks' if left out.
        ranks: that read plan, blocks and tables together: what the first has kept is told to all of them.
    """

    def __init__(
        self,
        directory: Path | None,
        fingerprint: Fingerprint,
        planned: tuple[Path, Fingerprint] | None = None,
        finished: Fingerprint | None = None,
        ranks: Ranks = ALONE,
    ) -> None:
        self.directory, self.fingerprint, self.ranks = directory, fingerprint, ranks
        self.planned = planned or (directory, fingerprint)
        self.finished = finished or fingerprint

    def read_plan(self) -> Plan | None:
        """Return the plan of an interrupted run, or None; errors as :meth:`read`."""
        state = self.ranks.from_rank(_read(*self.planned, "plan", {"importance", "precisions", "head"}))
        if state is None:
            return None
        head = state["head"]
        return Plan(state["importance"], state["precisions"], None if head is None else HeadFisher(**head))

    def write_plan(self, plan: Plan) -> None:
        """Keep the plan."""
        head = None if plan.head is None else _parts(plan.head)
        state = {"importance": plan.importance, "precisions": plan.precisions, "head": head}
        _write(*self.planned, "plan", state)

    def read(self, i: int) -> FinishedBlock | None:
        """Return a finished block, or None.

        Raises:
            NetworkError: it is damaged, or was made of another network.
            DataError, RecipeError: it was made with other data, or another recipe.
        """
        state = self._read(f"block-{i:03d}", {"coded", "leftovers", "record"})
        if state is None:
            return None
        coded = {name: CodedTensor(**parts) for name, parts in state["coded"].items()}
        return FinishedBlock(coded, state["leftovers"], BlockRecord(**state["record"]))

    def write(self, i: int, block: FinishedBlock) -> None:
        """Keep a finished block."""
        coded = {name: _parts(value) for name, value in block.coded.items()}
        state = {"coded": coded, "leftovers": block.leftovers, "record": asdict(block.record)}
        self._write(f"block-{i:03d}", state)

    def read_table(self, part: str) -> FinishedTable | None:
        """Return the finished ``"embedding"`` or ``"head"``, or None; errors as :meth:`read`."""
        state = self._read(part, {"coded", "record"})
        if state is None:
            return None
        return FinishedTable(CodedTensor(**state["coded"]), TableRecord(**state["record"]))

    def write_table(self, part: str, table: FinishedTable) -> None:
        """Keep a finished ``"embedding"`` or ``"head"``."""
        self._write(part, {"coded": _parts(table.coded), "record": asdict(table.record)})

    def read_finish(self) -> dict[str, Any] | None:
        """Return the state of interrupted last steps, or None; errors as :meth:`read`."""
        return _read(self.directory, self.finished, "finish", {"step", "values", "optimizer"})

    def write_finish(self, state: dict[str, Any]) -> None:
        """Keep the state of the last steps."""
        _write(self.directory, self.finished, "finish", state)

    def _read(self, name: str, keys: set[str]) -> dict[str, Any] | None:
        return self.ranks.from_rank(_read(self.directory, self.fingerprint, name, keys))

    def _write(self, name: str, state: dict[str, Any]) -> None:
        _write(self.directory, self.fingerprint, name, state)


def _read(directory: Path | None, fingerprint: Fingerprint, name: str, keys: set[str]) -> dict[str, Any] | None:
    if directory is None or not (path := directory / f"{name}.pt").exists():
        return None
    state = read_checkpoint(path, frozenset(keys | {"fingerprint"}))
    check_same(state["fingerprint"], fingerprint, path)  # each file by itself: directories get mixed
    return state


def _write(directory: Path | None, fingerprint: Fingerprint, name: str, state: dict[str, Any]) -> None:
    if directory is not None:
        write_checkpoint(directory / f"{name}.pt", {"fingerprint": fingerprint, **state})


def _parts(value: CodedTensor | HeadFisher) -> dict[str, Any]:
    """Return fields by name; `asdict` would copy every tensor. Plain data, so that reading executes nothing."""
    return {field.name: getattr(value, field.name) for field in fields(value)}
