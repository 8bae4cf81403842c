"""Public functions do the same in odd states of the process and leave them as they were, as ``compress`` does."""

import inspect
from functools import cache
from typing import Any

import pyro
import pytest
import sympy  # noqa: F401  torch imports it late, and it adds a filter of warnings
from kits.ambient import AMBIENT
from kits.outcome import outcome
from kits.public_calls import CALLS, SIGNATURE_OF
from torch import nn

import sqs_pyro
from sqs_pyro.testing.untouched import untouched

FUNCTIONS = [
    name
    for name in CALLS
    if inspect.isfunction(getattr(sqs_pyro, SIGNATURE_OF.get(name, name))) and name != "compress"
]
DRAWS = {"pack_ensemble", "elbo_report"}  # go on from torch's random state, as documented


@pytest.fixture(scope="module")
def usual(tmp_path_factory):
    @cache
    def observed(name: str) -> Any:
        arguments = CALLS[name].usual(tmp_path_factory.mktemp("usual"))
        pyro.set_rng_seed(0)
        return outcome(CALLS[name].observe, **arguments)

    return observed


@pytest.mark.parametrize("ambient", AMBIENT)
@pytest.mark.parametrize("name", FUNCTIONS)
def test_same_result_and_surroundings(name, ambient, usual, tmp_path):
    if name in DRAWS and ambient == "random states":
        pytest.skip("draws are to differ")
    expected, arguments = usual(name), CALLS[name].usual(tmp_path)
    networks = [value for value in arguments.values() if isinstance(value, nn.Module)]
    pyro.set_rng_seed(0)
    with AMBIENT[ambient](), untouched(*networks):
        found = outcome(CALLS[name].observe, **arguments)
    assert found == expected
