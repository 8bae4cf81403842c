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
from sqs_pyro.exporting.installed import check_installed
from sqs_pyro.exporting.onnx_int8 import round_convolutions
from sqs_pyro.exporting.onnx_weights import WrittenWeight, dtype_of, has_mask
from sqs_pyro.exporting.suffixes import check_suffix
from sqs_pyro.exporting.trace import NETWORK, input_names, named_arrays, one_sentence, trace
from sqs_pyro.kernels.placing import unpack_weights
from sqs_pyro.packing.coded import CodedTensor
from sqs_pyro.packing.stored import StoredWeight, stored_weights

_OPSET, _OPSET_OF_TWO_BITS = 21, 25  # the first with UINT4, the first with UINT2
_PRODUCER = "sqs-pyro"
_LARGEST = 2**31 - 2**20  # what a file may have, bytes: a limit of protobuf


def export_onnx(
    packed: nn.Module,
    inputs: Any,
    path: str | Path,
    *,
    quantized: bool = False,
    two_bits: bool = True,
    int8_examples: Iterable[Any] | None = None,
) -> Exported:
    """Write an ONNX model with a dynamic batch, in which each compressed weight is ``Gather(codebook, codes)``.

    Codes are UINT2, UINT4 or UINT8, the smallest that holds them and zero. With several codebooks the look-up is
    ``GatherElements`` of each weight in its group's, scales are a ``Mul``. Products with whole numbers times
    scales, of outputs or of parts of a multiple of 16 inputs, are ``MatMulNBits``. Other tensors are as in the
    network.

    Args:
        packed: a packed network on the CPU.
        inputs: an example of a minibatch, two rows or more.
        path: the file.
        quantized: whether weights of whole numbers that ``MatMulNBits`` does not take, such as those of
            convolutions, are ``DequantizeLinear`` of int4 or int8. A runtime keeps them so, and makes numbers of
            them in each run.
        two_bits: whether codes and masks may be UINT2, which operators of version 25 read; else they are UINT4.
        int8_examples: minibatches of inputs; where they are given, convolutions of whole numbers take and give 8
            bits, of the ranges that there are on these, and are computed with integers. ``quantized`` is implied.

    Raises:
        NetworkError: an ensemble, a network that cannot be traced or translated, one too large for a file of ONNX,
            one without convolutions of whole numbers where there are ``int8_examples``, or onnx, onnxscript or,
            for these, onnxruntime is not installed.
        OutputError: the path has another format's suffix, or the file cannot be written.
    """
    check_suffix(path, "onnx", directory=False)
    check_installed("onnx", "onnx", "onnxscript", *["onnxruntime"] * (int8_examples is not None))
    check_one_network(packed)
    # By every name: the graph knows a tied weight by whichever it met first.
    weights = stored_weights(packed, every_name=True)
    coded = {weight: weight.coded() for weight in dict.fromkeys(weights.values())}
    # Traced with dense weights, whose operators ONNX has; look-ups take the places of the weights afterwards.
    program = trace(unpack_weights(copy.deepcopy(packed)), inputs)
    model = _translated(program, _opset(coded.values()) if two_bits else _OPSET)
    names = {f"{NETWORK}.{name}": weight for name, weight in weights.items()}
    holes = {name: (weight, coded[weight]) for name, weight in names.items()}
    used = _look_up(model, holes, quantized or int8_examples is not None, two_bits)
    _rename(model.graph, input_names(inputs))
    _strip(model)
    rounded = {} if int8_examples is None else round_convolutions(model, int8_examples)
    _check_size(model.graph)
    model.producer_name = _PRODUCER
    # In memory first: a file appears complete or not at all.
    content = importlib.import_module("onnx_ir").to_proto(model).SerializeToString()
    write_bytes(path, [content])
    first = {name: weight for name, weight in stored_weights(packed).items() if weight in used}
    return Exported(packed={name: rounded.get(name, used[weight].form) for name, weight in first.items()})


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
    check_installed("onnx", "onnxruntime")
    runtime: Any = importlib.import_module("onnxruntime")
    session = runtime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    found = session.run(None, named_arrays(inputs, (value.name for value in session.get_inputs())))
    return tuple(map(torch.from_numpy, found))


def _opset(coded: Iterable[CodedTensor]) -> int:
    """Return the oldest operators that can say what there is."""
    # Old runtimes read old operators: newer ones only where two bits, of codes or of a mask, are stored.
    return max((_OPSET, *(_OPSET_OF_TWO_BITS for one in coded if has_mask(one) or dtype_of(one) == "UINT2")))


def _translated(program: ExportedProgram, opset: int) -> Any:
    """Translate a graph to ONNX as it is."""
    with one_sentence("translated to ONNX"):
        # Not optimised yet: constants would be folded together with the weights.
        options: dict[str, Any] = {"dynamo": True, "optimize": False, "verbose": False}
        translated = torch.onnx.export(program, opset_version=opset, **options)
        assert translated is not None
        return translated.model


def _look_up(
    model: Any, weights: Mapping[str, tuple[StoredWeight, CodedTensor]], quantized: bool, two_bits: bool
) -> dict[StoredWeight, WrittenWeight]:
    """Put codes in the place of decoded weights, by name; return which weights there were.

    While the graph is optimized they are inputs: else their numbers would be computed with, or stored transposed.
    """
    graph = model.graph
    holes = {name: graph.initializers.pop(name) for name in weights if name in graph.initializers}
    for hole in holes.values():
        hole.const_value = None  # a plain input, of which nothing is known
        graph.inputs.append(hole)
    with one_sentence("translated to ONNX"):
        importlib.import_module("onnxscript.optimizer").optimize(model)
    places: dict[StoredWeight, list[str]] = {}
    for name in holes:
        places.setdefault(weights[name][0], []).append(name)
    found: dict[StoredWeight, WrittenWeight] = {}
    for weight, names in places.items():  # one that stands in several places is written once
        graph.inputs[:] = [value for value in graph.inputs if value not in [holes[name] for name in names]]
        first = names[0].removeprefix(f"{NETWORK}.")
        those = [holes[name] for name in names]
        found[weight] = WrittenWeight(graph, first, those, weights[names[0]][1], quantized, two_bits)
        found[weight].fill()
    return found


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
