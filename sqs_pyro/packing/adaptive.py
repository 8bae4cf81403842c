"""Layout ``adaptive``: zeros, signs and sizes under a law that learns as it goes, without a table.

For storage only, like ``entropy``. It is the smallest where weights know of each other: those of convolutions'
kernels, and of channels that differ.
"""

import torch
from torch import Tensor

from sqs_pyro.packing.coded import CodedTensor
from sqs_pyro.packing.layouts import Layout, PackedTensor, Structure, register_layout
from sqs_pyro.packing.mixing import CodedShape
from sqs_pyro.packing.mixing_native import decode_weights, encode_weights, is_compiled


@register_layout
class AdaptiveLayout(Layout):
    """One stream of decisions under mixed contexts."""

    name = "adaptive"
    # Its decoder takes ten times as long as that of `entropy`, and where there is no compiler seconds for so many.
    automatic_weights = 1 << 16

    @property
    def automatic(self) -> bool:  # type: ignore[override]
        """Whether it is compiled here: nobody waits for plain Python who has not asked for it."""
        return is_compiled()

    def bits(self, num_components: int, has_zeros: bool) -> int:
        """Return 0: symbols have no fixed width."""
        return 0

    def part_sizes(self, packed: Structure) -> dict[str, int | None]:
        """Return no size: only the stream itself has one."""
        return {"codes": None}

    def pack_parts(self, coded: CodedTensor, bits: int) -> dict[str, Tensor]:
        """Encode all weights, first to last."""
        shape = CodedShape.of(coded.shape, coded.nonzeros, coded.codebook.numpy())
        stream = encode_weights(
            shape, coded.codes.reshape(-1).contiguous().numpy(), coded.mask.reshape(-1).contiguous().numpy()
        )
        return {"codes": torch.from_numpy(stream)}

    def unpack_codes(self, packed: PackedTensor) -> tuple[Tensor, Tensor]:
        """Decode all weights, first to last."""
        shape = CodedShape.of(packed.shape, packed.nonzeros, packed.codebook().numpy())
        codes, mask = decode_weights(shape, packed.parts["codes"].cpu().contiguous().numpy())
        return torch.from_numpy(codes), torch.from_numpy(mask)
