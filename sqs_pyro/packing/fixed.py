"""Layouts with codes of a fixed number of bits: ``dense`` and ``bitmap``."""

import torch
from torch import Tensor

from sqs_pyro.packing.bits import pack_bits, packed_size, unpack_bits
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
        symbols = unpack_bits(packed.parts["codes"], packed.bits, packed.numel)
        # No symbol is spent on a zero that does not occur: symbols are the codes themselves.
        if packed.nonzeros == packed.numel:
            return symbols, torch.ones(packed.numel, dtype=torch.bool)
        mask = symbols != 0
        return symbols.sub_(mask.to(torch.uint8)), mask


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
        mask = unpack_bits(packed.parts["mask"], 1, packed.numel).bool()
        codes = torch.zeros(packed.numel, dtype=torch.uint8)  # [numel]; zeros have code 0
        if packed.bits and int(torch.count_nonzero(mask)) == packed.nonzeros:  # the caller reports it if not
            codes[mask] = unpack_bits(packed.parts["codes"], packed.bits, packed.nonzeros)
        return codes, mask
