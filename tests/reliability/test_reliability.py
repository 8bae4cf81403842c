"""A small share of what `make reliability` does."""

import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent


@pytest.mark.slow
@pytest.mark.parametrize("script", [("kill.py", "--count", "8"), ("full_disk.py", "--moments", "3")])
def test_same_bytes_and_nothing_left_over(script):
    found = subprocess.run([sys.executable, HERE / script[0], *script[1:]], capture_output=True, text=True)
    assert found.returncode == 0, found.stdout + found.stderr
