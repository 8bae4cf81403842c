"""Let ``import torchvision`` succeed when its compiled extension does not fit the installed torch.

PyPI's torchvision is built against CUDA; beside a CPU build of torch its extension fails to load, and then
``import torchvision`` (and ``import transformers``, which imports it) dies on the missing operator
``torchvision::nms``. Only the schemas are needed for models, transforms and datasets to work, so they are
declared here, once, and only if the extension cannot load.
"""

import importlib.util
from pathlib import Path

import torch

_SCHEMAS = (
    "nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    "qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
)


def _extension_loads() -> bool:
    spec = importlib.util.find_spec("torchvision")
    if spec is None or spec.origin is None:
        return True  # nothing to repair: torchvision is not installed
    for library in Path(spec.origin).parent.glob("_C*.so"):
        try:
            torch.ops.load_library(str(library))
        except OSError:
            return False
    return True


def _operator_is_declared() -> bool:
    return hasattr(torch.ops.torchvision, "nms")


def declare_missing_operators() -> torch.library.Library | None:
    """Declare torchvision's operator schemas if its extension is unusable; returns the library to keep."""
    if _extension_loads() or _operator_is_declared():
        return None
    library = torch.library.Library("torchvision", "DEF")
    for schema in _SCHEMAS:
        library.define(schema)
    return library


# The declarations live as long as this object does.
_LIBRARY = declare_missing_operators()
