"""Packages behind a format of exports."""

import importlib
import logging
from collections.abc import Iterator
from contextlib import contextmanager

from sqs_pyro.extras import needed_for

_SPELLED = {
    "onnx": "ONNX models",
    "openvino": "OpenVINO networks",
    "gguf": "GGUF files",
    "coreml": "Packages of Core ML",
    "torchao": "Tensors of torchao",
    "executorch": "Programs of ExecuTorch",
}


def check_installed(export_format: str, *packages: str) -> None:
    """Check that packages behind a format are there.

    Raises:
        MissingPackageError: one is not.
    """
    for name in packages:
        with needed_for(_SPELLED.get(export_format, f"Exports of format {export_format}")), _silent():
            importlib.import_module(name)


@contextmanager
def _silent() -> Iterator[None]:
    """Let no warning be logged inside: torchao tells of each of its libraries that is for another processor."""
    before = logging.root.manager.disable
    logging.disable(max(before, logging.WARNING))
    try:
        yield
    finally:
        logging.disable(before)
