"""Networks of OpenVINO: the packed network's outputs, and products that multiply with codes."""

import math
import sys
from xml.etree import ElementTree

import pytest
import torch
from kits.packed_exports import INPUTS, first_rows, packed

from sqs_pyro.errors import MissingPackageError, OutputError
from sqs_pyro.exporting import export_openvino
from sqs_pyro.exporting.openvino import EXACT, run_openvino
from sqs_pyro.packing.stored import stored_weights

pytest.importorskip("onnxscript")
pytest.importorskip("openvino")

CHECKED = [("words", "whole numbers of 4 bits, scales of parts", {"u4"})]
OTHERS = [
    ("residual", "scales", {"u4"}),
    ("residual", "2 bits", {"u4"}),
    ("residual", "256 values and zeros", {"u8", "u4"}),
    ("residual", "scales of parts", {"u4"}),
    ("words", "whole numbers of 4 bits", {"u4"}),
    ("words", "whole numbers of 2 bits", {"u2"}),
    ("words", "whole numbers of 8 bits", {"u8"}),
    ("words", "4 bits", {"u4"}),
    ("residual", "codebooks of channels", {"u4"}),
    ("residual", "whole numbers of 4 bits", {"u4"}),
]


@pytest.mark.parametrize(
    ("kind", "codes", "types"), [*CHECKED, *(pytest.param(*other, marks=pytest.mark.slow) for other in OTHERS)]
)
def test_the_packed_networks_outputs_and_types_of_codes(kind, codes, types, tmp_path):
    net, x = packed(kind, codes), INPUTS[kind]
    said = export_openvino(net, {"tokens": x} if kind == "words" else x, tmp_path / "network")
    assert set(said.packed) == set(stored_weights(net)) and not said.decoded
    assert sorted(path.name for path in (tmp_path / "network").iterdir()) == ["network.bin", "network.xml"]
    for rows in (4, 1, 7):
        some = first_rows(x, rows)
        (y,) = run_openvino(tmp_path / "network", {"tokens": some} if kind == "words" else some)
        expected = net(some).detach()
        torch.testing.assert_close(y, expected, rtol=1e-4, atol=1e-5 * float(expected.abs().max()))
    layers = ElementTree.parse(tmp_path / "network" / "network.xml").getroot().iter("layer")
    constants = [layer.find("data").attrib for layer in layers if layer.attrib["type"] == "Const"]
    assert {each["element_type"] for each in constants} >= types
    if codes.startswith("whole") and kind == "words":  # products with codes while it runs, but for 24 inputs
        assert types <= products(tmp_path / "network")
    # No weight stands there decoded.
    shapes = [each["shape"].split(",") for each in constants if each["element_type"] == "f32"]
    floats = {math.prod(int(size) for size in shape if size) for shape in shapes}
    assert not floats & {weight.coded().codes.numel() for weight in stored_weights(net).values()}


def products(directory):
    """Types of the weights that matrix products have in the compiled network."""
    import openvino

    compiled = openvino.Core().compile_model(directory / "network.xml", "CPU", EXACT)
    found = [
        op for op in compiled.get_runtime_model().get_ops() if op.get_rt_info()["layerType"] == "FullyConnected"
    ]
    return {op.input(1).get_element_type().get_type_name() for op in found}


def test_names(tmp_path):
    with pytest.raises(OutputError, match=r"suffix \.xml of a file, but format openvino writes a directory"):
        export_openvino(packed("words", "4 bits"), INPUTS["words"], tmp_path / "network.xml")


def test_what_is_not_installed_is_said(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "openvino", None)
    sentence = r"OpenVINO networks need the package 'openvino', .* pip install 'sqs-pyro\[openvino\]'"
    with pytest.raises(MissingPackageError, match=sentence):
        export_openvino(packed("words", "4 bits"), INPUTS["words"], tmp_path / "network")
