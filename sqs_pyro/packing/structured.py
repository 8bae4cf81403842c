"""Layout ``structured``: zeros under the law of urns, then the codes of the others under their frequencies.

For storage only, like ``entropy``, and slower: every diagonal of the tensor waits for the one before. It pays
where zeros have structure, which training under the same law gives them.
"""

from typing import Any

import constriction
import numpy as np
import torch
from torch import Tensor

from sqs_pyro.errors import PackedFileError
from sqs_pyro.packing.coded import CodedTensor, count_codes
from sqs_pyro.packing.entropy import categorical, frequency_bytes, open_stream, stream_bytes
from sqs_pyro.packing.layouts import Layout, PackedTensor, Structure, register_layout
from sqs_pyro.packing.odds import UNIT, probabilities
from sqs_pyro.packing.urns import MIXING_BYTES, Urns, as_kernels, inclusion_before

_BERNOULLI = constriction.stream.model.Bernoulli(perfect=False)


@register_layout
class StructuredLayout(Layout):
    """Zeros by urns, codes by frequency: ``table`` has a byte for each code, then bias and weights of the urns."""

    name = "structured"
    # Its decoder takes a hundred times as long; whoever trains under its law asks for it.
    automatic = False

    def bits(self, num_components: int, has_zeros: bool) -> int:
        """Return 0: symbols have no fixed width."""
        return 0

    def part_sizes(self, packed: Structure) -> dict[str, int | None]:
        """Return the bytes of the table; no stream where only one symbol occurs."""
        codes, mixing = _table_bytes(packed.num_components, packed.nonzeros, packed.numel)
        return {"table": codes + mixing, "codes": None if codes + mixing else 0}

    def pack_parts(self, coded: CodedTensor, bits: int) -> dict[str, Tensor]:
        """Count codes, fit the urns, encode under what the decoder will see."""
        return self.pack_again(coded, bits, None)

    def pack_again(self, coded: CodedTensor, bits: int, table: Tensor | None) -> dict[str, Tensor]:
        """Encode under the table that is known, or that counting and fitting give."""
        codes, mixing = _table_bytes(coded.num_components, coded.nonzeros, coded.mask.numel())
        known = [None, None] if table is None else table.split([codes, mixing])
        coder, parts = constriction.stream.stack.AnsCoder(), []
        if codes:  # a stack: what is encoded last, the zeros, decodes first
            parts.append(_count(coded) if known[0] is None else known[0])
            symbols = coded.codes[coded.mask].numpy().astype(np.int32)
            coder.encode_reverse(symbols, categorical(parts[-1].numpy()))
        if mixing:
            parts.append(_push_zeros(coder, as_kernels(coded.mask), known[1]))
        return {
            "table": torch.cat(parts) if parts else torch.empty(0, dtype=torch.uint8),
            "codes": torch.from_numpy(stream_bytes(coder)),
        }

    def unpack_codes(self, packed: PackedTensor) -> tuple[Tensor, Tensor]:
        """Decode zeros diagonal by diagonal, then the codes of the others."""
        parts = _table_bytes(packed.num_components, packed.nonzeros, packed.numel)
        frequencies, mixing = packed.parts["table"].cpu().split(parts)
        coder = open_stream(packed.parts["codes"])
        mask = torch.full((packed.numel,), packed.nonzeros > 0)
        if len(mixing):
            shape = as_kernels(torch.empty(packed.shape, device="meta")).shape
            mask = _pull_zeros(coder, shape, packed.nonzeros, mixing)
        codes = torch.zeros(packed.numel, dtype=torch.uint8)
        if len(frequencies):
            symbols = coder.decode(categorical(frequencies.numpy()), int(mask.sum()))
            codes[mask] = torch.from_numpy(symbols.astype(np.uint8))
        if not coder.is_empty():
            raise PackedFileError("the entropy-coded stream goes on behind the last weight")
        return codes, mask


def _table_bytes(components: int, nonzeros: int, numel: int) -> tuple[int, int]:
    """Return the bytes of the codes' frequencies and of the urns' mixing: none of what is known beforehand."""
    return components if components > 1 and nonzeros else 0, MIXING_BYTES if 0 < nonzeros < numel else 0


def _count(coded: CodedTensor) -> Tensor:
    codes, mask = coded.codes.reshape(1, -1), coded.mask.reshape(1, -1)
    return frequency_bytes(count_codes(codes, mask, coded.num_components)[0])


def _push_zeros(coder: Any, mask: Tensor, known: Tensor | None) -> Tensor:
    """Put a mask ``[O, I, P]`` onto the stack; returns bias and weights, uint8 ``[1 + F]``."""
    inclusion, mixing = inclusion_before(mask, None if known is None else known.view(torch.int8).long())
    order = _order(mask.shape)
    symbols, chances = mask.reshape(-1)[order].int(), inclusion.reshape(-1)[order]
    coder.encode_reverse(symbols.numpy(), _BERNOULLI, chances.numpy())
    return mixing.to(torch.int8).view(torch.uint8)


def _pull_zeros(coder: Any, shape: torch.Size, nonzeros: int, table: Tensor) -> Tensor:
    """Take the mask of weights ``[O, I, P]`` from the stack, bool ``[O I P]``."""
    outs, ins, positions = shape
    urns, mixing = Urns(shape, nonzeros), table.view(torch.int8).long()
    bias, (of_zeros, of_ones) = UNIT * int(mixing[0]), (mixing[1:, None] * urns.growth).flatten(1).numpy()
    # Thousands of steps, each on the few weights of a diagonal: numpy's own overhead is a third of torch's.
    urn = urns.growth.shape[2] * np.arange(len(mixing) - 1)[:, None]  # where in the flat tables each urn begins
    mask = np.zeros(shape, np.int64)
    of_out, of_in = np.zeros((outs, positions), np.int64), np.zeros((ins, positions), np.int64)
    for diagonal in range(outs + ins - 1):
        out = np.arange(max(0, diagonal - ins + 1), min(outs, diagonal + 1))
        into = diagonal - out
        kernels = np.zeros((positions, len(out)), np.int64)
        inside, out_sum, in_sum = kernels[0].copy(), of_out[out].sum(1), of_in[into].sum(1)
        for position in range(positions):
            of_kernel = np.full_like(out, position)
            seen = np.stack([into * positions + position, out * positions + position, of_kernel, into, out])
            ones = np.stack(
                [out_sum + inside, in_sum + inside, inside, of_out[out, position], of_in[into, position]]
            )
            evidence = of_ones[urn + ones] - of_zeros[urn + seen - ones]
            chance = probabilities(torch.from_numpy(urns.log_odds(bias + evidence.sum(0))))
            kernels[position] = coder.decode(_BERNOULLI, chance.numpy())
            inside += kernels[position]
        mask[out, into] = kernels.T
        of_out[out] += kernels.T
        of_in[into] += kernels.T
    return torch.from_numpy(mask.reshape(-1) > 0)


def _order(shape: torch.Size) -> Tensor:
    """Return the places of weights ``[O, I, P]`` in the stream's order: by diagonal, position, out-channel."""
    outs, ins, positions = shape
    place = torch.arange(shape.numel()).view(shape)
    diagonal = torch.arange(outs)[:, None, None] + torch.arange(ins)[:, None]
    when = diagonal * positions + torch.arange(positions)  # [O, I, P]
    return place.reshape(-1)[when.reshape(-1).argsort(stable=True)]
