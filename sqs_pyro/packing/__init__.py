"""What a compressed weight is: codes, masks, codebooks, file format, honest size."""

from sqs_pyro.packing import conditional as conditional  # layouts register themselves
from sqs_pyro.packing import entropy as entropy
from sqs_pyro.packing import fixed as fixed
from sqs_pyro.packing import structured as structured

from sqs_pyro.packing import adaptive as adaptive  # isort: skip: of layouts of equal size the older one
from sqs_pyro.packing.bits import pack_bits, unpack_bits
from sqs_pyro.packing.canonical import canonical
from sqs_pyro.packing.coded import CodedTensor
from sqs_pyro.packing.contents import PackedContents, contents_of, pack, pack_draws
from sqs_pyro.packing.file import FORMAT_VERSION, read_packed, write_packed
from sqs_pyro.packing.layouts import Layout, PackedTensor, layout_names, pack_tensor, register_layout
from sqs_pyro.packing.record import TensorRecord
from sqs_pyro.packing.size import SizeReport, size_report

__all__ = [
    "FORMAT_VERSION",
    "CodedTensor",
    "Layout",
    "PackedContents",
    "PackedTensor",
    "SizeReport",
    "TensorRecord",
    "canonical",
    "contents_of",
    "layout_names",
    "pack",
    "pack_bits",
    "pack_draws",
    "pack_tensor",
    "read_packed",
    "register_layout",
    "size_report",
    "unpack_bits",
    "write_packed",
]
