"""Arguments of inference that are of another type than they should be."""

import pytest
import torch

import sqs_pyro
from sqs_pyro import BayesianNetwork, SpikeGMMGuide
from sqs_pyro.errors import SQSError
from sqs_pyro.inference import GuideMixture, NaturalGradient
from sqs_pyro.models import LearnedPrior, LearnedSlab


def small(**options):
    net = torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.Tanh(), torch.nn.Linear(3, 2))
    return SpikeGMMGuide(BayesianNetwork(net, num_data=8), 2, **options)


@pytest.mark.parametrize(
    ("call", "sentence"),
    [
        (lambda: small(init=3), "init is 3, but must be Tensors by names of sites"),
        (lambda: small(init={"0.weight": 1.0}), "init is .* but must be Tensors by names"),
        (lambda: small(coded=[1]), r"coded is \[1\], but must be CodedTensors by names"),
        (lambda: small(temperature=None), "temperature is None, but must be positive"),
        (lambda: small(gate_temperature=None), "gate_temperature is None, but must be positive"),
        (lambda: small().quantiles(0.5), "quantiles are 0.5, but must be numbers between 0 and 1"),
        (lambda: small().quantiles("a"), "quantiles are 'a', but"),
        (lambda: small().quantiles([]), r"quantiles are \[\], but"),
        (lambda: GuideMixture(small()), "was given one SpikeGMMGuide, but takes a list"),
        (lambda: NaturalGradient(None), "was given a NoneType, but steps a SpikeGMMGuide"),
        (lambda: LearnedSlab("a"), "inclusion is 'a', but must be above 0 and below 1"),
        (lambda: LearnedPrior([0.1, 0.2]), r"inclusion is \[0.1, 0.2\], but must be above 0"),
        (lambda: sqs_pyro.diagnose(small().model, 3), "was given a int without a SpikeGMMGuide"),
        (lambda: sqs_pyro.load(None), "A packed file's path is needed, but None was given"),
    ],
)
def test_what_is_of_another_type_is_refused_in_one_sentence(call, sentence):
    with pytest.raises(SQSError, match=sentence) as refused:
        call()
    assert "\n" not in str(refused.value)
