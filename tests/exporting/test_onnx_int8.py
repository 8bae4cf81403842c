"""Convolutions of integers in ONNX Runtime, beside the same rounding in PyTorch."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from kits.packed_exports import on_no_grid, on_whole_numbers
from torch import nn

from sqs_pyro.errors import NetworkError
from sqs_pyro.exporting import export_onnx
from sqs_pyro.exporting.onnx import run_onnx
from sqs_pyro.kernels import packed_network
from sqs_pyro.testing.layouts import random_coded

onnx = pytest.importorskip("onnx")
onnxruntime = pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")


class Convolutions(nn.Module):
    """Two convolutions with batch norms, the second depthwise, and a third whose output is the network's."""

    def __init__(self):
        super().__init__()
        self.first, self.first_norm = nn.Conv2d(3, 8, 3, 2, 1, bias=False), nn.BatchNorm2d(8)
        self.second, self.second_norm = nn.Conv2d(8, 8, 3, padding=1, groups=8), nn.BatchNorm2d(8)
        self.third = nn.Conv2d(8, 5, 1)

    def forward(self, x, *, rounded=lambda name, x: x):
        """Return the output; what is rounded is named."""
        x = rounded("x", x)
        x = rounded("first", self.first_norm(self.first(x)).relu())
        x = rounded("second", F.relu6(self.second_norm(self.second(x))))
        return rounded("third", self.third(x))


def network(components, make=on_whole_numbers):
    """The packed network, and the plain one with the same weights."""
    torch.manual_seed(0)
    net = Convolutions().eval()
    with torch.no_grad():
        for norm in (net.first_norm, net.second_norm):
            norm.running_mean.normal_()
            norm.running_var.uniform_(0.5, 2.0)
            norm.bias.normal_()
            # Signs, and a dead channel.
            norm.weight.copy_(torch.tensor([1.0, -0.5, 0.7, 2.0, -1.5, 0.0, 1.0, 0.3]))
    names = [name for name, p in net.named_parameters() if p.dim() > 1]
    shapes = {name: tuple(net.get_parameter(name).shape) for name in names}
    coded = {name: make(random_coded(shape, components, seed=i)) for i, (name, shape) in enumerate(shapes.items())}
    packed = packed_network(net, coded, leftover_dtype="float32")
    net.load_state_dict({**net.state_dict(), **{name: one.dense() for name, one in coded.items()}})
    return packed, net


@pytest.mark.parametrize(("components", "bits"), [(15, 4), (255, 8)])
def test_levels_are_those_of_the_same_rounding_in_torch(components, bits, tmp_path):
    (packed, plain), path = network(components), tmp_path / "net.onnx"
    examples = [torch.randn(4, 3, 9, 9), 1.5 * torch.randn(6, 3, 9, 9)]
    said = export_onnx(packed, examples[0], path, int8_examples=examples)
    form = f"convolution of int{bits} and inputs of 8 bits"
    assert said.packed == dict.fromkeys(["first.weight", "second.weight", "third.weight"], form)

    limits = {}

    def measured(name, x):
        low, high = limits.get(name, (0.0, 0.0))
        limits[name] = min(low, float(x.min())), max(high, float(x.max()))
        return x

    def rounded(name, x):
        low, high = limits[name]
        step = (high - low) / 255
        return torch.fake_quantize_per_tensor_affine(x, step, round(-low / step), 0, 255)

    x = torch.randn(7, 3, 9, 9)
    with torch.no_grad():
        for example in examples:
            plain(example, rounded=measured)
        expected, float32 = plain(x, rounded=rounded), plain(x)
    (y,) = run_onnx(path, x)
    low, high = limits["third"]
    levels = (y - expected).abs() / ((high - low) / 255)
    # Halves of a level may be rounded either way; what is cut off at the ends of the ranges is cut off by both.
    assert float(levels.max()) < 1.5 and float((levels < 0.01).double().mean()) > 0.95
    assert float((y - expected).abs().mean()) < 0.1 * float((y - float32).abs().mean())


def test_runtime_multiplies_integers_and_weights_take_four_bits(tmp_path):
    (packed, _), path = network(15), tmp_path / "net.onnx"
    export_onnx(packed, torch.randn(4, 3, 9, 9), path, int8_examples=[torch.randn(4, 3, 9, 9)])
    model = onnx.load(path)
    onnx.checker.check_model(model, full_check=True)
    codes = {t.name: t for t in model.graph.initializer if t.name.endswith(".codes")}
    assert len(codes) == 3 and {t.data_type for t in codes.values()} == {onnx.TensorProto.INT4}
    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath, options.log_severity_level = str(tmp_path / "run.onnx"), 3
    onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    operators = [node.op_type for node in onnx.load(tmp_path / "run.onnx").graph.node]
    assert operators.count("QLinearConv") == 3 and "Conv" not in operators


def test_refusals(tmp_path):
    x = torch.randn(4, 3, 9, 9)
    sentence = "No convolution has whole numbers times a scale of each output, .*: compress with grid: uniform"
    with pytest.raises(NetworkError, match=sentence):
        export_onnx(network(15, on_no_grid)[0], x, tmp_path / "net.onnx", int8_examples=[x])
    for examples in ([], [x * np.nan]):
        with pytest.raises(NetworkError, match="none gives finite numbers: give some inputs of data"):
            export_onnx(network(15)[0], x, tmp_path / "net.onnx", int8_examples=examples)
    assert not list(tmp_path.iterdir())
