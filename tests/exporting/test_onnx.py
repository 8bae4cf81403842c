"""ONNX models: codes and codebooks inside, the packed network's outputs from ONNX Runtime."""

import math
import sys
from functools import cache
from itertools import cycle

import numpy as np
import pytest
import torch
from kits.packed_exports import CODES, INPUTS, first_rows, packed
from torch import nn

from sqs_pyro.errors import MissingPackageError, NetworkError
from sqs_pyro.exporting import export_onnx
from sqs_pyro.exporting.onnx import run_onnx
from sqs_pyro.kernels import packed_network
from sqs_pyro.packing.stored import stored_weights
from sqs_pyro.testing.layouts import random_coded

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")

OF_PARTS = "whole numbers of 4 bits, scales of parts"
#: The weights that are kept as quantized ones.
QUANTIZED = ("whole numbers of 4 bits", "whole numbers of 8 bits", OF_PARTS)
#: A network each, its weights by each of the codes in turn: an export takes seconds.
CHECKED = [
    ("residual", ("256 values and zeros", "codebooks of channels")),
    ("words", ("scales", "scales of parts")),
    ("words", (OF_PARTS, "whole numbers of 4 bits")),
    ("residual", QUANTIZED),
]
OTHERS = [(kind, (codes,)) for kind, codes in zip(cycle(INPUTS), CODES)]
#: By name the transformer's length is dynamic, too.
EXAMPLES = {"residual": INPUTS["residual"], "words": {"tokens": INPUTS["words"]}}


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """A network, what was exported of it, and the file; each once, for it takes seconds."""

    @cache
    def export(kind, codes):
        net, file = packed(kind, *codes), tmp_path_factory.mktemp("onnx") / "net.onnx"
        return net, export_onnx(net, EXAMPLES[kind], file, quantized=codes == QUANTIZED), file

    return export


@pytest.mark.parametrize(
    ("kind", "codes"), [*CHECKED, *(pytest.param(*other, marks=pytest.mark.slow) for other in OTHERS)]
)
def test_codes_inside_and_the_packed_networks_outputs(kind, codes, exported):
    x, (net, said, file) = INPUTS[kind], exported(kind, codes)
    assert set(said.packed) == set(stored_weights(net)) and not said.decoded
    model = onnx.load(file)
    onnx.checker.check_model(model, full_check=True)
    assert model.graph.input[0].type.tensor_type.shape.dim[0].dim_param == "batch"
    for rows in (4, 1, 7):
        some = first_rows(x, rows)
        if kind == "words":
            some = some[:, : rows + 1]
        (y,) = run_onnx(file, {"tokens": some} if kind == "words" else some)
        expected = net(some).detach()
        torch.testing.assert_close(y, expected, rtol=1e-4, atol=1e-5 * float(expected.abs().max()))
    assert_codes(model, net, codes == QUANTIZED)


def assert_codes(model, net, quantized):
    """Every compressed weight is codes of as many bits as it needs and little more, and decodes to what it is."""
    stored = {tensor.name: tensor for tensor in model.graph.initializer}
    for name, weight in stored_weights(net, every_name=True).items():
        parts = [tensor for key, tensor in stored.items() if key.startswith(f"{name}.")]
        if not parts:  # a shared weight stands under one name
            assert name in ("words.weight", "head.weight")
            continue
        assert name not in stored
        coded = weight.coded()
        if f"{name}.block_scales" in stored:
            assert_blocks(stored, name, coded)
            continue
        values = coded.num_components  # those that a weight has: few weights need not have all
        bits = 2 if values <= 2 else 4 if values <= 16 else 8 if values < 256 else 8 + 2
        numel, values = math.prod(coded.shape), coded.num_groups * (coded.num_components + 1)
        scales = 0 if coded.scales is None else coded.scales.numel()
        around = 96 + 4 * values + (4 if scales <= 64 else 2) * scales
        assert sum(len(tensor.raw_data) for tensor in parts) <= -(-numel * bits // 8) + around
        made = [node.op_type for node in model.graph.node if name in node.output]
        if made:
            found, operators = _decoded(model, name, coded.shape)
            np.testing.assert_array_equal(found, coded.dense().numpy())
            assert ("DequantizeLinear" in operators) == quantized
        else:  # read by rows: the outputs say whether rightly
            codes = onnx.numpy_helper.to_array(stored[f"{name}.codes"])
            assert codes.shape == (len(coded.codes), bits * coded.shape[1] // 8)


def assert_blocks(stored, name, coded):
    """Whole numbers from 0 in the bits that they need, the first lowest, and a scale for each block."""
    codes, scales = (onnx.numpy_helper.to_array(stored[f"{name}.{part}"]) for part in ("blocks", "block_scales"))
    outputs, inputs = coded.shape
    bits = 2 if coded.num_components <= 3 else 4 if coded.num_components <= 15 else 8
    assert f"{name}.codes" not in stored
    each = np.unpackbits(codes, axis=-1, bitorder="little").reshape(outputs, scales.shape[1], -1, bits)
    numbers = (each * 2 ** np.arange(bits)).sum(-1) - 2 ** (bits - 1)
    if scales.shape[1] > 1 and coded.scales.dim() == 2:
        assert scales.size <= 64 or scales.dtype == np.float16
    dense = (numbers * scales[:, :, None].astype(np.float32)).reshape(outputs, -1)
    np.testing.assert_array_equal(dense[:, :inputs], coded.dense().numpy())
    assert not dense[:, inputs:].any() and dense.shape[1] - inputs < 16


def _decoded(model, name, shape):
    """The value of a weight, by the model's own nodes in ONNX Runtime, and the nodes' operators."""
    import onnxruntime

    needed, nodes = {name}, []
    for node in reversed(model.graph.node):
        if needed & set(node.output):
            nodes.insert(0, node)
            needed |= set(node.input)
    kept = [tensor for tensor in model.graph.initializer if tensor.name in needed]
    made = onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, shape)
    part = onnx.helper.make_model(
        onnx.helper.make_graph(nodes, "weight", [], [made], kept),
        opset_imports=model.opset_import,
        ir_version=model.ir_version,
    )
    session = onnxruntime.InferenceSession(part.SerializeToString(), providers=["CPUExecutionProvider"])
    return session.run([name], {})[0], {node.op_type for node in nodes}


def test_zeros_beside_256_values_have_a_mask(exported):
    net, _, file = exported(*CHECKED[0])
    names = {tensor.name for tensor in onnx.load(file).graph.initializer}
    full = {name for name, weight in stored_weights(net).items() if weight.coded().num_components == 256}
    assert full and {name.removesuffix(".mask") for name in names if name.endswith(".mask")} == full


def test_a_shared_weight_is_stored_once(exported):
    *_, file = exported(*CHECKED[1])
    names = [tensor.name for tensor in onnx.load(file).graph.initializer]
    assert len([name for name in names if name in ("words.weight.codes", "head.weight.codes")]) == 1


def test_same_network_same_bytes_and_nothing_of_this_machine(exported, tmp_path):
    kind, codes = CHECKED[0]
    net, _, file = exported(kind, codes)
    export_onnx(net, INPUTS[kind], tmp_path / "second")
    content = file.read_bytes()
    assert content == (tmp_path / "second").read_bytes()
    assert b"site-packages" not in content and b".py" not in content


def test_inputs_by_name(tmp_path):
    class Named(nn.Module):
        def __init__(self):
            super().__init__()
            plain = nn.Sequential(nn.Embedding(41, 16), nn.Linear(16, 5)).eval()
            coded = {"0.weight": random_coded((41, 16), 9, scales=2), "1.weight": random_coded((5, 16), 9)}
            self.inner = packed_network(plain, coded)

        def forward(self, mask, tokens):
            return {"logits": self.inner(tokens) * mask[..., None], "mask": mask}

    net = Named()
    net.packed_metadata = {}
    inputs = {"tokens": INPUTS["words"], "mask": torch.rand(4, 6)}
    export_onnx(net, inputs, tmp_path / "net.onnx")
    shorter = {name: value[:3, :5] for name, value in inputs.items()}
    found = run_onnx(tmp_path / "net.onnx", shorter)
    expected = net(**shorter)
    torch.testing.assert_close(found[0], expected["logits"].detach(), rtol=1e-4, atol=1e-5)
    assert torch.equal(found[1], shorter["mask"])


@pytest.mark.parametrize("missing", ["onnx", "onnxscript"])
def test_what_is_not_installed_is_said(missing, monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, missing, None)
    with pytest.raises(
        MissingPackageError, match=f"'{missing}', which is not installed: pip install 'sqs-pyro\\[onnx\\]'"
    ):
        export_onnx(packed("words", "4 bits"), INPUTS["words"], tmp_path / "net.onnx")


def test_a_network_that_no_graph_can_say(tmp_path):
    class Choosing(nn.Sequential):
        def forward(self, x):
            return super().forward(x) if x.sum() > 0 else x

    net = Choosing(packed("residual", "4 bits"))
    net.packed_metadata = {}
    with pytest.raises(NetworkError, match=r"The network cannot be traced \(.*\): check the example's shape"):
        export_onnx(net, INPUTS["residual"], tmp_path / "net.onnx")
