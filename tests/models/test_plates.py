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


class TestTheGuideByDefault:
    """Its draws are random, so that particles agree in their mean alone."""

    def made(self):
        torch.manual_seed(0)
        net = nn.Sequential(nn.Linear(8, 6), nn.Tanh(), nn.Linear(6, 3))
        model = BayesianNetwork(net, num_data=20, include=".*")
        return model, SpikeGMMGuide(model, initial_gate=1.0, init_scale=0.5)

    def test_vectorized_particles_have_the_same_mean(self):
        model, guide = self.made()
        together = SQSELBO(num_particles=200, vectorize_particles=True, max_plate_nesting=1)
        loss = SQSELBO()(model, guide)
        single = torch.stack([loss(X.flatten(1), Y).detach() for _ in range(60)])
        bound = 5 * float(single.std()) * (1 / 60 + 1 / 200) ** 0.5
        assert abs(together.loss(model, guide, X.flatten(1), Y) - single.mean()) < bound
        assert abs(together(model, guide)(X.flatten(1), Y).detach() - single.mean()) < bound

    def test_vectorized_gradients_have_the_same_mean(self):
        model, guide = self.made()
        found = []
        for vectorized in (False, True):
            options = {"vectorize_particles": True, "max_plate_nesting": 1} if vectorized else {}
            elbo = SQSELBO(num_particles=80, **options)
            gradient = gradients(guide, elbo.differentiable_loss(model, guide, X.flatten(1), Y))
            found.append({name: grad for name, grad in gradient.items() if "gate" in name or "latent" in name})
        scale = max(float(grad.abs().max()) for grad in found[0].values())
        for name, grad in found[0].items():
            torch.testing.assert_close(found[1][name], grad, atol=0.35 * scale, rtol=0)

    def test_losses_that_are_summed(self):
        """Two tasks of one guide's network, say: gradients of the sum are the sums of gradients."""
        model, guide = self.made()
        loss = SQSELBO()(model, guide)
        torch.manual_seed(0)
        total = gradients(guide, loss(X.flatten(1), Y) + loss(X.flatten(1) + 1, Y))
        torch.manual_seed(0)
        parts = [gradients(guide, loss(x, Y)) for x in (X.flatten(1), X.flatten(1) + 1)]
        for name, grad in total.items():
            torch.testing.assert_close(grad, parts[0][name] + parts[1][name])

    @pytest.mark.parametrize("parallel", [False, True])
    def test_predictive_draws_networks_of_q(self, parallel):
        model, guide = self.made()
        sites = (*guide.site_names, "logits")
        samples = Predictive(model, guide=guide, num_samples=150, return_sites=sites, parallel=parallel)(
            X.flatten(1)
        )
        drawn = samples["0.weight"].reshape(150, 6, 8)
        torch.testing.assert_close(drawn.mean(0), guide.mean()["0.weight"], atol=0.25, rtol=0)
        assert abs(float((drawn != 0).float().mean()) - float(torch.sigmoid(torch.tensor(1.0)))) < 0.03
        for s in (0, 149):  # the logits are those of the drawn network
            values = {name: samples[name][s].reshape(guide.site_guides()[name].shape) for name in guide.site_names}
            expected = torch.func.functional_call(model.net, values, (X.flatten(1),))
            torch.testing.assert_close(samples["logits"][s].reshape(B, 3), expected)


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


class TestALikelihoodThatSamples:
    """Its sites have one value a network, as they have where networks are drawn one by one."""

    @pytest.fixture
    def model(self):
        net = nn.Sequential(nn.Linear(8, 4), nn.Tanh(), nn.Linear(4, 1))

        def likelihood(output):
            scale = pyro.sample("scale", dist.LogNormal(0.0, 1.0))
            shift = pyro.sample("shift", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            return dist.Normal(scale * output[..., 0] + shift.sum(), 1e-4)

        return BayesianNetwork(net, num_data=20, likelihood=likelihood, include=".*")

    @pytest.mark.parametrize("parallel", [False, True])
    def test_predictions(self, model, parallel):
        x = X.view(B, 8)
        found = Predictive(model, {}, num_samples=S, parallel=parallel)(x)
        scale, shift = found["scale"].reshape(S, 1), found["shift"].reshape(S, 2).sum(1, keepdim=True)
        expected = scale * found["logits"].reshape(S, B) + shift
        torch.testing.assert_close(found["obs"].reshape(S, B), expected, atol=1e-3, rtol=0)
        assert len(scale.unique()) == S

    def test_vectorized_particles(self, model):
        guide = pyro.infer.autoguide.AutoDelta(model)
        x, y = X.view(B, 8), torch.zeros(B)
        losses = []
        for vectorized in (False, True):
            elbo = Trace_ELBO(num_particles=S, vectorize_particles=vectorized, max_plate_nesting=1)
            losses.append(elbo.loss(model, guide, x, y))
        assert losses[0] == pytest.approx(losses[1], rel=1e-5)
