"""Packed networks in forms that other programs run: plain checkpoints, AOTInductor packages, ONNX models, ..."""

from sqs_pyro.exporting.aoti import export_aoti
from sqs_pyro.exporting.coreml import export_coreml
from sqs_pyro.exporting.dense import export_dense
from sqs_pyro.exporting.executorch import export_executorch
from sqs_pyro.exporting.exported import Exported
from sqs_pyro.exporting.onnx import export_onnx
from sqs_pyro.exporting.openvino import export_openvino
from sqs_pyro.exporting.torchao import export_torchao

__all__ = [
    "Exported",
    "export_aoti",
    "export_coreml",
    "export_dense",
    "export_executorch",
    "export_onnx",
    "export_openvino",
    "export_torchao",
]
