"""Run a compiled network: needs only torch, and is copied into every export as run.py.

python run.py INPUTS.pt OUTPUTS.pt    INPUTS.pt holds a tuple of tensors, OUTPUTS.pt will.
"""

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch


def load(directory: Path) -> Callable[..., Any]:
    """Load ``model.pt2``; the operators that it calls come first."""
    # Before the package, which looks its operators up by name while it loads.
    for library in sorted(directory.glob("libsqs_*.so")):
        torch.ops.load_library(library)
    return torch._inductor.aoti_load_package(str(directory / "model.pt2"))


def main(inputs: str, outputs: str) -> None:
    """Run the network beside this file once."""
    network = load(Path(__file__).parent)
    with torch.inference_mode():
        found = network(*torch.load(inputs))
    torch.save((found,) if isinstance(found, torch.Tensor) else tuple(found), outputs)  # always a tuple


if __name__ == "__main__":
    main(*sys.argv[1:])
