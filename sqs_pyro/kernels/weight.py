"""``PackedWeight``: one compressed parameter inside a running network."""

from typing import Any

import torch
from torch import Tensor, nn

from sqs_pyro.kernels.decode import (
    PackedArgs,
    decoded_weights,
    read_scales,
    read_symbols,
    read_table,
    write_table,
)
from sqs_pyro.kernels.ops import call
from sqs_pyro.packing.bits import MAX_BITS
from sqs_pyro.packing.coded import CodedTensor
from sqs_pyro.packing.layouts import PackedTensor, get_layout, pack_tensor
from sqs_pyro.packing.module import StoredWeight


class PackedWeight(StoredWeight):
    """A compressed parameter in its run-time form: dense codes, or bitmap where 8 bits cannot hold zero too.

    Modules that share the parameter share this module. Its buffers are uint8, so that casting the network
    leaves them alone; ``like`` is empty and follows the network's dtype and device.

    Args:
        packed: the parameter as stored; its layout is remembered for saving.
        dtype: of the parameter it replaces.

    Raises:
        PackedFileError: if the stored bytes do not decode.
    """

    codes: Tensor
    table: Tensor
    mask: Tensor | None
    scales: Tensor | None
    like: Tensor

    def __init__(self, packed: PackedTensor, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        coded = packed.unpack()
        has_zeros = packed.nonzeros < packed.numel
        form = "dense" if _dense_bits(packed) <= MAX_BITS else "bitmap"
        stored = packed if packed.layout == form else pack_tensor(coded, form)
        rows = stored.codebook()
        if form == "dense" and has_zeros:
            rows = torch.cat([rows.new_zeros(len(rows), 1), rows], dim=1)
        self.layout, self.shape, self.bits = packed.layout, packed.shape, stored.bits
        with torch.inference_mode(False):  # inference tensors would not count what is written to them
            self.register_buffer("codes", stored.parts["codes"].clone())
            self.register_buffer("table", write_table(rows))
            self.register_buffer("mask", stored.parts["mask"].clone() if form == "bitmap" else None)
            self.register_buffer("scales", None if coded.scales is None else write_table(coded.scales))
            self.register_buffer("like", torch.empty(0, dtype=dtype), persistent=False)
        self.register_load_state_dict_post_hook(_forget)

    @property
    def args(self) -> PackedArgs:
        """The weight as the custom ops take it."""
        return PackedArgs(self.codes, self.table, self.mask, self.shape, self.bits, self.scales)

    def dense(self) -> Tensor:
        """Return the weight in the network's dtype: one shared copy, not to be written to."""
        if torch.compiler.is_compiling():
            return call("weight", self.args, self.like)
        return decoded_weights.get(self.args, self.like.dtype)

    def coded(self) -> CodedTensor:
        """Return the weights; packing them gives the same bytes again."""
        symbols, mask = read_symbols(self.args)
        table = read_table(self.args)
        if mask is None:
            has_zeros = not table[:, 0].view(torch.int32).any()  # no stored codebook value is 0.0
            mask = symbols != 0 if has_zeros else torch.ones_like(symbols, dtype=torch.bool)
            symbols = symbols - (mask & has_zeros).to(torch.uint8)
            table = table[:, has_zeros:]
        shape, scales = self.shape, read_scales(self.args)
        return CodedTensor(symbols.view(shape), mask.view(shape), table.contiguous(), scales)

    def extra_repr(self) -> str:
        """Say what is packed."""
        return f"{list(self.shape)}, layout={self.layout!r}, bits={self.bits}"


def _dense_bits(packed: PackedTensor) -> int:
    return get_layout("dense").bits(packed.num_components, packed.nonzeros < packed.numel)


def _forget(module: nn.Module, incompatible_keys: Any) -> None:
    """Drop the decoded copy after ``load_state_dict``: in inference mode nothing else would tell."""
    assert isinstance(module, PackedWeight)
    decoded_weights.forget(module.codes)
