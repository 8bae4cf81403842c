"""Every argument of every public call has an effect: another value changes what comes out, or is refused."""

import inspect
from functools import cache
from typing import Any

import pyro
import pytest
from kits.outcome import outcome
from kits.public_calls import CALLS, SIGNATURE_OF, Call, Together

import sqs_pyro


def parameters(name: str) -> list[str]:
    value = getattr(sqs_pyro, SIGNATURE_OF.get(name, name))
    names = list(inspect.signature(value.__init__ if inspect.isclass(value) else value).parameters)
    return [name for name in names if name != "self"]


def test_every_public_call_is_in_the_table():
    without_arguments = {"CompressionResult"}  # made by compress
    assert {SIGNATURE_OF.get(name, name) for name in CALLS} == set(sqs_pyro.__all__) - without_arguments


@pytest.mark.parametrize("name", CALLS)
def test_every_argument_is_in_the_table(name, tmp_path):
    assert set(CALLS[name].other(tmp_path)) == set(parameters(name))


@pytest.fixture(scope="module")
def usual(tmp_path_factory):
    @cache
    def observed(name: str) -> Any:
        return repeatable(CALLS[name], CALLS[name].usual(tmp_path_factory.mktemp("usual")))

    return observed


def repeatable(call: Call, arguments: dict[str, Any]) -> Any:
    pyro.clear_param_store()
    pyro.set_rng_seed(0)
    return outcome(call.observe, **arguments)


@pytest.mark.parametrize(("name", "argument"), [(name, each) for name in CALLS for each in parameters(name)])
def test_it_has_an_effect(name, argument, usual, tmp_path):
    call = CALLS[name]
    assert usual(name)[0] != "refused", usual(name)
    value = call.other(tmp_path)[argument]
    changed = value if isinstance(value, Together) else {argument: value}
    assert repeatable(call, {**call.usual(tmp_path), **changed}) != usual(name)
