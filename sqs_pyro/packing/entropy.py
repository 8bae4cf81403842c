"""Layout ``entropy``: one stream of symbols {zero, code 0, .. code K-1} under their empirical frequencies.

For storage only: it decodes at load. The coder is the asymmetric numeral system of `constriction`; the
frequencies cost one byte a symbol, which is why a tensor's size stays within a fraction of a per cent of
its entropy.
"""

from collections.abc import Iterator
from typing import Any

import constriction
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from sqs_pyro.errors import PackedFileError
from sqs_pyro.packing.coded import CodedTensor, count_codes
from sqs_pyro.packing.layouts import Layout, PackedTensor, Structure, register_layout

_STEPS = 8  # frequencies are kept to 1/8 of an octave: costs about 0.0005 bit a weight
# Of the eight steps within an octave, as 16-bit integers.
_FRACTIONS = np.round(2.0**15 * 2.0 ** (np.arange(_STEPS) / _STEPS))  # whole numbers: the same on every machine
_CHUNK = 1 << 18  # weights at once: int32 symbols of a whole layer would not fit into the cache

Bytes = NDArray[np.uint8]
Bits = NDArray[np.bool_]


@register_layout
class EntropyLayout(Layout):
    """Entropy-coded symbols: 0 is zero where any weight is zero, the codebook comes after it."""

    name = "entropy"

    def bits(self, num_components: int, has_zeros: bool) -> int:
        """Return 0: symbols have no fixed width."""
        return 0

    def part_sizes(self, packed: Structure) -> dict[str, int | None]:
        """Return a byte for every symbol; no bytes at all where there is only one."""
        symbols = _num_symbols(packed)
        return {"table": 0, "codes": 0} if symbols == 1 else {"table": symbols, "codes": None}

    def pack_parts(self, coded: CodedTensor, bits: int) -> dict[str, Tensor]:
        """Count, quantise the counts, encode under what the decoder will see."""
        return self.pack_again(coded, bits, _count(coded))

    def pack_again(self, coded: CodedTensor, bits: int, table: Tensor | None) -> dict[str, Tensor]:
        """Encode under the table that is known, or that counting gives."""
        table = _count(coded) if table is None else table
        if not table.numel():  # one symbol
            return {"table": table, "codes": torch.empty(0, dtype=torch.uint8)}
        has_zeros = coded.nonzeros < coded.mask.numel()
        mask = coded.mask.reshape(-1).numpy() if has_zeros else None
        stream = _encode(coded.codes.reshape(-1).numpy(), mask, table.numpy())
        return {"table": table, "codes": torch.from_numpy(stream)}

    def unpack_codes(self, packed: PackedTensor) -> tuple[Tensor, Tensor]:
        """Decode the symbols and tell zeros from codes."""
        codes, mask = (torch.empty(packed.numel, dtype=dtype) for dtype in (torch.uint8, torch.bool))
        # Into one tensor chunk by chunk: int32 symbols of all would take four times as much.
        pieces = self.unpack_pieces(packed, _CHUNK)
        for some_codes, some_mask, (piece, kept) in zip(
            codes.split(_CHUNK), mask.split(_CHUNK), pieces, strict=True
        ):
            some_codes.copy_(piece)
            some_mask.copy_(kept)
        return codes, mask

    def unpack_pieces(self, packed: PackedTensor, size: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Decode a piece of the stream after the other."""
        counts = [min(size, packed.numel - start) for start in range(0, packed.numel, size)]
        if _num_symbols(packed) == 1:
            for count in counts:
                yield torch.zeros(count, dtype=torch.uint8), torch.full((count,), packed.nonzeros > 0)
            return
        coder = open_stream(packed.parts["codes"])
        model = categorical(packed.parts["table"].cpu().numpy())
        has_zeros = packed.nonzeros < packed.numel
        for count in counts:
            symbols = coder.decode(model, count)  # int32
            mask = symbols != 0 if has_zeros else np.ones(count, dtype=np.bool_)
            codes = symbols.astype(np.uint8)  # modulo 256
            if has_zeros:
                codes -= mask  # symbol 256, of 257, is code 255
            yield torch.from_numpy(codes), torch.from_numpy(mask)
        # Else any number of files would decode to these weights.
        if not coder.is_empty():
            raise PackedFileError("the entropy-coded stream goes on behind the last weight")


def _count(coded: CodedTensor) -> Tensor:
    """Return the table, uint8 ``[symbols]``: 8 log2 of each count; empty if there is one symbol."""
    codes, mask = coded.codes.reshape(1, -1), coded.mask.reshape(1, -1)
    counts = count_codes(codes, mask, coded.num_components)[0]  # [K]
    zeros = mask.numel() - coded.nonzeros
    if zeros:
        counts = torch.cat([torch.tensor([zeros]), counts])  # [1 + K]
    # A single symbol has no entropy: neither table nor stream, the counts in the manifest say all.
    if torch.count_nonzero(counts) == 1:
        return torch.empty(0, dtype=torch.uint8)
    return frequency_bytes(counts)


def frequency_bytes(counts: Tensor) -> Tensor:
    """Return counts as a table's bytes, uint8: 8 log2 of each."""
    # A byte reaches counts of 2^31.9, 4 billion weights; a count of 0 is taken for 1.
    return torch.from_numpy(np.round(_STEPS * np.log2(counts.clamp_min(1).numpy())).astype(np.uint8))


def _num_symbols(packed: Structure) -> int:
    """Return the number of symbols of the alphabet; of a tensor of zeros, just the zero."""
    has_zeros = packed.nonzeros < packed.numel
    # A tensor of zeros still has K = 1, of which no weight makes use.
    return packed.num_components + has_zeros if packed.nonzeros else 1


def frequencies(table: Bytes) -> NDArray[np.float64]:
    """Return what the bytes of a table stand for, up to a common factor."""
    return _FRACTIONS[table % _STEPS] * 2.0 ** (table // _STEPS)  # 2^(byte / 8), the octave exactly


def stream_bytes(coder: Any) -> Bytes:
    """Return the coded stream: little-endian words without trailing zeros, which :func:`open_stream` puts back."""
    stream = coder.get_compressed().astype("<u4").tobytes().rstrip(b"\0")
    return np.frombuffer(stream, dtype=np.uint8).copy()


def open_stream(stream: Tensor) -> Any:
    """Return the decoder of a stream, uint8 ``[bytes]``.

    Raises:
        PackedFileError: no coder has written it.
    """
    # The zeros that were cut off end at a whole 4-byte word.
    words = np.zeros(-(-stream.numel() // 4), dtype="<u4")
    words.view(np.uint8)[: stream.numel()] = stream.cpu().numpy()
    try:
        # Copied by the coder, and not twice before: the stream of an embedding is a fifth of a network's file.
        return constriction.stream.stack.AnsCoder(words.astype(np.uint32, copy=False))
    except ValueError as error:
        raise PackedFileError(f"the entropy-coded stream is damaged ({error})") from None


def categorical(table: Bytes) -> Any:
    """Return the coder's model of the frequencies that a table says."""
    # Its fast rounding to fixed point, perfect=False, is part of the format: a decoder must round alike.
    return constriction.stream.model.Categorical(frequencies(table).astype(np.float32), perfect=False)


def _encode(codes: Bytes, mask: Bits | None, table: Bytes) -> Bytes:
    """Return the stream of codes [n], which are symbols where ``mask`` [n] is None: no weight is zero."""
    coder, model = constriction.stream.stack.AnsCoder(), categorical(table)
    for start in reversed(range(0, len(codes), _CHUNK)):  # a stack: what is encoded last decodes first
        part = slice(start, start + _CHUNK)
        symbols = codes[part].astype(np.int32)  # [chunk], as constriction takes them
        if mask is not None:
            symbols += mask[part]  # a zero has code 0
        coder.encode_reverse(symbols, model)
    return stream_bytes(coder)
