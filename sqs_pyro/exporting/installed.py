"""Packages behind a format of exports."""

import importlib

from sqs_pyro.extras import needed_for

_SPELLED = {
    "onnx": "ONNX models",
    "openvino": "OpenVINO networks",
    "gguf": "GGUF files",
    "coreml": "Packages of Core ML",
}


def check_installed(export_format: str, *packages: str) -> None:
    """Check that packages behind a format are there.

    Raises:
        MissingPackageError: one is not.
    """
    for name in packages:
        with needed_for(_SPELLED.get(export_format, f"Exports of format {export_format}")):
            importlib.import_module(name)
