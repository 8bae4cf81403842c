"""Convolutions that ONNX Runtime computes with integers: whole numbers, and inputs rounded to 8 bits.

Rounding is that of Jacob et al., "Quantization and Training of Neural Networks for Efficient
Integer-Arithmetic-Only Inference" (CVPR 2018), section 2.1: a scale and a zero point for each tensor. Weights are
not rounded.
"""

import importlib
from collections.abc import Container, Iterable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sqs_pyro.errors import NetworkError
from sqs_pyro.exporting.trace import named_arrays

Array = NDArray[Any]


def round_convolutions(model: Any, examples: Iterable[Any]) -> dict[str, str]:
    """Let convolutions of whole numbers take and give 8 bits; return what weights have become, by name.

    Their inputs, and their outputs behind a batch norm and a ReLU, are rounded to 256 levels of the range that
    they have on examples: ``QuantizeLinear`` and ``DequantizeLinear``, of which runtimes make products of
    integers. A batch norm's factors go to the scales of outputs, and its shift to the bias, which is int32.

    Args:
        model: of onnx_ir, in which weights of whole numbers are ``DequantizeLinear``.
        examples: minibatches of inputs.

    Raises:
        NetworkError: no convolution has whole numbers with a scale of each output, or no example gives finite
            numbers.
    """
    graph = model.graph
    found = [_Convolution(graph, node) for node in graph if _has_codes(node)]
    if not found:
        raise NetworkError(
            "No convolution has whole numbers times a scale of each output, which integers are multiplied with: "
            "compress with grid: uniform, in the recipe's section compression, or leave examples out."
        )
    for convolution in found:
        convolution.fold_norm()
        convolution.write()
    clean = importlib.import_module("onnx_ir.passes.common").RemoveUnusedNodesPass()
    clean(model)  # of what was written before
    values = dict.fromkeys(value for each in found for value in (each.node.inputs[0], each.output))
    steps = {value: _step(*limits) for value, limits in _limits(model, list(values), examples).items()}
    for convolution in found:
        convolution.write_bias(steps[convolution.node.inputs[0]][0])
    for value, (scale, zero) in steps.items():
        _round(graph, value, scale, zero)
    clean(model)
    return {each.name: f"convolution of int{each.bits} and inputs of 8 bits" for each in found}


class _Convolution:
    """A node, with whole numbers ``[N, ...]`` times scales ``[N]``, and a bias ``[N]``.

    Attributes:
        output: the value that is rounded.
    """

    def __init__(self, graph: Any, node: Any) -> None:
        self.graph, self.node, self.name = graph, node, node.inputs[1].name
        codes, scales = node.inputs[1].producer().inputs
        self.numbers, self.scales = _array(codes).astype(np.int8, copy=True), _array(scales).astype(np.float64)
        self.bias = _array(node.inputs[2]) if len(node.inputs) > 2 else np.zeros_like(self.scales)
        self.output = node.outputs[0]

    @property
    def bits(self) -> int:
        """4 or 8, the fewest that hold all numbers."""
        return 4 if self.numbers.min() >= -8 and self.numbers.max() <= 7 else 8

    def fold_norm(self) -> None:
        """Take over a batch norm that nothing else feeds, and find the output behind it and a ReLU."""
        norm = _only_user(self.output, {"BatchNormalization"})
        if norm is not None:
            weight, bias, mean, variance = (_array(value).astype(np.float64) for value in norm.inputs[1:])
            factors = weight / np.sqrt(variance + norm.attributes["epsilon"].as_float())
            self.bias = (self.bias - mean) * factors + bias
            # A channel of zeros keeps its scale, for the bias is divided by it.
            self.numbers[factors == 0] = 0
            self.scales = self.scales * np.where(factors == 0, 1, factors)  # negative ones are scales, too
            norm.outputs[0].replace_all_uses_with(self.output, replace_graph_outputs=True)
            self.graph.remove(norm, safe=True)
        relu = _only_user(self.output, {"Relu", "Clip"})  # of what is cut off there is nothing to round
        if relu is not None:
            self.output = relu.outputs[0]

    def write(self) -> None:
        """Write numbers, scales and bias in the place of those that there were."""
        name = self.output.name
        scales = _constant(self.graph, f"{name}.scales", self.scales.astype(np.float32))
        if self.bits == 4:
            codes = _constant(self.graph, f"{name}.codes", self.numbers, 4)
            # Runtimes multiply bytes, which they make when they load.
            operands = [self._op("Cast", codes, to=importlib.import_module("onnx_ir").DataType.INT8), scales]
        else:
            # Unsigned: older processors add two products of an unsigned and a signed byte in 16 bits, too few.
            codes = _constant(self.graph, f"{name}.codes", (self.numbers.astype(np.int16) + 128).astype(np.uint8))
            zeros = _constant(self.graph, f"{name}.zeros", np.full(len(self.scales), 128, np.uint8))
            operands = [codes, scales, zeros]
        self.node.replace_input_with(1, self._op("DequantizeLinear", *operands, axis=0))
        self._set_bias(_constant(self.graph, f"{self.output.name}.float", self.bias.astype(np.float32)))

    def write_bias(self, scale: float) -> None:
        """Write the bias as int32, given the scale of the inputs."""
        scales = (self.scales * scale).astype(np.float32)
        whole = np.clip(np.rint(self.bias / scales), -(2**31), 2**31 - 1).astype(np.int32)
        name = f"{self.output.name}.bias"
        operands = _constant(self.graph, name, whole), _constant(self.graph, f"{name}_scales", scales)
        self._set_bias(self._op("DequantizeLinear", *operands, axis=0))

    def _set_bias(self, value: Any) -> None:
        self.node.resize_inputs(3)
        self.node.replace_input_with(2, value)

    def _op(self, kind: str, *operands: Any, **attributes: Any) -> Any:
        node = importlib.import_module("onnx_ir").node(kind, list(operands), attributes)
        self.graph.insert_before(self.node, node)
        node.outputs[0].name = f"{operands[0].name}.{kind}"
        return node.outputs[0]


def _has_codes(node: Any) -> bool:
    """Return whether a node is a convolution of whole numbers with a scale of each output and a known bias."""
    if node.op_type != "Conv" or (len(node.inputs) > 2 and _array(node.inputs[2]) is None):
        return False
    made_by = node.inputs[1].producer()
    return made_by is not None and made_by.op_type == "DequantizeLinear" and "block_size" not in made_by.attributes


def _only_user(value: Any, kinds: Container[str]) -> Any:
    """Return the one node that uses a value, if it is of one of the kinds."""
    users = tuple(value.uses())
    alone = len(users) == 1 and not value.is_graph_output() and users[0].node.op_type in kinds
    return users[0].node if alone else None


def _array(value: Any) -> Array | Any:
    """Return a constant's numbers; None if it is none."""
    made_by = value.producer()
    if made_by is not None and made_by.op_type == "Cast":
        value = made_by.inputs[0]
    return None if value.const_value is None else value.const_value.numpy()


def _limits(model: Any, values: list[Any], examples: Iterable[Any]) -> dict[Any, tuple[float, float]]:
    """Return the least and the largest number of values over examples, with zero, which has to be a level."""
    graph, ir = model.graph, importlib.import_module("onnx_ir")
    own = len(graph.outputs)
    graph.outputs.extend(value for value in values if not value.is_graph_input() and value not in graph.outputs)
    shown = [value.name for value in graph.outputs]
    content = ir.to_proto(model).SerializeToString()
    del graph.outputs[own:]
    runtime: Any = importlib.import_module("onnxruntime")
    session = runtime.InferenceSession(content, providers=["CPUExecutionProvider"])
    limits = dict.fromkeys(values, (0.0, 0.0))
    seen = False
    for example in examples:
        given = named_arrays(example, (value.name for value in session.get_inputs()))
        found = {**given, **dict(zip(shown, session.run(None, given), strict=True))}
        for value, (low, high) in limits.items():
            least, largest = float(found[value.name].min()), float(found[value.name].max())
            limits[value] = float(np.minimum(low, least)), float(np.maximum(high, largest))  # which keep NaN
        seen = True
    if not seen or not np.isfinite([*limits.values()]).all():
        raise NetworkError(
            "Ranges are measured on examples, but none gives finite numbers: give some inputs of data."
        )
    return limits


def _step(low: float, high: float) -> tuple[float, int]:
    """Return the scale and the zero point of 256 levels from ``low`` to ``high``."""
    scale = float(np.float32((high - low) / 255)) or 1.0
    return scale, int(np.clip(np.rint(-low / scale), 0, 255))


def _round(graph: Any, value: Any, scale: float, zero: int) -> None:
    """Let every user of a value have it rounded."""
    ir, users = importlib.import_module("onnx_ir"), tuple(value.uses())
    name = value.name
    step = _constant(graph, f"{name}.step", np.array(scale, np.float32))
    place = _constant(graph, f"{name}.zero", np.array(zero, np.uint8))
    rounded = ir.node("QuantizeLinear", [value, step, place])
    again = ir.node("DequantizeLinear", [rounded.outputs[0], step, place])
    if value.producer() is None:
        graph.insert_before(graph[0], [rounded, again])
    else:
        graph.insert_after(value.producer(), [rounded, again])
    rounded.outputs[0].name, again.outputs[0].name = f"{name}.rounded", f"{name}.again"
    for node, i in users:
        node.replace_input_with(i, again.outputs[0])
    if value.is_graph_output():
        shown = again.outputs[0]
        shown.shape, shown.dtype = value.shape, value.dtype
        graph.outputs[:] = [shown if each is value else each for each in graph.outputs]
        value.name, shown.name = f"{name}.exact", name


def _constant(graph: Any, name: str, values: Array, bits: int = 0) -> Any:
    """Return an initializer, of the numbers' own type or of 4 bits."""
    ir: Any = importlib.import_module("onnx_ir")
    tensor = ir.Tensor(values, name=name)
    if bits == 4:
        low = (values.reshape(-1) & 15).astype(np.uint8)
        low = np.append(low, np.zeros(low.size % 2, np.uint8))
        packed = low[::2] | (low[1::2] << 4)
        tensor = ir.PackedTensor(packed, ir.DataType.INT4, shape=ir.Shape(values.shape), name=name)
    value = ir.Value(name=name, shape=tensor.shape, type=ir.TensorType(tensor.dtype), const_value=tensor)
    graph.register_initializer(value)
    return value
