"""Layouts with codes of a fixed number of bits: ``dense`` and ``bitmap``."""

from collections.abc import Iterator

import torch
from torch import Tensor

from sqs_pyro.packing.bits import pack_bits, packed_size, unpack_range
from sqs_pyro.packing.coded import CodedTensor
from sqs_pyro.packing.layouts import Layout, PackedTensor, Structure, code_bits, register_layout


@register_layout
class DenseLayout(Layout):
    """One code for every weight; symbol 0 is zero where any weight is zero, the codebook comes after it."""

    name = "dense"

    def bits(self, num_components: int, has_zeros: bool) -> int:
        """Return ceil(log2(symbols)), at least 1."""
        # One value and no zero would take 0 bits, a width that the bit-packing does not know.
        return max(1, code_bits(num_components + has_zeros))

    def part_sizes(self, packed: Structure) -> dict[str, int | None]:
        """Return the bytes of one code a weight."""
        return {"codes": packed_size(packed.numel, packed.bits)}

    def pack_parts(self, coded: CodedTensor, bits: int) -> dict[str, Tensor]:
        """Write one symbol a weight."""
        mask = coded.mask.reshape(-1)
        has_zeros = not bool(mask.all())
        # Symbol 0 is zero, k + 1 is code k; without zeros k is code k. 256 codes and zero do not get here.
        return {"codes": pack_bits((coded.codes.reshape(-1) + has_zeros).mul_(mask), bits)}

    def unpack_codes(self, packed: PackedTensor) -> tuple[Tensor, Tensor]:
        """Read one symbol a weight."""
        return next(self.unpack_pieces(packed, packed.numel))

    def unpack_pieces(self, packed: PackedTensor, size: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Read the symbols of a piece after the other: they stand side by side."""
        for start in range(0, packed.numel, size):
            count = min(size, packed.numel - start)
            symbols = unpack_range(packed.parts["codes"], packed.bits, packed.numel, start, count)
            # No symbol is spent on a zero that does not occur: symbols are the codes themselves.
            if packed.nonzeros == packed.numel:
                yield symbols, torch.ones(count, dtype=torch.bool)
            else:
                mask = symbols != 0
                yield symbols.sub_(mask.to(torch.uint8)), mask


@register_layout
class BitmapLayout(Layout):
    """A mask of one bit a weight, and one code for every weight that is not zero.

    With K = 1 there is nothing to tell apart: codes of 0 bits, no bytes.
    """

    name = "bitmap"

    def bits(self, num_components: int, has_zeros: bool) -> int:
        """Return ceil(log2(K)): zero has no code."""
        return code_bits(num_components)

    def part_sizes(self, packed: Structure) -> dict[str, int | None]:
        """Return the bytes of one bit a weight, and of one code a non-zero."""
        return {"mask": packed_size(packed.numel, 1), "codes": packed_size(packed.nonzeros, packed.bits)}

    def pack_parts(self, coded: CodedTensor, bits: int) -> dict[str, Tensor]:
        """Write the mask, then the non-zeros' codes in order."""
        mask = coded.mask.reshape(-1)
        codes = pack_bits(coded.codes.reshape(-1)[mask], bits) if bits else torch.empty(0, dtype=torch.uint8)
        return {"mask": pack_bits(mask.to(torch.uint8), 1), "codes": codes}

    def unpack_codes(self, packed: PackedTensor) -> tuple[Tensor, Tensor]:
        """Read the mask, then put the codes where it is set."""
        return next(self.unpack_pieces(packed, packed.numel))

    def unpack_pieces(self, packed: PackedTensor, size: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Read the mask of a piece after the other, and as many codes as it has non-zeros."""
        before = 0  # non-zeros of the pieces so far
        for start in range(0, packed.numel, size):
            count = min(size, packed.numel - start)
            mask = unpack_range(packed.parts["mask"], 1, packed.numel, start, count).bool()
            codes = torch.zeros(count, dtype=torch.uint8)  # zeros have code 0
            nonzeros = int(torch.count_nonzero(mask))
            if packed.bits and before + nonzeros <= packed.nonzeros:  # the caller reports it if not
                codes[mask] = unpack_range(packed.parts["codes"], packed.bits, packed.nonzeros, before, nonzeros)
            before += nonzeros
            yield codes, mask
