"""Packages that only some users need: which extra brings each, and one sentence where it is missing."""

from collections.abc import Iterator
from contextlib import contextmanager

from sqs_pyro.errors import MissingPackageError

#: Import name of a package, and the extra of ``pip install 'sqs-pyro[extra]'`` that brings it.
EXTRAS = {
    "accelerate": "transformers",
    "coremltools": "coreml",
    "compressed_tensors": "compressed-tensors",
    "datasets": "text",
    "executorch": "executorch",
    "gguf": "gguf",
    "laplace": "peers",
    "lm_eval": "harness",
    "matplotlib": "plots",
    "mlflow": "loggers",
    "onnx": "onnx",
    "onnx_ir": "onnx",
    "onnxruntime": "onnx",
    "onnxscript": "onnx",
    "openvino": "openvino",
    "peft": "adapters",
    "PIL": "vision",
    "pyarrow": "tables",
    "sklearn": "vision",
    "tensorboard": "loggers",
    "timm": "timm",
    "torchao": "torchao",
    "torchmetrics": "metrics",
    "torchvision": "vision",
    "transformers": "transformers",
    "typer": "cli",
    "wandb": "loggers",
}


@contextmanager
def needed_for(purpose: str, otherwise: str = "") -> Iterator[None]:
    """Import optional packages inside; the sentence about one that is not there, or too old, says what brings it.

    Args:
        purpose: what needs them, in the plural: "Pictures".
        otherwise: what else would do: "give a file".

    Raises:
        MissingPackageError: a package of :data:`EXTRAS` is not installed, or has not what is imported.
    """
    try:
        yield
    except ImportError as error:
        package = (error.name or "").partition(".")[0]
        if package not in EXTRAS:  # a broken installation, or a bug: its own words say more
            raise
        missing = isinstance(error, ModuleNotFoundError)
        why = "which is not installed" if missing else f"but another version of it ({error})"
        repair = f"pip install 'sqs-pyro[{EXTRAS[package]}]'" + (f", or {otherwise}" if otherwise else "")
        # `name` as Python's own error has it, for programs that look for it.
        sentence = f"{purpose} need the package {package!r}, {why}: {repair}."
        raise MissingPackageError(sentence, name=package) from None
