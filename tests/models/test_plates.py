"""Weights drawn in plates: so many networks, each right, in the shapes Pyro expects."""

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import Predictive, RenyiELBO, Trace_ELBO
from torch import nn

from sqs_pyro import SQSELBO, BayesianNetwork, SpikeGMMGuide
from sqs_pyro.models import HierarchicalInclusion, LearnedPrior
from sqs_pyro.models.stacked import StackedDistribution, plates_around

S, B = 3, 5
X, Y = torch.linspace(-1, 1, B * 8).view(B, 1, 8), torch.arange(B) % 3


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv1d(1, 4, 3), nn.BatchNorm1d(4), nn.ReLU(), nn.Flatten(), nn.Linear(24, 3))


def pair(prior=None, **options):
    model = BayesianNetwork(network(), prior=prior, num_data=20)
    return model, SpikeGMMGuide(model, num_components=3, **{"estimator": "straight_through", **options})


def gradients(guide, loss) -> dict[str, torch.Tensor]:
    guide.zero_grad()
    loss.backward()
    return {name: p.grad.clone() for name, p in guide.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("prior", [lambda: None, LearnedPrior, lambda: dist.Normal(0.0, 0.3)])
@pytest.mark.parametrize("options", [{}, {"groups": "channel"}, {"stage": "dense"}, {"estimator": "soft"}])
@pytest.mark.parametrize("elbo", [SQSELBO, Trace_ELBO])
def test_vectorized_particles_are_particles(prior, options, elbo):
    if options.get("groups") == "channel" and elbo is Trace_ELBO:
        pytest.skip("one combination of many")
    model, guide = pair(prior(), **options)
    model.eval()  # statistics that move make each loss another one
    each = elbo(num_particles=S)
    together = elbo(num_particles=S, vectorize_particles=True, max_plate_nesting=1)
    losses = [loss.differentiable_loss(model, guide, X, Y) for loss in (each, together)]
    torch.testing.assert_close(*losses)
    torch.testing.assert_close(*(gradients(guide, loss) for loss in losses), rtol=1e-3, atol=1e-4)


def test_particles_of_a_random_estimator_differ():
    model, guide = pair(estimator="concrete", initial_gate=0.0, temperature=1.0)
    trace = poutine.trace(pyro.plate("particles", S, dim=-2)(guide)).get_trace(X, Y)
    draws = trace.nodes["0.weight"]["value"]
    assert draws.shape == (S, 1, 4, 1, 3)
    assert not torch.equal(draws[0], draws[1])
    elbo = SQSELBO(num_particles=S, vectorize_particles=True, max_plate_nesting=1)
    assert elbo.differentiable_loss(model, guide, X, Y).isfinite()


def test_random_inclusions_in_plates():
    model, guide = pair(HierarchicalInclusion(scope="global"))
    elbo = SQSELBO(num_particles=S, vectorize_particles=True, max_plate_nesting=1)
    assert elbo.differentiable_loss(model, guide, X, Y).isfinite()


def test_renyi_bound():
    model, guide = pair()
    assert math.isfinite(RenyiELBO(num_particles=2).loss_and_grads(model, guide, X, Y))


@pytest.mark.parametrize("parallel", [False, True])
def test_predictive_gives_what_each_drawn_network_answers(parallel):
    model, guide = pair(temperature=3.0, initial_gate=0.5)
    sites = (*guide.site_guides(), "logits", "obs")
    samples = Predictive(model, guide=guide, num_samples=S, return_sites=sites, parallel=parallel)(X)
    assert samples["obs"].shape == (S, B) and samples["logits"].shape == (S, B, 3)
    net = network().eval()
    for s in range(S):
        with torch.no_grad():
            for name in guide.site_guides():
                parameter = net.get_parameter(name)
                parameter.copy_(samples[name][s].reshape(parameter.shape))
        torch.testing.assert_close(net(X), samples["logits"][s])
    assert not torch.equal(samples["logits"][0], samples["logits"][1])


def test_posterior_samples_in_parallel():
    model, _ = pair()
    given = {name: torch.randn(S, *value.shape) for name, value in model.site_values().items()}
    each, together = (Predictive(model, given, return_sites=("logits",), parallel=p)(X) for p in (False, True))
    torch.testing.assert_close(each["logits"], together["logits"])


def test_a_plate_of_networks_beside_the_examples():
    """A plate of the user's own at the right: examples go to its left."""
    model, _ = pair()
    with poutine.trace() as tracer, pyro.plate("ensemble", S, dim=-1):
        model.eval()(X, Y)
    logits = tracer.trace.nodes["logits"]["value"]
    assert logits.shape == (B, S, 3)
    tracer.trace.compute_log_prob(site_filter=lambda name, site: name == "obs")
    expected = torch.distributions.Categorical(logits=logits).log_prob(Y.unsqueeze(-1))
    torch.testing.assert_close(tracer.trace.nodes["obs"]["log_prob"], 20 / B * expected)


class TestStackedDistribution:
    def distributions(self):
        loc = torch.randn(2, S, 4, 3)
        return loc, [dist.Normal(loc[i, j], 1.0).to_event(1) for i in range(2) for j in range(S)]

    @pytest.mark.parametrize(("plates", "dim"), [((2, S, 1), -1), ((2, 1, S), -2), ((1, 2, S), -3)])
    def test_against_the_same_law_written_out(self, plates, dim):
        loc, distributions = self.distributions()
        plain = dist.Normal(loc.movedim(2, dim - 1), 1.0).to_event(1)
        distribution = StackedDistribution(distributions, torch.Size(plates), dim)
        assert distribution.batch_shape == plain.batch_shape and distribution.event_shape == plain.event_shape
        for value in (plain.sample(), plain.sample((5,)), torch.zeros(3)):
            torch.testing.assert_close(distribution.log_prob(value), plain.log_prob(value))
        assert distribution.sample((7,)).shape == plain.sample((7,)).shape
        torch.manual_seed(0)
        assert float((distribution.sample((400,)).mean(0) - plain.mean).abs().max()) < 0.3

    def test_places(self):
        assert plates_around(torch.Size([S]), -1) == (S, 1)  # Predictive(parallel=True)
        assert plates_around(torch.Size([S, 1]), -1) == (S, 1)
        assert plates_around(torch.Size([S]), -2) == (1, S)
        assert plates_around(torch.Size(), -1) == (1,)
