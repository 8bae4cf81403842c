"""Packages of Core ML, op by op: what coremltools evaluates, and which bytes the weights take."""

import importlib
import sys

import numpy as np
import pytest
import torch
from kits.packed_exports import CODES, INPUTS, packed
from torch import nn

from sqs_pyro.errors import MissingPackageError, OutputError
from sqs_pyro.exporting import export_coreml
from sqs_pyro.exporting.coreml import is_coreml_export
from sqs_pyro.kernels import packed_network
from sqs_pyro.packing.stored import stored_weights
from sqs_pyro.testing.layouts import random_coded

coremltools = pytest.importorskip("coremltools")

CHECKED = [("residual", "2 bits"), ("words", "whole numbers of 4 bits, scales of parts")]
OTHERS = [(kind, codes) for kind in INPUTS for codes in CODES if (kind, codes) not in CHECKED]
#: What makes a weight of each kind of codes, and bits of a weight, or of a non-zero beside its place.
FORMS = {
    "2 bits": "constexpr_sparse_to_dense",
    "4 bits": "constexpr_sparse_to_dense",
    "8 bits": "constexpr_sparse_to_dense",
    "no zeros": "constexpr_lut_to_dense",
    "256 values and zeros": "constexpr_lut_to_dense",
    "codebooks of channels": "constexpr_lut_to_dense",
    "scales": "constexpr_blockwise_shift_scale",
    "whole numbers of 2 bits": "constexpr_blockwise_shift_scale",
    "whole numbers of 4 bits": "constexpr_blockwise_shift_scale",
    "whole numbers of 8 bits": "constexpr_blockwise_shift_scale",
    "scales of parts": "constexpr_blockwise_shift_scale",
    "whole numbers of 4 bits, scales of parts": "constexpr_blockwise_shift_scale",
}


def example(kind):
    return {"tokens": INPUTS[kind].int()} if kind == "words" else INPUTS[kind]


@pytest.mark.parametrize(
    ("kind", "codes"), [*CHECKED, *(pytest.param(*other, marks=pytest.mark.slow) for other in OTHERS)]
)
def test_every_weight_is_made_from_its_codes(kind, codes, tmp_path):
    net, out = packed(kind, codes), tmp_path / "net.mlpackage"
    said = export_coreml(net, example(kind), out)
    assert said.packed.keys() | said.decoded.keys() == stored_weights(net).keys()
    assert set(said.decoded.values()) <= {"256 values and zero"}
    assert is_coreml_export(out) and not list(out.glob("*debug*"))
    # Read again, from the file alone: protobuf to MIL, and every constant expression by NumPy.
    program = loaded(out)
    made = {
        op.name: np.asarray(op.materialized_val_inference())
        for op in program.functions["main"].operations
        if op.op_type.startswith("constexpr") and len(op.outputs) == 1
    }
    kinds = {op.op_type for op in program.functions["main"].operations}
    assert FORMS[codes] in kinds
    for name in said.packed:
        dense = stored_weights(net)[name].coded().dense().numpy()
        equal = [value for value in made.values() if value.shape == dense.shape and np.array_equal(value, dense)]
        assert equal, name
    weights = sum(weight.coded().codes.numel() for weight in stored_weights(net).values())
    size = (out / "Data" / "com.apple.CoreML" / "weights" / "weight.bin").stat().st_size
    assert size < 4 * weights or codes in ("8 bits", "256 values and zeros")


@pytest.mark.slow
def test_parts_that_are_no_whole_inputs_are_decoded(tmp_path):
    net = nn.Sequential(nn.Conv2d(3, 4, 2), nn.Flatten(), nn.Linear(4, 2)).eval()
    coded = {"0.weight": random_coded((4, 3, 2, 2), 5, scales=2), "2.weight": random_coded((2, 4), 5, scales=2)}
    said = export_coreml(packed_network(net, coded), torch.randn(4, 3, 2, 2), tmp_path / "net.mlpackage")
    assert said.decoded == {"0.weight": "scales of parts that are no whole inputs"} and list(said.packed) == [
        "2.weight"
    ]


def loaded(package):
    """The program of a package, with the weights that stand in its file."""
    frontend = importlib.import_module("coremltools.converters.mil.frontend.milproto.load")
    model = coremltools.models.MLModel(str(package), skip_model_load=True)
    spec = model.get_spec()
    return frontend.load(spec, spec.specificationVersion, str(package / "Data" / "com.apple.CoreML" / "weights"))


@pytest.mark.slow
def test_dimensions_stay_dynamic(tmp_path):
    out = tmp_path / "net.mlpackage"
    export_coreml(packed("words", "4 bits"), example("words"), out)
    (tokens,) = coremltools.models.MLModel(str(out), skip_model_load=True).get_spec().description.input
    ranges = tokens.type.multiArrayType.shapeRange.sizeRanges
    assert len(ranges) == 2 and all(each.upperBound == -1 or each.upperBound > 100 for each in ranges)


def test_names(tmp_path):
    with pytest.raises(OutputError, match=r"suffix \.onnx, but format coreml writes \.mlpackage"):
        export_coreml(packed("words", "4 bits"), example("words"), tmp_path / "net.onnx")


def test_what_is_not_installed_is_said(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "coremltools", None)
    sentence = r"Packages of Core ML need the package 'coremltools', .* pip install 'sqs-pyro\[coreml\]'"
    with pytest.raises(MissingPackageError, match=sentence):
        export_coreml(packed("words", "4 bits"), example("words"), tmp_path / "net.mlpackage")
