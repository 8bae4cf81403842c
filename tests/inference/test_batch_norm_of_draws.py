"""Draws of a network with batch norm: running statistics spoil them, their own do not, and `diagnose` says so."""

import pyro
import pytest
import torch
from pyro.infer import SVI, Predictive

from sqs_pyro import SQSELBO, BayesianNetwork, SpikeGMMGuide, diagnose
from sqs_pyro.compression.baseline import BaselineRecipe, train_baseline
from sqs_pyro.data import DataRecipe, load_data
from sqs_pyro.evaluation.averaging import averaged_network
from sqs_pyro.evaluation.classification import evaluate
from sqs_pyro.inference import NaturalGradient
from sqs_pyro.networks.registry import build_network


@pytest.fixture(scope="module")
def inferred():
    torch.manual_seed(0)
    data = load_data(DataRecipe(name="digits", batch_size=64, validation=300))
    net = build_network("digits_net", width=8)
    train_baseline(net, data.train, None, BaselineRecipe(epochs=8))
    model = BayesianNetwork(net, num_data=960)
    guide = SpikeGMMGuide(model)
    steps = 12 * len(data.train)
    optim = NaturalGradient(guide, 0.02, 0.01, steps=steps, gates_from=steps, others_args={"lr": 1e-3})
    svi = SVI(model, guide, optim, SQSELBO())
    with pyro.get_param_store().scope():
        for _ in range(12):
            for x, y in data.train:
                svi.step(x, y)
    return model.eval(), guide, data


@pytest.mark.slow
def test_draws_need_statistics_of_their_own(inferred):
    model, guide, data = inferred
    with pytest.warns(UserWarning, match="batch_norm_batches=15"):
        shared = averaged_network(model.net, guide, 10, seed=0)
    own = averaged_network(model.net, guide, 10, seed=0, loader=data.train, batch_norm_batches=8)
    assert evaluate(own, data.test).nll < 0.8 * evaluate(shared, data.test).nll


def test_predictive_takes_them_from_training_inputs(inferred):
    model, guide, data = inferred
    x, y = next(iter(data.test))

    def nll():
        torch.manual_seed(0)
        logits = Predictive(model, guide=guide, num_samples=10)(x)["logits"].reshape(10, len(x), -1)
        return float(torch.nn.functional.nll_loss(logits.softmax(-1).mean(0).log(), y))

    guide._warned = False
    with pytest.warns(UserWarning, match=r"set model.batch_norm_inputs to a minibatch of training inputs"):
        shared = nll()
    before = {name: value.clone() for name, value in model.net.named_buffers()}
    model.batch_norm_inputs = torch.cat([x for x, _ in data.train])[:256]
    try:
        assert nll() < 0.8 * shared
        assert "shared_batch_norm" not in kinds(model, guide)
    finally:
        model.batch_norm_inputs = None
    assert nll() == shared
    assert all(torch.equal(value, before[name]) for name, value in model.net.named_buffers())


def kinds(model, guide):
    return [found.kind for found in diagnose(model, guide)]


def test_diagnose_says_so(inferred):
    model, guide, _ = inferred
    (found,) = [found for found in diagnose(model, guide) if found.kind == "shared_batch_norm"]
    q = guide.get_posterior()[found.site]
    assert found.measured == pytest.approx((q.mean.norm() / q.variance.sum().sqrt()).item(), rel=1e-5)
    assert "loader=train, batch_norm_batches=15" in found.sentence


def test_nothing_is_said_of_narrow_draws_or_without_batch_norm(inferred):
    model, _, _ = inferred
    assert "shared_batch_norm" not in kinds(model, SpikeGMMGuide(model, init_scale=1e-3, initial_gate=15.0))
    plain = BayesianNetwork(torch.nn.Linear(6, 3), num_data=10)
    assert "shared_batch_norm" not in kinds(plain, SpikeGMMGuide(plain, init_scale=1.0))
