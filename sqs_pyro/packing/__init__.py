"""What a compressed weight is: codes, masks, codebooks, file format, honest size."""

from sqs_pyro.packing import conditional as conditional  # layouts register themselves
from sqs_pyro.packing import entropy as entropy
from sqs_pyro.packing import fixed as fixed
from sqs_pyro.packing.bits import pack_bits, unpack_bits
from sqs_pyro.packing.canonical import canonical
from sqs_pyro.packing.coded import CodedTensor
from sqs_pyro.packing.file import FORMAT_VERSION, PackedContents, read_packed, write_packed
from sqs_pyro.packing.layouts import Layout, PackedTensor, layout_names, pack_tensor, register_layout
from sqs_pyro.packing.size import SizeReport, TensorSize, size_report

__all__ = [
    "FORMAT_VERSION",
    "CodedTensor",
    "Layout",
    "PackedContents",
    "PackedTensor",
    "SizeReport",
    "TensorSize",
    "canonical",
    "layout_names",
    "pack_bits",
    "pack_tensor",
    "read_packed",
    "register_layout",
    "size_report",
    "unpack_bits",
    "write_packed",
]
