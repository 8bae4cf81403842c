"""How every script here keeps its figures: as JSON, headed by the command that measured them."""

import json
import shlex
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any


def write_figures(path: Path, figures: Mapping[str, Any]) -> None:
    """Write figures as JSON behind the command line of this process."""
    script = Path(sys.argv[0]).name
    document = {"command": shlex.join(["python", f"benchmarks/{script}", *sys.argv[1:]]), **figures}
    path.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
