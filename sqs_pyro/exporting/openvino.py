"""Networks of OpenVINO, with codes of 2, 4 and 8 bits where its products take them."""

import importlib
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from sqs_pyro.atomic import merging
from sqs_pyro.exporting.exported import Exported
from sqs_pyro.exporting.installed import check_installed
from sqs_pyro.exporting.onnx import export_onnx
from sqs_pyro.exporting.suffixes import check_suffix
from sqs_pyro.exporting.trace import named_arrays, one_sentence

_NETWORK = "network.xml"
#: Options without which OpenVINO computes in bfloat16, and rounds inputs of products with codes to 8 bits, where
#: the processor can.
EXACT = {"INFERENCE_PRECISION_HINT": "f32", "DYNAMIC_QUANTIZATION_GROUP_SIZE": 0}


def export_openvino(packed: nn.Module, inputs: Any, directory: str | Path) -> Exported:
    """Write a network of OpenVINO, ``network.xml`` and ``network.bin``, with a dynamic batch.

    It is translated from the model of :func:`~sqs_pyro.exporting.export_onnx`. Products with whole numbers times
    scales, of outputs or of parts of a multiple of 16 inputs, multiply with the codes, as OpenVINO's own
    compressed weights do, embeddings look up codes; other weights are codes in the file, and decoded once when the
    network is compiled.

    Args:
        packed: a packed network on the CPU.
        inputs: an example of a minibatch, two rows or more.
        directory: made if it is missing.

    Raises:
        NetworkError: as of ``export_onnx``, or OpenVINO cannot translate the network.
        MissingPackageError: openvino, onnx or onnxscript is not installed.
        OutputError: its name has a file's suffix, or it cannot be written.
    """
    check_suffix(directory, "openvino", directory=True)
    check_installed("openvino", "openvino")
    with tempfile.TemporaryDirectory() as place, merging(Path(directory), last=_NETWORK) as made:
        model = Path(place, "network.onnx")
        exported = export_onnx(packed, inputs, model, two_bits=False)  # UINT2 it cannot read
        with one_sentence("translated to OpenVINO"):
            translate(model, made)
    return exported


def translate(model: Path, directory: Path) -> None:
    """Write what a model of ONNX is as a network of OpenVINO, its codes as they are."""
    openvino: Any = importlib.import_module("openvino")
    # Read, for `convert_model` would decode weights; not to float16, which would be another network.
    openvino.save_model(openvino.Core().read_model(model), directory / _NETWORK, compress_to_fp16=False)


def run_openvino(directory: str | Path, inputs: Any) -> tuple[Tensor, ...]:
    """Run a network of OpenVINO on the CPU, in float32.

    Args:
        directory: of the network.
        inputs: a minibatch; the network has the inputs' names or, of tensors in a row, their order.

    Returns:
        The network's outputs.

    Raises:
        MissingPackageError: openvino is not installed.
    """
    check_installed("openvino", "openvino")
    openvino: Any = importlib.import_module("openvino")
    compiled = openvino.Core().compile_model(Path(directory, _NETWORK), "CPU", EXACT)
    found = compiled(named_arrays(inputs, (name for value in compiled.inputs for name in value.names)))
    return tuple(torch.from_numpy(found[value].copy()) for value in compiled.outputs)
