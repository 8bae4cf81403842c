"""Nothing assumes a CPU: the whole path on a device that refuses to mix."""

from pathlib import Path

import pytest
from kits import forks


@pytest.mark.slow
def test_every_path_on_another_device():
    # In a process of its own: torch knows one such device for good.
    inside = Path(__file__).with_name("on_other_device.py")
    forks.run_tests(inside, environment={}, imported=forks.LIBRARY)
