"""A small share of the fuzzers; `make fuzz` runs all of them."""

import json
import os
import subprocess
import sys
from pathlib import Path

from fuzz.kinds import KINDS


def test_damaged_files_are_refused_in_one_sentence_or_read_right(tmp_path):
    """In a process of its own, which is forked: threads and kernels of this one stay out of it."""
    path = os.pathsep.join([str(Path(__file__).parents[1]), *sys.path])
    ours = {"PYTHONPATH": path, "SQS_KERNELS": "reference", "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "fuzz", "--cases", "60", "--seed", "1", "--out", str(tmp_path / "found.json")]
    done = subprocess.run(command, env={**os.environ, **ours}, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads((tmp_path / "found.json").read_text())
    assert list(found) == [kind.name for kind in KINDS]
    for name, each in found.items():
        assert sum(each["counts"].values()) == (60 if name == "packed" else 20), name
        assert each["counts"].get("refused", 0) + each["counts"].get("right", 0) > 0, name
