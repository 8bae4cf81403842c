"""The GPU kernels on CPU tensors: Triton's interpreter, which has to be asked for before Triton is imported."""

from pathlib import Path

import pytest
from kits import forks
from kits.gpu import HAS_TRITON

SUITE = Path(__file__).parent / "gpu"


def interpret(*options):
    forks.run_tests(*options, environment={"TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""})


pytestmark = pytest.mark.skipif(not HAS_TRITON, reason="no Triton")


SOME = "test_linear_and_embedding and dtype1"


@pytest.mark.slow
def test_some_modules():
    interpret(SUITE / "test_gpu_modules.py", "-k", SOME)


@pytest.mark.slow
def test_other_modules():
    interpret(SUITE / "test_gpu_modules.py", "-k", f"not cuda_graph and not ({SOME})")


@pytest.mark.slow
def test_products():
    interpret(SUITE / "test_gpu_products.py")
