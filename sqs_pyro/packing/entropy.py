"""Layout ``entropy``: one stream of symbols {zero, code 0, .. code K-1} under their empirical frequencies.

For storage only: it decodes at load. The coder is the asymmetric numeral system of `constriction`; the
frequencies cost one byte a symbol, which is why a tensor's size stays within a fraction of a per cent of
its entropy.
"""

from typing import Any

import constriction
import numpy as np
import torch
from torch import Tensor

from sqs_pyro.errors import PackedFileError
from sqs_pyro.packing.coded import CodedTensor
from sqs_pyro.packing.layouts import Layout, PackedTensor, register_layout

_STEPS = 8  # frequencies are kept to 1/8 of an octave: costs about 0.0005 bit a weight
_FRACTIONS = np.round(2.0**15 * 2.0 ** (np.arange(_STEPS) / _STEPS))  # whole numbers: the same on every machine
_CHUNK = 1 << 22


@register_layout
class EntropyLayout(Layout):
    """Entropy-coded symbols: 0 is zero where any weight is zero, the codebook comes after it."""

    name = "entropy"

    def bits(self, num_components: int, has_zeros: bool) -> int:
        """0: symbols have no fixed width."""
        return 0

    def part_sizes(self, packed: PackedTensor) -> dict[str, int | None]:
        """A byte for every symbol; none at all where there is only one."""
        symbols = _num_symbols(packed)
        return {"table": 0, "codes": 0} if symbols == 1 else {"table": symbols, "codes": None}

    def pack_parts(self, coded: CodedTensor, bits: int) -> dict[str, Tensor]:
        """Count, quantise the counts, encode under what the decoder will see."""
        mask = coded.mask.reshape(-1)
        has_zeros = not bool(mask.all())
        symbols = coded.codes.reshape(-1).numpy().astype(np.uint16)
        symbols += has_zeros
        symbols *= mask.numpy()
        counts = np.bincount(symbols, minlength=coded.num_components + has_zeros)
        if np.count_nonzero(counts) == 1:
            return {"table": _empty(), "codes": _empty()}
        table = np.round(_STEPS * np.log2(np.maximum(counts, 1))).astype(np.uint8)
        stream = _encode(symbols, table).astype("<u4").tobytes()
        stream = stream.rstrip(b"\0")  # high bytes of the last word; the decoder puts them back
        codes = torch.from_numpy(np.frombuffer(stream, dtype=np.uint8).copy())
        return {"table": torch.from_numpy(table), "codes": codes}

    def unpack_codes(self, packed: PackedTensor) -> tuple[Tensor, Tensor]:
        """Decode the symbols and tell zeros from codes."""
        numel = packed.numel
        if _num_symbols(packed) == 1:
            mask = torch.full((numel,), packed.nonzeros > 0)
            return torch.zeros(numel, dtype=torch.uint8), mask
        symbols = _decode(packed)
        has_zeros = packed.nonzeros < numel
        nonzero = symbols != 0 if has_zeros else np.ones(numel, dtype=bool)
        symbols -= has_zeros & nonzero
        return torch.from_numpy(symbols.astype(np.uint8)), torch.from_numpy(nonzero)


def _num_symbols(packed: PackedTensor) -> int:
    """Number of symbols of the alphabet; of a tensor of zeros, just the zero."""
    has_zeros = packed.nonzeros < packed.numel
    return packed.num_components + has_zeros if packed.nonzeros else 1


def _model(table: np.ndarray) -> Any:
    frequencies = _FRACTIONS[table % _STEPS] * 2.0 ** (table // _STEPS)
    return constriction.stream.model.Categorical(frequencies.astype(np.float32), perfect=False)


def _encode(symbols: np.ndarray, table: np.ndarray) -> np.ndarray:
    coder, model = constriction.stream.stack.AnsCoder(), _model(table)
    for start in reversed(range(0, len(symbols), _CHUNK)):  # a stack: what is encoded last decodes first
        coder.encode_reverse(symbols[start : start + _CHUNK].astype(np.int32), model)
    return coder.get_compressed()


def _decode(packed: PackedTensor) -> np.ndarray:
    stream = packed.parts["codes"].cpu().numpy().tobytes()
    words = np.frombuffer(stream + bytes(-len(stream) % 4), dtype="<u4").astype(np.uint32)
    try:
        coder = constriction.stream.stack.AnsCoder(words)
    except ValueError as error:
        raise PackedFileError(f"the entropy-coded stream is damaged ({error})") from None
    model = _model(packed.parts["table"].cpu().numpy())
    symbols = np.empty(packed.numel, dtype=np.uint16)
    for start in range(0, packed.numel, _CHUNK):
        part = symbols[start : start + _CHUNK]
        part[:] = coder.decode(model, len(part))
    if not coder.is_empty():
        raise PackedFileError("the entropy-coded stream goes on behind the last weight")
    return symbols


def _empty() -> Tensor:
    return torch.empty(0, dtype=torch.uint8)
