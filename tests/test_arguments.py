"""Every argument of every public call has an effect: another value changes what comes out, or is refused."""

import inspect
from functools import cache
from typing import Any

import pyro
import pytest
import torch
from kits.outcome import outcome
from kits.public_calls import CALLS, SIGNATURE_OF, Call, Together, data, posterior

import sqs_pyro
from sqs_pyro.errors import ArgumentError, RecipeError, SQSError
from sqs_pyro.evaluation.averaging import averaged_network


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


def swapped() -> Any:
    guide = posterior()
    return sqs_pyro.elbo_report(guide, guide.model, *data())


def reported(**arguments: Any) -> Any:
    guide = posterior()
    return sqs_pyro.elbo_report(guide.model, guide, *data(), **arguments)


@pytest.mark.parametrize(
    ("call", "sentence"),
    [
        (
            lambda: sqs_pyro.SpikeGMMGuide(posterior().model, "16", estimator="straight_through"),
            "num_components is '16', but must be 1 to 256",
        ),
        (
            lambda: sqs_pyro.SpikeGMMGuide(posterior().model, 2.5, estimator="straight_through"),
            "num_components is 2.5",
        ),
        (lambda: posterior(temperature="warm"), "temperature is 'warm', but must be positive"),
        (lambda: posterior(temperature=float("inf")), "temperature is inf"),
        (lambda: posterior(refresh_every=1.5), "refresh_every is 1.5, but must be at least 1 step"),
        (lambda: posterior(spike_scale="wide"), "spike_scale is 'wide', but must be positive"),
        (lambda: posterior(groups=[8]), r"groups=\[8\] does not fit layer"),
        (lambda: sqs_pyro.SQSELBO(num_particles="2"), "num_particles must be at least 1, but got '2'"),
        (lambda: sqs_pyro.SQSELBO(kl_weight="cold"), "kl_weight must be a finite number >= 0, but got 'cold'"),
        (lambda: sqs_pyro.PruningSchedule("half", 10), "target non-zero rate is 'half'"),
        (lambda: sqs_pyro.PruningSchedule(0.5, 10.5), r"total_steps=10\.5"),
        (lambda: sqs_pyro.PruningSchedule(0.5, 10, end=None), "ends at None of the steps"),
        (
            lambda: sqs_pyro.BayesianNetwork(torch.nn.Linear(9, 2), num_data="100"),
            "num_data is '100', but must be",
        ),
        (lambda: reported(temperatures=0.5), "temperatures is 0.5, but must be a list of numbers"),
        (lambda: reported(temperatures=("warm",)), "a temperature is 'warm', but must be positive"),
        (lambda: reported(num_samples="16"), "num_samples is '16', but must be at least 2"),
        (swapped, "give the model first, then its guide"),
        (lambda: sqs_pyro.pack_ensemble(posterior(), 2.5), r"num_samples is 2\.5, but must be a whole number"),
        (lambda: averaged_network(posterior().model.net, posterior(), "5"), "num_samples is '5', but must be at"),
    ],
)
def test_arguments_of_another_type_are_refused_in_a_sentence(call, sentence):
    with pytest.raises(SQSError, match=sentence) as refusal:
        call()
    assert "\n" not in str(refusal.value)


def test_who_catches_what_arguments_raised_before_still_does():
    with pytest.raises(RecipeError) as refusal:
        sqs_pyro.SQSELBO(num_particles=0)
    assert type(refusal.value) is ArgumentError and isinstance(refusal.value, ValueError)
