"""Packed weights of a network that is still being loaded: first only their places, then bytes, then weights.

A network on the meta device gets a :class:`PendingWeight` for every compressed parameter (:func:`reserve`), some
other program fills their ``stored`` buffers, or only says on which device they are to be, and :func:`complete`
decodes them to their run-time form, tensor by tensor. So no weight is ever there as floating-point numbers, nor
are the bytes of all weights beside their run-time form: memory stays near the packed size.
"""

from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor, nn

from sqs_pyro.errors import NetworkError, PackedFileError
from sqs_pyro.kernels.heap import Heap
from sqs_pyro.kernels.placing import packed_weight, put_weights
from sqs_pyro.kernels.weight import PackedWeight
from sqs_pyro.packing.coded import CodedTensor
from sqs_pyro.packing.contents import parameters_to_pack
from sqs_pyro.packing.layouts import PackedTensor
from sqs_pyro.packing.record import TensorRecord
from sqs_pyro.packing.stored import StoredWeight

#: What follows a parameter's path in a checkpoint: child ``packed_weight`` of its module, buffer ``stored``.
STORED = "stored"


class PendingWeight(StoredWeight):
    """Place of a packed weight.

    Args:
        name: of the parameter, for errors.
        tensor: what the bytes are of.
        dtype: of the parameter.
        twin: the weight that this one shares its bytes with; it then has no buffer of its own.
        read: returns its bytes, uint8 on the CPU, when they are decoded; ``stored`` then has their size and the
            device that they are to go to, is in no state dict, and what is in it does not matter.
    """

    stored: Tensor | None

    def __init__(
        self,
        name: str,
        tensor: TensorRecord,
        dtype: torch.dtype,
        twin: "PendingWeight | None" = None,
        read: Callable[[], Tensor] | None = None,
    ) -> None:
        super().__init__()
        self.name, self.tensor, self.dtype, self.layout, self._read = name, tensor, dtype, tensor.layout, read
        self._twin = (twin,)  # in a tuple, so that its buffer has one name only
        self._made: tuple[PackedWeight, ...] = ()  # in a tuple for the same reason
        size = tensor.bytes
        stored = None if twin else torch.empty(size, dtype=torch.uint8, device="meta")
        # What is in the state dict, loaders fill: all bytes would be there before the first is decoded.
        self.register_buffer(STORED, stored, persistent=read is None)

    def dense(self) -> Tensor:
        """Return a tensor ``[*shape]`` without values: loaders may look at a module's weight in between."""
        return torch.empty(self.tensor.shape, dtype=self.dtype, device="meta")

    def coded(self) -> CodedTensor:
        """Return the weights; raises PackedFileError if the bytes are not theirs."""
        return self.complete().coded()

    def packed(self) -> PackedTensor:
        """Return the stored bytes' tensor; errors as :meth:`coded`."""
        return self.complete().packed()

    def record(self, name: str) -> TensorRecord:
        """Describe the tensor under a name."""
        return replace(self.tensor, name=name)

    def settle(self) -> None:
        """Keep only the device of ``stored`` where the bytes themselves are read from elsewhere."""
        if self._read is not None and self.stored is not None and not self.stored.is_meta:
            self.stored = self.stored.new_empty(0)

    def complete(self) -> PackedWeight:
        """Return the weight in its run-time form, on the device of the bytes, which are given up.

        Raises:
            NetworkError: the bytes have been moved to a disk.
            PackedFileError: they are not those that were written.
        """
        (twin,) = self._twin
        if twin is not None:
            weight = twin.complete()
        else:
            if not self._made:
                self._made = (self._decode(),)
                # Given up at once: bytes and run-time form of the largest tensor are all that is there twice.
                self.stored = None
            (weight,) = self._made
        # Twins stand in other modules, which use the one weight in their own ways.
        for product in self.uses:
            weight.used_for(product)
        return weight

    def _decode(self) -> PackedWeight:
        assert self.stored is not None
        if self.stored.is_meta:
            raise NetworkError(
                f"Packed weight {self.name!r} was not loaded, or offloaded to CPU or disk: packed networks cannot "
                'be offloaded, choose a device_map that keeps all of it on GPUs or on "cpu".'
            )
        device = self.stored.device
        try:
            packed = self.tensor.with_bytes(self.stored.cpu() if self._read is None else self._read())
        except PackedFileError as error:
            raise PackedFileError(
                f"Tensor {self.name!r} cannot be read: {error}; fetch the checkpoint again, or save it anew."
            ) from None
        uses = self.uses if device.type == "cpu" else ()  # elsewhere the form is chosen after the move
        return packed_weight(self.name, packed, self.dtype, uses).to(device)


def reserve(
    net: nn.Module,
    tensors: Mapping[str, TensorRecord],
    shared: Mapping[str, str],
    read: Callable[[str], Tensor] | None = None,
) -> None:
    """Put places for packed weights into a network, in place; its compressed parameters are given up.

    Args:
        net: the network, on the meta device.
        tensors: by parameter name.
        shared: further names of parameters, and those in ``tensors`` whose weights they share.
        read: returns the bytes of a parameter, if no loader is to fill them in: see :class:`PendingWeight`.

    Raises:
        NetworkError: for a name that is not a parameter, a shape that is not the parameter's, or a module whose
            weights cannot be packed.
    """
    parameters = parameters_to_pack(net, tensors)
    pending = {
        name: PendingWeight(name, tensors[name], parameter.dtype, read=partial(read, name) if read else None)
        for name, parameter in parameters.items()
    }
    found: dict[int, dict[str, StoredWeight]] = {}
    for name, weight in pending.items():
        owner, _, attribute = name.rpartition(".")
        found.setdefault(id(net.get_submodule(owner)), {})[attribute] = weight
    for name, first in shared.items():
        # Shared names are not in `tensors`, hence not among those that have been checked.
        parameters_to_pack(net, {name: tensors[first]})  # that it is there, and of this shape
        owner, _, attribute = name.rpartition(".")
        twin = PendingWeight(name, tensors[first], pending[first].dtype, twin=pending[first])
        found.setdefault(id(net.get_submodule(owner)), {}).setdefault(attribute, twin)
    put_weights(net, found)


def complete(net: nn.Module) -> None:
    """Decode all pending weights of a network to their run-time form, in place, one after the other.

    Raises:
        NetworkError, PackedFileError: see :meth:`PendingWeight.complete`.
    """
    pending = [
        (module, child, weight)
        for module in net.modules()
        for child, weight in module._modules.items()
        if isinstance(weight, PendingWeight)
    ]
    for _, _, weight in pending:
        weight.settle()  # of all, before any codes are written into the holes between
    heap = Heap()
    # The largest first: what its bytes take beside its codes is not on top of all others.
    for module, child, weight in sorted(pending, key=lambda found: -found[2].tensor.bytes):
        module._modules[child] = weight.complete()
        heap.freed(weight.tensor.bytes)  # read, decoded and dropped
