"""``PackedWeight``: one compressed parameter inside a running network."""

import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple, NoReturn

import torch
from torch import Tensor, nn

from sqs_pyro.errors import NetworkError
from sqs_pyro.kernels.decode import (
    TRANSCODERS,
    PackedArgs,
    decode,
    decoded_weights,
    read_scales,
    read_symbols,
    read_table,
    write_table,
)
from sqs_pyro.kernels.gpu.register import gpu_kernels, prepare
from sqs_pyro.kernels.native import native_kernels
from sqs_pyro.kernels.ops import call
from sqs_pyro.kernels.rows import fits_rows
from sqs_pyro.kernels.tiled import tiled_bits
from sqs_pyro.packing.bits import MAX_BITS, pack_bits, packed_size, unpack_bits
from sqs_pyro.packing.coded import CodedTensor
from sqs_pyro.packing.layouts import PackedTensor, get_layout, pack_tensor
from sqs_pyro.packing.module import WEIGHT_PREFIX, StoredWeight


class RuntimeForm(NamedTuple):
    """What a weight is in memory.

    Attributes:
        name: ``"dense"``, ``"bitmap"``, ``"tiled"`` or ``"rows"``, see :class:`PackedArgs`.
        has_kernels: whether products are made with the codes; else the weight is decoded once and kept.
        reason: why, in a few words.
    """

    name: str
    has_kernels: bool
    reason: str


class PackedWeight(StoredWeight):
    """A compressed parameter in its run-time form.

    On CPUs with compiled kernels it is ``tiled`` or ``rows`` where all modules that use it have such a kernel:
    they multiply with the codes as they are. All others are decoded once, from ``dense`` codes, or ``bitmap``
    where 8 bits cannot hold zero too. The state dict has the dense codes whatever the form.

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
        self.form = "dense" if _dense_bits(packed) <= MAX_BITS else "bitmap"
        stored = packed if packed.layout == self.form else pack_tensor(coded, self.form)
        rows = stored.codebook()
        if self.form == "dense" and has_zeros:
            rows = torch.cat([rows.new_zeros(len(rows), 1), rows], dim=1)
        self.layout, self.shape, self.bits = packed.layout, packed.shape, stored.bits
        self._code_bits = self.bits  # in memory, where some widths are not there
        with torch.inference_mode(False):  # inference tensors would not count what is written to them
            self.register_buffer("codes", stored.parts["codes"].clone())
            self.register_buffer("table", write_table(rows))
            self.register_buffer("mask", stored.parts["mask"].clone() if self.form == "bitmap" else None)
            self.register_buffer("scales", None if coded.scales is None else write_table(coded.scales))
            self.register_buffer("like", torch.empty(0, dtype=dtype), persistent=False)
        self.register_load_state_dict_post_hook(_forget)

    @property
    def args(self) -> PackedArgs:
        """The weight as the custom ops take it."""
        held: dict[str, Any] = self._buffers  # looking up attributes of a module would take longer
        return PackedArgs(
            held["codes"], held["table"], held["mask"], self.shape, self._code_bits, held["scales"], self.form
        )

    def used_for(self, product: str) -> None:
        """Tell what a module does with the weight: see :meth:`StoredWeight.used_for`."""
        super().used_for(product)
        self._choose_form()

    def best_form(self) -> RuntimeForm:
        """Return the form that is best where the weight is, for what it is used for."""
        device, groups = self.codes.device.type, self.table.shape[0]
        plain = "dense" if self.mask is None else "bitmap"
        if not self.uses or "decoded" in self.uses:
            return RuntimeForm(plain, False, "its module reads the decoded weight")
        if self.bits == 0:
            return RuntimeForm(plain, False, "all weights are one value")
        if device == "cuda" and "convolution" not in self.uses:
            if gpu_kernels() is None:
                return RuntimeForm(plain, False, "no Triton")
            return RuntimeForm(plain, True, "Triton and CUDA kernels multiply with the codes")
        if device != "cpu":
            return RuntimeForm(plain, False, f"no kernel for this product on {device}")
        if self.mask is not None:
            return RuntimeForm(plain, False, f"{self.table.shape[1] // 4} values and zero do not fit into 8 bits")
        form = "tiled" if groups == 1 or "convolution" in self.uses else "rows"
        if not (self.shape[0] % groups == 0 if form == "tiled" else fits_rows(self.shape, groups)):
            each = math.prod(self.shape) // groups
            return RuntimeForm(plain, False, f"no kernel for {groups} codebooks of {each} weights")
        if not native_kernels(form):
            return RuntimeForm(plain, False, "no compiled kernels")
        return RuntimeForm(form, True, "compiled kernels multiply with the codes")

    @torch.inference_mode(False)
    def _choose_form(self) -> None:
        """Rewrite the codes in the form that is best on the device they are on."""
        if self.codes.is_meta:  # holds no values; once it does, they are loaded
            self._become_plain()
            return
        form = self.best_form().name
        if form != self.form:
            device, codes = self.codes.device, self._dense_codes()
            self.codes, self.form = self._in_order_of(form, codes).to(device), form
            self._code_bits = tiled_bits(self.bits) if form in TRANSCODERS else self.bits
        prepare(self.args)

    def _become_plain(self) -> None:
        if self.form in TRANSCODERS:
            self.form, self._code_bits = "dense", self.bits
            self.codes = self.codes.new_empty(packed_size(math.prod(self.shape), self.bits))

    @torch.inference_mode(False)
    def _in_order_of(self, form: str, codes: Tensor) -> Tensor:
        """Dense codes in the order of another form."""
        if form not in TRANSCODERS:
            return codes
        symbols = unpack_bits(codes, self.bits, math.prod(self.shape)).view(self.shape)
        return TRANSCODERS[form][0](symbols, tiled_bits(self.bits))

    @torch.inference_mode(False)
    def _dense_codes(self) -> Tensor:
        return pack_bits(read_symbols(self.args)[0], self.bits) if self.form in TRANSCODERS else self.codes

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "PackedWeight":
        had_values = not self.codes.is_meta
        super()._apply(fn, recurse)
        if not had_values and not self.codes.is_meta:  # to_empty: any codes would do, but these are valid
            self.codes.zero_()
        self._choose_form()
        return self

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if not keep_vars:  # else who asks wants to know which tensors there are
            destination[f"{prefix}codes"] = self._dense_codes()

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        self._check_state(state_dict, prefix)
        codes = state_dict.get(f"{prefix}codes")
        if codes is not None:
            state_dict = {**state_dict, f"{prefix}codes": self._in_order_of(self.form, codes)}
        super()._load_from_state_dict(state_dict, prefix, *args)

    def _check_state(self, state_dict: dict[str, Any], prefix: str) -> None:
        """Check that a state dict holds this weight packed as it is here, or nothing of it.

        Raises:
            NetworkError: it holds codes of another form.
        """
        owner, _, child = prefix.removesuffix(".").rpartition(".")
        name = ".".join(filter(None, (owner, child.removeprefix(WEIGHT_PREFIX))))
        codes, table = state_dict.get(f"{prefix}codes"), state_dict.get(f"{prefix}table")
        if codes is None or table is None:
            return
        given, size = (tuple(codes.shape), tuple(table.shape)), packed_size(math.prod(self.shape), self.bits)
        expected = ((size,) if self.mask is None else tuple(self.codes.shape), tuple(self.table.shape))
        if given != expected:
            raise NetworkError(
                f"The state dict holds {name!r} packed with codes and table of the shapes {given}, but here they "
                f"are {expected}: it is of another compression; load that one's file with sqs_pyro.load instead."
            )

    def __prepare_scriptable__(self) -> NoReturn:
        """Say that there is no script of packed weights: torch's own errors do not."""
        raise NetworkError(
            "torch.jit.script cannot compile a packed network: use torch.compile, torch.export or torch.jit.trace."
        )

    def dense(self) -> Tensor:
        """Return the weight in the network's dtype: one shared copy, not to be written to."""
        if torch.compiler.is_compiling():
            return call("weight", self.args, self.like)
        return decoded_weights.get(self.args, self.like.dtype)

    def draws(self) -> Tensor:
        """Return the draws of a weight ``[*shape, S]`` as ``[S, *shape]``: one shared copy, as :meth:`dense`."""
        if torch.compiler.is_compiling():
            return _draws_first(call("weight", self.args, self.like))
        dtype = self.like.dtype
        return decoded_weights.kept(
            self.args, ("draws", dtype), lambda packed: _draws_first(decode(packed).to(dtype))
        )

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
        return f"{list(self.shape)}, layout={self.layout!r}, form={self.form!r}, bits={self.bits}"


def refuse_dense_weights(names: Iterable[str], state_dict: Mapping[str, Any], prefix: str) -> None:
    """Check that a state dict does not hold parameters dense that a module has packed.

    Raises:
        NetworkError: it does; with ``strict=False`` torch would leave them out without a word.
    """
    for name in names:
        if prefix + name in state_dict:
            raise NetworkError(
                f"The state dict holds {prefix + name!r} as a dense weight, but this network is packed: load it "
                "into the network that was packed and pack that, or load a state dict of a packed network."
            )


def _draws_first(weight: Tensor) -> Tensor:
    return weight.movedim(-1, 0).contiguous()


def _dense_bits(packed: PackedTensor) -> int:
    return get_layout("dense").bits(packed.num_components, packed.nonzeros < packed.numel)


def _forget(module: nn.Module, incompatible_keys: Any) -> None:
    """Drop the decoded copy after ``load_state_dict``: in inference mode nothing else would tell."""
    assert isinstance(module, PackedWeight)
    decoded_weights.forget(module.codes)
    prepare(module.args)
