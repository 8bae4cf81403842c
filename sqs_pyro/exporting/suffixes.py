"""Names of what is exported: a suffix says what is in a file, or the file is not written."""

from pathlib import Path

from sqs_pyro.errors import OutputError

_FILES = {
    "dense": ".safetensors",
    "onnx": ".onnx",
    "onnx-qdq": ".onnx",
    "gguf": ".gguf",
    "coreml": ".mlpackage",
    "torchao": ".pt",
    "executorch": ".pte",
}
_KNOWN = (*_FILES.values(), ".pth", ".pt2", ".bin", ".so", ".zip", ".json", ".xml")


def is_one_file(export_format: str) -> bool:
    """Return whether a format is known by a suffix, and is no directory of any name."""
    return export_format in _FILES


def check_suffix(path: str | Path, export_format: str, *, directory: bool) -> None:
    """Check that the name of an export does not say that it is something else.

    Args:
        path: its name; one without a suffix is always right.
        export_format: by its name.
        directory: whether a directory is written, whose name may have any suffix that is not a known file's.

    Raises:
        OutputError: it does.
    """
    suffix = Path(path).suffix.lower()
    if not suffix:
        return
    if directory:
        # "model.v2" is a fine name of a directory.
        if suffix in _KNOWN:
            raise OutputError(
                f"'{path}' has the suffix {suffix} of a file, but format {export_format} writes a directory here: "
                "leave the suffix out."
            )
    elif suffix != _FILES[export_format]:
        raise OutputError(
            f"'{path}' has the suffix {suffix}, but format {export_format} writes {_FILES[export_format]}: "
            "correct the suffix or the format."
        )
