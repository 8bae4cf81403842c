"""Layout ``conditional``: several draws of one tensor, each symbol coded given the first draw's symbol.

Draws of a posterior agree in most weights, so that the first tells nearly all of the others. The draws are the
tensor's last dimension: weight i of draw s stands at ``[i, s]``. For storage only, like ``entropy``.
"""

from typing import Any

import constriction
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from sqs_pyro.errors import PackedFileError
from sqs_pyro.packing.coded import CodedTensor
from sqs_pyro.packing.entropy import frequencies, open_stream, stream_bytes
from sqs_pyro.packing.layouts import Layout, PackedTensor, Structure, register_layout

_CHUNK = 1 << 20  # symbols coded at once

Bytes = NDArray[np.uint8]
Symbols = NDArray[np.uint16]


@register_layout
class ConditionalLayout(Layout):
    """Entropy-coded symbols of A kinds: the first draw's under one table, the others' under one a first symbol."""

    name = "conditional"
    # Of one network it is `entropy` with a longer table; `pack_draws` asks for it by name.
    automatic = False

    def bits(self, num_components: int, has_zeros: bool) -> int:
        """Return 0: symbols have no fixed width."""
        return 0

    def part_sizes(self, packed: Structure) -> dict[str, int | None]:
        """Return ``[A]`` bytes of the first draw's table and, of several draws, ``[A, A]`` of the others'."""
        symbols = packed.num_components + (packed.nonzeros < packed.numel)
        rows = 1 if packed.shape[-1] == 1 else 1 + symbols
        return {"table": rows * symbols, "codes": None}

    def pack_parts(self, coded: CodedTensor, bits: int) -> dict[str, Tensor]:
        """Count, quantise the counts, encode under what the decoder will see."""
        mask = coded.mask.reshape(-1, coded.shape[-1]).numpy()  # [weights, S]
        has_zeros = not mask.all()
        symbols = coded.codes.reshape(mask.shape).numpy().astype(np.uint16)  # 257 symbols do not fit into 8 bits
        symbols += mask & has_zeros  # a zero has code 0
        kinds = coded.num_components + has_zeros
        # One block of the first draws, then one for each kind that these can be: all the other draws of such
        # weights.
        first = symbols[:, 0]
        # Draws agree on most weights: given the first one's symbol, the others' have little entropy.
        blocks = [first, *(symbols[first == kind, 1:].reshape(-1) for kind in range(kinds))]
        blocks = blocks[: 1 if mask.shape[1] == 1 else None]
        tables = np.stack([_table(block, kinds) for block in blocks])  # [1 + A, A]
        coder = constriction.stream.stack.AnsCoder()
        for block, table in zip(
            reversed(blocks), reversed(tables), strict=True
        ):  # a stack: the last decodes first
            _push(coder, block, table)
        return {"table": torch.from_numpy(tables.reshape(-1)), "codes": torch.from_numpy(stream_bytes(coder))}

    def unpack_codes(self, packed: PackedTensor) -> tuple[Tensor, Tensor]:
        """Decode the first draw, which says how the others decode."""
        draws, has_zeros = packed.shape[-1], packed.nonzeros < packed.numel
        kinds = packed.num_components + has_zeros
        tables = packed.parts["table"].cpu().numpy().reshape(-1, kinds)  # [1 + A, A], or [1, A] of one draw
        coder = open_stream(packed.parts["codes"])
        symbols = np.empty((packed.numel // draws, draws), dtype=np.uint16)
        # The first draw decodes on its own; it then says which weights each of the other blocks is of.
        first = symbols[:, 0] = _pull(coder, len(symbols), tables[0])
        for kind in range(kinds if draws > 1 else 0):
            rows = np.flatnonzero(first == kind)
            block = _pull(coder, len(rows) * (draws - 1), tables[1 + kind])
            symbols[rows, 1:] = block.reshape(-1, draws - 1)  # [rows, S - 1]
        if not coder.is_empty():
            raise PackedFileError("the entropy-coded stream goes on behind the last weight")
        mask = symbols != 0 if has_zeros else np.ones_like(symbols, dtype=np.bool_)
        # The last kind of 257 is code 255, so that the subtraction comes before the cast.
        codes = (symbols - (mask & has_zeros)).astype(np.uint8)
        return torch.from_numpy(codes.reshape(-1)), torch.from_numpy(mask.reshape(-1))


def _table(symbols: Symbols, kinds: int) -> Bytes:
    """Return a byte for every kind of symbol: 0 where it does not occur, else one more than the count's byte."""
    # Kinds that do not occur get probability 0, unlike in `entropy`: given the first draw, most do not.
    counts = np.bincount(symbols, minlength=kinds)
    return np.where(counts, np.round(8 * np.log2(np.maximum(counts, 1))) + 1, 0).astype(np.uint8)


def _model(table: Bytes) -> Any:
    # The 1 that told "occurs" is taken off again: the bytes then mean what they do in `entropy`.
    weights = np.where(table, frequencies(table - (table > 0)), 0.0)
    return constriction.stream.model.Categorical(weights.astype(np.float32), perfect=False)


def _push(coder: Any, symbols: Symbols, table: Bytes) -> None:
    """Put symbols onto the stack; a table of one kind says them all."""
    if np.count_nonzero(table) > 1:
        model = _model(table)
        for start in reversed(range(0, len(symbols), _CHUNK)):
            coder.encode_reverse(symbols[start : start + _CHUNK].astype(np.int32), model)


def _pull(coder: Any, count: int, table: Bytes) -> Symbols:
    """Take ``count`` symbols from the stack."""
    kinds = np.flatnonzero(table)
    if count and not kinds.size:
        raise PackedFileError("a table of frequencies is empty, but symbols are coded under it")
    # As in `_push`: what one kind says is not in the stream.
    if kinds.size <= 1:
        return np.full(count, kinds[0] if kinds.size else 0, dtype=np.uint16)
    model = _model(table)
    parts = [coder.decode(model, min(_CHUNK, count - start)) for start in range(0, count, _CHUNK)]
    return np.concatenate(parts).astype(np.uint16) if parts else np.empty(0, dtype=np.uint16)
