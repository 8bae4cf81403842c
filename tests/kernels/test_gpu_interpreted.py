"""The GPU kernels on CPU tensors: Triton's interpreter, which has to be asked for before Triton is imported."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from kits.gpu import HAS_TRITON

SUITE = Path(__file__).parent / "gpu"


def interpret(*options):
    command = [sys.executable, "-m", "pytest", *map(str, options), "-p", "no:cacheprovider"]
    environment = {**os.environ, "TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""}
    result = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert result.returncode == 0 and "passed" in result.stdout, (result.stdout + result.stderr)[-5000:]
    assert "skipped" not in result.stdout, result.stdout[-2000:]


pytestmark = pytest.mark.skipif(not HAS_TRITON, reason="no Triton")


def test_some_modules():
    interpret(SUITE / "test_gpu_modules.py", "-k", "test_linear_and_embedding and dtype1")


@pytest.mark.slow
def test_modules():
    interpret(SUITE / "test_gpu_modules.py", "-k", "not cuda_graph")


@pytest.mark.slow
def test_products():
    interpret(SUITE / "test_gpu_products.py")
