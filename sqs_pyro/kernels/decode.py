"""Run-time form of a packed weight, and its decoded copy, made once and kept while the packed one lives.

At run time a weight is ``codes`` (uint8, bit-packed), ``table`` (uint8 ``[G, 4·S]``, the bytes of float32
``[G, S]``, so that casting a network to half precision leaves it alone), in the bitmap form ``mask`` (uint8, one
bit a weight), and for out-channels with scales ``scales`` (uint8 ``[4·N]``, the bytes of float32 ``[N]``), or for
B parts of each (uint8 ``[N, 2·B]``, the bytes of float16 ``[N, B]``, of which there are many). In the dense form
zero is an entry of the table like any other. The forms of the CPU kernels are the dense one with its codes in
another order: ``tiled`` (:mod:`sqs_pyro.kernels.tiled`) or ``rows`` (:mod:`sqs_pyro.kernels.rows`).
"""

import math
import weakref
from collections.abc import Callable, Hashable
from typing import NamedTuple

import torch
from torch import Tensor
from torch._functorch.pyfunctorch import temporarily_clear_interpreter_stack
from torch.utils.weak import WeakIdKeyDictionary, WeakTensorKeyDictionary

from sqs_pyro.errors import NetworkError
from sqs_pyro.isolation import lasting_tensors
from sqs_pyro.kernels.rows import pack_rows, unpack_rows
from sqs_pyro.kernels.tiled import pack_tiles, unpack_tiles
from sqs_pyro.packing.bits import unpack_bits
from sqs_pyro.packing.coded import look_up, scaled

#: Forms of CPU kernels: what writes symbols in their order, and what reads them.
TRANSCODERS = {"tiled": (pack_tiles, unpack_tiles), "rows": (pack_rows, unpack_rows)}


class PackedArgs(NamedTuple):
    """A packed weight as the custom ops take it.

    Attributes:
        codes: uint8, ``bits`` bits for every weight, or in the bitmap form for every non-zero.
        table: uint8 ``[G, 4·S]``, float32 bytes; its entries are numbered by the codes.
        mask: uint8, one bit a weight, in the bitmap form; else None.
        shape: of the weight.
        bits: 0..8; 0 where all codes are 0.
        scales: uint8, float32 bytes of each out-channel's scale ``[4·N]``, or float16 bytes of those of its parts
            ``[N, 2·B]``, or None.
        form: ``"dense"``, ``"bitmap"``, ``"tiled"`` or ``"rows"``.
    """

    codes: Tensor
    table: Tensor
    mask: Tensor | None
    shape: tuple[int, ...]
    bits: int
    scales: Tensor | None = None
    form: str = "dense"

    def buffers(self) -> list[Tensor]:
        """Return the tensors."""
        return [t for t in (self.codes, self.table, self.mask, self.scales) if t is not None]


class DecodedWeights:
    """Decoded weights by the ``codes`` tensor they come from.

    An entry goes when its ``codes`` tensor dies (moving a module makes new ones), and is renewed when one of
    the packed tensors was replaced or written to (``load_state_dict`` writes in place).
    """

    def __init__(self) -> None:
        # A value must not hold its key, or it never goes
        self._entries: WeakIdKeyDictionary = WeakTensorKeyDictionary()

    def get(self, packed: PackedArgs, dtype: torch.dtype) -> Tensor:
        """Return the weights in ``dtype``, on the device of the codes: shared, so never to be written to."""
        return self.kept(packed, dtype, lambda packed: decode(packed).to(dtype))

    def kept(self, packed: PackedArgs, key: Hashable, make: Callable[[PackedArgs], Tensor]) -> Tensor:
        """Return ``make(packed)``, kept under ``key`` as decoded weights are under their dtype."""
        found = self.find(packed, key)
        if found is None:
            # Another entry where the weight has changed: copies of what it was go all at once, whatever their
            # keys.
            entry = self._entries.get(packed.codes)
            if entry is None or not entry.holds(packed):
                entry = self._entries[packed.codes] = _Entry(packed)
            # The copy outlives modes and transforms of the call.
            with lasting_tensors(), torch.no_grad(), temporarily_clear_interpreter_stack():
                # Two threads may come here at once and make it twice: both results are right, and one of them
                # stays.
                found = entry.copies[key] = make(packed)
        return found

    def find(self, packed: PackedArgs, key: Hashable) -> Tensor | None:
        """Return what is kept under ``key``, or None."""
        entry = self._entries.get(packed.codes)
        return entry.copies.get(key) if entry is not None and entry.holds(packed) else None

    def forget(self, codes: Tensor) -> None:
        """Drop the decoded copies of ``codes``, if there are any."""
        self._entries.pop(codes, None)

    def num_bytes(self, codes: Tensor) -> int:
        """Return what the decoded copies of ``codes`` take."""
        entry = self._entries.get(codes)
        return 0 if entry is None else sum(copy.nbytes for copy in entry.copies.values())

    def __len__(self) -> int:
        return len(self._entries)


class Unchanged:
    """Tells whether a packed weight is still what it was: the same tensors, none of them written to.

    Keeps no packed tensor alive.
    """

    def __init__(self, packed: PackedArgs) -> None:
        # Identity and version: a new tensor may have an old one's id or version, but not its weak reference.
        self._buffers = [weakref.ref(buffer) for buffer in packed.buffers()]
        self._state = _state(packed)

    def holds(self, packed: PackedArgs) -> bool:
        """Return whether nothing has changed since."""
        same = all(ref() is buffer for ref, buffer in zip(self._buffers, packed.buffers(), strict=False))
        return same and self._state == _state(packed)


class _Entry(Unchanged):
    """What is derived from one weight, copies by dtype among it."""

    def __init__(self, packed: PackedArgs) -> None:
        super().__init__(packed)
        self.copies: dict[Hashable, Tensor] = {}


def _state(packed: PackedArgs) -> tuple[object, ...]:
    """Return shape, bits and what was written to the buffers; inference tensors do not count their versions."""
    # Asking an inference tensor for its version raises; what loads a state dict says so itself (`forget`).
    versions = [-1 if buffer.is_inference() else buffer._version for buffer in packed.buffers()]
    return packed.shape, packed.bits, packed.form, *versions


decoded_weights = DecodedWeights()


def decode(packed: PackedArgs) -> Tensor:
    """Decode a weight, float32 ``[*shape]``, on the device of the codes."""
    if packed.codes.is_meta:
        raise NetworkError(
            "The packed weights are on the meta device, which holds no values: load the network with "
            "sqs_pyro.load, or use to_empty and load_state_dict."
        )
    symbols, keep = read_symbols(packed)  # [numel]
    table = read_table(packed)  # [G, S]
    values = look_up(table, symbols.view(table.shape[0], -1)).view(packed.shape)  # [G, n] -> [*shape]
    values = scaled(values, read_scales(packed))
    if keep is not None:
        values = torch.where(keep.view(packed.shape), values, values.new_zeros(()))  # not times the mask: no -0.0
    # Decoded on the CPU, by the one reference that every kernel is compared with, then moved.
    return values.to(packed.codes.device)


def read_symbols(packed: PackedArgs) -> tuple[Tensor, Tensor | None]:
    """Return every weight's place in the table, uint8 ``[numel]``; and the mask, bool, of a bitmap, else None."""
    numel, codes = math.prod(packed.shape), packed.codes.cpu()
    if packed.form in TRANSCODERS:
        return TRANSCODERS[packed.form][1](codes, packed.bits, packed.shape).view(-1), None
    if packed.mask is None:
        return unpack_bits(codes, packed.bits, numel), None
    keep = unpack_bits(packed.mask.cpu(), 1, numel).bool()
    symbols = torch.zeros(numel, dtype=torch.uint8)
    if packed.bits:
        symbols[keep] = unpack_bits(codes, packed.bits, int(keep.sum()))  # [nonzeros] into [numel]
    return symbols, keep


def read_table(packed: PackedArgs) -> Tensor:
    """Return the table's values, float32 ``[G, S]``, on the CPU."""
    # A clone is aligned: the bytes of a loaded table may begin anywhere.
    return packed.table.cpu().clone().view(torch.float32)


def read_scales(packed: PackedArgs) -> Tensor | None:
    """Return scales, float32 ``[N]`` or, of parts of out-channels, ``[N, B]``, on the CPU, or None."""
    if packed.scales is None:
        return None
    stored = packed.scales.cpu().clone()  # aligned, as a table's
    return stored.view(torch.float32) if stored.dim() == 1 else stored.view(torch.float16).float()


def write_scales(scales: Tensor | None) -> Tensor | None:
    """Return scales, ``[N]`` or ``[N, B]``, as :class:`PackedArgs` has them."""
    return None if scales is None else write_table(scales if scales.dim() == 1 else scales.half())


def write_table(values: Tensor) -> Tensor:
    """Return the bytes of numbers ``[..., S]``, of float32 uint8 ``[..., 4·S]``."""
    return values.contiguous().view(torch.uint8)
