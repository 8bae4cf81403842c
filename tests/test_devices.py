"""Nothing assumes a CPU: the whole path on a device that refuses to mix."""

from pathlib import Path

import pytest
from kits import forks

from sqs_pyro.errors import RecipeError
from sqs_pyro.runs.files import inspect_file


def test_a_device_where_nothing_is_built_is_refused():
    with pytest.raises(RecipeError, match=r"--device cuda is where a network is, but none is built .*--runtime"):
        inspect_file("packed.safetensors", device="cuda")


@pytest.mark.slow
def test_every_path_on_another_device():
    # In a process of its own: torch knows one such device for good.
    inside = Path(__file__).with_name("on_other_device.py")
    forks.run_tests(inside, environment={}, imported=forks.LIBRARY)
