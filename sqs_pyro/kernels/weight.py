"""``PackedWeight``: one compressed parameter inside a running network."""

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from typing import Any, NamedTuple, NoReturn
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from sqs_pyro.errors import NetworkError
from sqs_pyro.kernels.decode import TRANSCODERS, PackedArgs, Unchanged, decode, decoded_weights
from sqs_pyro.kernels.form import RuntimeForm, best_form, codes_in_form, read_coded, runtime_args, with_form
from sqs_pyro.kernels.gpu.register import prepare
from sqs_pyro.kernels.ops import call
from sqs_pyro.packing.bits import packed_size
from sqs_pyro.packing.canonical import canonical
from sqs_pyro.packing.coded import CodedTensor
from sqs_pyro.packing.layouts import PackedTensor, pack_canonical, pack_tensor
from sqs_pyro.packing.record import TensorRecord
from sqs_pyro.packing.stored import WEIGHT_PREFIX, StoredWeight


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
        uses: what modules are going to do with it, if that is known: its codes are then written once, in the form
            that is best for it.

    Raises:
        PackedFileError: if the stored bytes do not decode.
    """

    codes: Tensor
    table: Tensor
    mask: Tensor | None
    scales: Tensor | None
    like: Tensor

    def __init__(self, packed: PackedTensor, dtype: torch.dtype = torch.float32, uses: Iterable[str] = ()) -> None:
        super().__init__()
        self.uses.update(uses)
        readable = packed
        if packed.nonzeros == packed.numel and not packed.codebook()[:, 0].view(torch.int32).any():
            # Of a foreign file: a table that begins with 0.0 says that there are zeros.
            readable = pack_canonical(canonical(packed.unpack()), "dense")
        with torch.inference_mode(False):  # inference tensors would not count what is written to them
            args, self.bits = runtime_args(readable, self.uses)
            self.register_buffer("codes", args.codes)
            self.register_buffer("table", args.table)
            self.register_buffer("mask", args.mask)
            self.register_buffer("scales", args.scales)
            self.register_buffer("like", torch.empty(0, dtype=dtype), persistent=False)
        self.layout, self.shape, self.form = packed.layout, packed.shape, args.form
        self._code_bits = args.bits  # in memory, where some widths are not there
        # After the load: it writes in place, of which inference tensors keep no count.
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
        return best_form(self.args, self.bits, self.uses, self.codes.device.type)

    @torch.inference_mode(False)
    def _choose_form(self) -> None:
        """Rewrite the codes in the form that is best on the device they are on."""
        if self.codes.is_meta:  # holds no values; once it does, they are loaded
            self._become_plain()
            return
        form = self.best_form().name
        if form != self.form:
            # Asked before the codes are replaced, which is what `_known` looks for: another order of them is no
            # change.
            known, device = self._known(), self.codes.device
            args = with_form(self.args, form, self.bits)
            # Together: `args` reads all three.
            self.codes, self.form, self._code_bits = args.codes.to(device), form, args.bits
            if known is not None:
                self._keep(known)
        prepare(self.args)

    def _become_plain(self) -> None:
        if self.form in TRANSCODERS:
            # Any form would do without values; the dense one is what a state dict has.
            self.form, self._code_bits = "dense", self.bits
            self.codes = self.codes.new_empty(packed_size(math.prod(self.shape), self.bits))

    @torch.inference_mode(False)
    def _dense_codes(self) -> Tensor:
        return with_form(self.args, "dense", self.bits).codes if self.form in TRANSCODERS else self.codes

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "PackedWeight":
        had_values = not self.codes.is_meta  # `to_empty` leaves the meta device without any
        super()._apply(fn, recurse)
        if not had_values and not self.codes.is_meta:  # to_empty: any codes would do, but these are valid
            # Whatever is in the memory might lie outside of the table.
            self.codes.zero_()
        self._choose_form()
        return self

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        # The state dict is the same on every machine, whichever form its kernels take.
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if not keep_vars:  # else who asks wants to know which tensors there are
            # Another machine, or this one without a compiler, may have the codes in another order.
            destination[f"{prefix}codes"] = self._dense_codes()

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        self._check_state(state_dict, prefix)
        codes = state_dict.get(f"{prefix}codes")
        if codes is not None:
            state_dict = {**state_dict, f"{prefix}codes": codes_in_form(codes, self.form, self.bits, self.shape)}
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
        # Without a mask the size follows from shape and bits; a mask's codes are as many as there are non-zeros.
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
        # A graph must have the op: a kept tensor would become a constant of full size in it.
        if torch.compiler.is_compiling():
            return call("weight", self.args, self.like)
        return decoded_weights.get(self.args, self.like.dtype)

    def draws(self) -> Tensor:
        """Return the draws of a weight ``[*shape, S]`` as ``[S, *shape]``: one shared copy, as :meth:`dense`."""
        if torch.compiler.is_compiling():
            return _draws_first(call("weight", self.args, self.like))
        dtype = self.like.dtype
        # In their own order, kept beside the weight: turning them at each call would copy all draws.
        return decoded_weights.kept(
            self.args, ("draws", dtype), lambda packed: _draws_first(decode(packed).to(dtype))
        )

    def coded(self) -> CodedTensor:
        """Return the weights; packing them gives the same bytes again."""
        return read_coded(self.args)

    def packed(self) -> PackedTensor:
        """Return the weights in the layout that they are stored in, whose bytes are not kept at run time."""
        known = self._known()
        if known is not None:
            return pack_canonical(read_coded(self.args, checked=False), self.layout, known.table)
        return pack_tensor(self.coded(), self.layout)

    def record(self, name: str) -> TensorRecord:
        """Describe what :meth:`packed` returns; it is packed only if the weight was loaded, moved or changed."""
        # The entropy coder's table of frequencies is kept, a few bytes: nothing has to be counted again.
        known = self._known()
        return TensorRecord.of(name, self.packed()) if known is None else replace(known.record, name=name)

    def remember(self, record: TensorRecord, packed: PackedTensor) -> None:
        """Keep what is small of the packed tensor that this weight was made of, as long as nothing changes it.

        It tells the size of the weight, and that its codes are canonical: they are packed again without a check.
        """
        table = packed.parts.get("table")
        self._keep(_Known(record, table))

    def _keep(self, known: "_Known") -> None:
        _all_known[self] = Unchanged(self.args), known

    def _known(self) -> "_Known | None":
        # A moved or written weight has other tensors or versions
        since, known = _all_known.get(self, (None, None))
        return known if since is not None and since.holds(self.args) else None

    def extra_repr(self) -> str:
        """Say what is packed."""
        return f"{list(self.shape)}, layout={self.layout!r}, form={self.form!r}, bits={self.bits}"


class _Known(NamedTuple):
    """What is known of a weight that was packed before."""

    record: TensorRecord
    table: Tensor | None


#: Kept beside the weights, not in them: copies and pickles are changed independently, and start without.
_all_known: WeakKeyDictionary[PackedWeight, tuple[Unchanged, _Known]] = WeakKeyDictionary()


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


def _forget(module: nn.Module, incompatible_keys: Any) -> None:
    """Drop the decoded copy after ``load_state_dict``: in inference mode nothing else would tell."""
    assert isinstance(module, PackedWeight)
    decoded_weights.forget(module.codes)
    _all_known.pop(module, None)  # in inference mode versions do not count
    prepare(module.args)
