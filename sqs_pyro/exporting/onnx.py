"""ONNX models in which a compressed weight is a look-up of its codes in its codebook."""

import copy
import importlib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import ExportedProgram

from sqs_pyro.atomic import write_bytes
from sqs_pyro.errors import NetworkError
from sqs_pyro.exporting.exported import Exported, check_one_network
from sqs_pyro.exporting.suffixes import check_suffix
from sqs_pyro.exporting.trace import NETWORK, input_names, input_tensors, one_sentence, trace
from sqs_pyro.extras import needed_for
from sqs_pyro.kernels.placing import unpack_weights
from sqs_pyro.packing.bits import pack_bits
from sqs_pyro.packing.coded import CodedTensor
from sqs_pyro.packing.stored import StoredWeight, stored_weights

_OPSET, _OPSET_OF_TWO_BITS = 21, 25  # the first with UINT4, the first with UINT2
_BITS = {"UINT2": 2, "UINT4": 4, "UINT8": 8}
_PRODUCER = "sqs-pyro"
_LARGEST = 2**31 - 2**20  # what a file may have, bytes: a limit of protobuf


def export_onnx(packed: nn.Module, inputs: Any, path: str | Path) -> Exported:
    """Write an ONNX model with a dynamic batch, in which each compressed weight is ``Gather(codebook, codes)``.

    Codes are UINT2, UINT4 or UINT8, the smallest that holds them and zero. With several codebooks the look-up is
    ``GatherElements`` of each weight in its group's, scales of out-channels are a ``Mul``. Other tensors are as in
    the network.

    Args:
        packed: a packed network on the CPU.
        inputs: an example of a minibatch, two rows or more.
        path: the file.

    Raises:
        NetworkError: an ensemble, a network that cannot be traced or translated, one too large for a file of ONNX,
            or onnx or onnxscript is not installed.
        OutputError: the path has another format's suffix, or the file cannot be written.
    """
    check_suffix(path, "onnx", directory=False)
    check_installed("onnx", "onnxscript")
    check_one_network(packed)
    # By every name: the graph knows a tied weight by whichever it met first.
    weights = stored_weights(packed, every_name=True)
    coded = {weight: weight.coded() for weight in dict.fromkeys(weights.values())}
    # Traced with dense weights, whose operators ONNX has; look-ups take the places of the weights afterwards.
    program = trace(unpack_weights(copy.deepcopy(packed)), inputs)
    model = _translated(program, _opset(coded.values()))
    names = {f"{NETWORK}.{name}": weight for name, weight in weights.items()}
    used = _look_up(model, {name: (weight, coded[weight]) for name, weight in names.items()})
    _rename(model.graph, input_names(inputs))
    _strip(model)
    _check_size(model.graph)
    model.producer_name = _PRODUCER
    # In memory first: a file appears complete or not at all.
    content = importlib.import_module("onnx_ir").to_proto(model).SerializeToString()
    write_bytes(path, [content])
    first = {name: coded[weight] for name, weight in stored_weights(packed).items() if weight in used}
    return Exported(packed={name: f"Gather of {_dtype(value)} codes" for name, value in first.items()})


def is_onnx_export(path: Path) -> bool:
    """Return whether a file was written by :func:`export_onnx`; its maker stands at its beginning."""
    if not path.is_file():
        return False
    with path.open("rb") as file:
        head = file.read(64)
    # fields 1 (version of the format) and 2 (producer, a string behind its length) of a ModelProto
    return head[:1] == b"\x08" and bytes([0x12, len(_PRODUCER)]) + _PRODUCER.encode() in head


def run_onnx(path: str | Path, inputs: Any) -> tuple[Tensor, ...]:
    """Run a model in ONNX Runtime on the CPU.

    Args:
        path: of the model.
        inputs: a minibatch; the model has the inputs' names or, of tensors in a row, their order.

    Returns:
        The network's outputs.

    Raises:
        NetworkError: onnxruntime is not installed.
    """
    check_installed("onnxruntime")
    runtime: Any = importlib.import_module("onnxruntime")
    session = runtime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    # Inputs that the network does not use are not in the model.
    given = dict(zip(input_names(inputs), input_tensors(inputs), strict=True))
    taken = {value.name for value in session.get_inputs()}
    found = session.run(None, {name: tensor.numpy() for name, tensor in given.items() if name in taken})
    return tuple(map(torch.from_numpy, found))


def check_installed(*packages: str) -> None:
    """Check that packages behind ONNX are there.

    Raises:
        MissingPackageError: one is not.
    """
    for name in packages:
        with needed_for("ONNX models"):
            importlib.import_module(name)


def _opset(coded: Iterable[CodedTensor]) -> int:
    """Return the oldest operators that can say what there is."""
    # Old runtimes read old operators: newer ones only where two bits, of codes or of a mask, are stored.
    return max((_OPSET, *(_OPSET_OF_TWO_BITS for one in coded if _has_mask(one) or _dtype(one) == "UINT2")))


def _translated(program: ExportedProgram, opset: int) -> Any:
    """Translate a graph to ONNX as it is."""
    with one_sentence("translated to ONNX"):
        # Not optimised yet: constants would be folded together with the weights.
        options: dict[str, Any] = {"dynamo": True, "optimize": False, "verbose": False}
        translated = torch.onnx.export(program, opset_version=opset, **options)
        assert translated is not None
        return translated.model


def _look_up(model: Any, weights: Mapping[str, tuple[StoredWeight, CodedTensor]]) -> set[StoredWeight]:
    """Put look-ups in the place of decoded weights, by name; return which weights there were.

    While the graph is optimized they are inputs: else their numbers would be computed with, or stored transposed.
    """
    graph = model.graph
    holes = {name: graph.initializers.pop(name) for name in weights if name in graph.initializers}
    for hole in holes.values():
        hole.const_value = None  # a plain input, of which nothing is known
        graph.inputs.append(hole)
    with one_sentence("translated to ONNX"):
        importlib.import_module("onnxscript.optimizer").optimize(model)
    found: dict[StoredWeight, Any] = {}
    for name, hole in holes.items():
        weight, coded = weights[name]
        if weight not in found:  # one that stands in several places is looked up once
            found[weight] = _Lookup(graph, hole).weight(coded)
        graph.inputs.remove(hole)
        hole.replace_all_uses_with(found[weight], replace_graph_outputs=True)
    return set(found)


class _Lookup:
    """Writes the nodes of one weight to the front of a graph.

    Args:
        graph: of onnx_ir.
        hole: the value that the weight is to have, by name and dtype.
    """

    def __init__(self, graph: Any, hole: Any) -> None:
        self.ir, self.graph, self.hole = importlib.import_module("onnx_ir"), graph, hole
        self.name = hole.name.removeprefix(f"{NETWORK}.")
        self.count, self.first = 0, graph[0]  # what is there already comes after the weight

    def weight(self, coded: CodedTensor) -> Any:
        """Return the value of a weight."""
        symbols, table = _symbols(coded)
        shape = list(coded.shape)
        if coded.num_groups == 1:
            # Gather takes int32 indices, not UINT2 or UINT4; runtimes fold the cast when they load.
            indices = self.op("Cast", self.codes(symbols.view(shape), _dtype(coded)), to=self.ir.DataType.INT32)
            value = self.op("Gather", self.floats("codebook", table.view(-1)), indices)
        else:
            rows = symbols.view(coded.num_groups, -1)  # [G, n]: a row of the table each
            indices = self.op("Cast", self.codes(rows, _dtype(coded)), to=self.ir.DataType.INT32)
            found = self.op("GatherElements", self.floats("codebook", table), indices, axis=1)
            value = self.op("Reshape", found, self.constant("shape", torch.tensor(shape)))
        if coded.scales is not None:
            scales = coded.scales.view(-1, *[1] * (len(shape) - 1))
            value = self.op("Mul", value, self.floats("scales", scales))
        if _has_mask(coded):
            kept = self.op(
                "Cast", self.codes(coded.mask.to(torch.uint8), "UINT2", "mask"), to=self.ir.DataType.INT32
            )
            kept = self.op("Cast", kept, to=self.ir.DataType.BOOL)
            value = self.op("Where", kept, value, self.constant("zero", torch.tensor(0.0)))
        if self.hole.dtype != self.ir.DataType.FLOAT:
            value = self.op("Cast", value, to=self.hole.dtype)
        # The look-up takes over the hole's name: the graph's users find it under the parameter's.
        value.name, value.shape, value.dtype = self.name, self.hole.shape, self.hole.dtype
        return value

    def codes(self, symbols: Tensor, dtype: str, part: str = "codes") -> Any:
        """Return an initializer of small unsigned integers."""
        bits, name = _BITS[dtype], f"{self.name}.{part}"
        if bits == 8:
            return self.constant(part, symbols)
        packed = pack_bits(symbols.reshape(-1), bits).numpy()
        shape = self.ir.Shape(symbols.shape)
        return self.initializer(self.ir.PackedTensor(packed, self.ir.DataType[dtype], shape=shape, name=name))

    def floats(self, part: str, values: Tensor) -> Any:
        """Return float32 numbers, from float16 where that holds them and is smaller, node included."""
        # A node and its names take some hundred bytes, as many as a short codebook would save.
        if values.numel() > 64 and torch.equal(values.half().float(), values):
            return self.op("Cast", self.constant(part, values.half()), to=self.ir.DataType.FLOAT)
        return self.constant(part, values)

    def constant(self, part: str, values: Tensor) -> Any:
        """Return an initializer."""
        return self.initializer(self.ir.Tensor(values.contiguous().numpy(), name=f"{self.name}.{part}"))

    def initializer(self, tensor: Any) -> Any:
        """Register a tensor."""
        value = self.ir.Value(
            name=tensor.name, shape=tensor.shape, type=self.ir.TensorType(tensor.dtype), const_value=tensor
        )
        self.graph.register_initializer(value)
        return value

    def op(self, kind: str, *operands: Any, **attributes: Any) -> Any:
        """Write a node; return its value."""
        node = self.ir.node(kind, list(operands), attributes)
        # A graph is in the order of computation: weights come before whatever uses them.
        self.graph.insert_before(self.first, node)
        self.count += 1
        node.outputs[0].name = f"{self.name}.{self.count}"
        return node.outputs[0]


def _has_mask(coded: CodedTensor) -> bool:
    """Return whether zero finds no place among the codes, because they are 256 already."""
    return coded.num_components == 256 and coded.nonzeros < coded.codes.numel()


def _symbols(coded: CodedTensor) -> tuple[Tensor, Tensor]:
    """Return uint8 ``[*shape]`` and the table ``[G, S]`` that they look up; zero is its first entry, if one is."""
    if coded.nonzeros == coded.codes.numel() or _has_mask(coded):
        return coded.codes, coded.codebook
    table = torch.cat([coded.codebook.new_zeros(coded.num_groups, 1), coded.codebook], dim=1)
    return (coded.codes + 1) * coded.mask, table


def _dtype(coded: CodedTensor) -> str:
    """Return the smallest integers of ONNX that hold all codes."""
    size = coded.num_components + (coded.nonzeros < coded.codes.numel() and not _has_mask(coded))
    return "UINT2" if size <= 4 else "UINT4" if size <= 16 else "UINT8"


def _rename(graph: Any, names: list[str]) -> None:
    """Give names to inputs, outputs and the batch, which torch numbers."""
    for i, value in enumerate(graph.outputs):
        value.name = "output" if len(graph.outputs) == 1 else f"output_{i}"
    for name, value in zip(names, graph.inputs, strict=True):
        value.name = name
    ir = importlib.import_module("onnx_ir")
    old = graph.inputs[0].shape[0]  # the batch, as torch has numbered it
    values = [*graph.inputs, *(value for node in graph for value in node.outputs)]
    for value in values:
        if value.shape is not None:
            value.shape = ir.Shape(["batch" if dim == old else dim for dim in value.shape])


def _strip(model: Any) -> None:
    """Drop what torch tells about its own graph: it is longer than the graph, and names files of this machine."""
    for value in list(model.graph.initializers.values()):
        value.name = value.name.removeprefix(f"{NETWORK}.")
    # Traces of the stack: paths of this machine, and no two exports alike.
    for part in (model, model.graph, *model.graph, *model.graph.inputs, *model.graph.initializers.values()):
        part.metadata_props.clear()
    for node in model.graph:
        for value in node.outputs:
            value.metadata_props.clear()


def _check_size(graph: Any) -> None:
    size = sum(value.const_value.nbytes for value in graph.initializers.values())
    if size > _LARGEST:
        raise NetworkError(
            f"The ONNX model would have {size:,} bytes, more than the 2 GiB of a file: compress more of the "
            "network, or take another format."
        )
