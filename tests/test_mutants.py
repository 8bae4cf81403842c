"""The faults of ``mutants.py`` can still be put in."""

import pytest
from mutants import FAULTS, ROOT, mutated


@pytest.mark.parametrize("name", FAULTS)
def test_the_place_of_a_fault_is_there(name):
    fault = FAULTS[name]
    content = (ROOT / "sqs_pyro" / fault.file).read_text()
    assert mutated(content, fault) != content
    assert all((ROOT / "tests" / test).exists() for test in fault.tests)
