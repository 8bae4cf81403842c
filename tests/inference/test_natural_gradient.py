"""Natural-gradient steps against the sum over all models, and against what stationarity says of gates."""

import itertools
import math
from functools import cache

import pyro
import pytest
import torch
from torch import nn

from sqs_pyro import SQSELBO, BayesianNetwork, SpikeAndSlab, SpikeGMMGuide
from sqs_pyro.errors import ArgumentError, NetworkError
from sqs_pyro.inference import NaturalGradient
from sqs_pyro.models import Gaussian

INCLUSION, SLAB, NOISE = 0.3, 0.8, 0.5


def regression(features=4, rows=40):
    generator = torch.Generator().manual_seed(0)
    x = torch.linalg.qr(torch.randn(rows, features, generator=generator))[0] * rows**0.5  # orthogonal
    truth = torch.tensor([1.0, -0.3, 0.15, 0.0])
    return x, x @ truth + NOISE * torch.randn(rows, generator=generator)


def fitted(x, y, steps, bias=False, slab=None, **options):
    net = nn.Linear(x.shape[1], 1, bias=bias)
    prior = SpikeAndSlab(INCLUSION, slab or pyro.distributions.Normal(0.0, SLAB))
    model = BayesianNetwork(net, prior, Gaussian(NOISE), num_data=len(y))
    guide = SpikeGMMGuide(model)
    optim = NaturalGradient(guide, steps=steps, **options)
    svi = pyro.infer.SVI(model, guide, optim, loss=SQSELBO())
    for _ in range(steps):
        svi.step(x, y[:, None])
    return model, guide, optim


def all_models(x, y):
    """Inclusion probabilities and the log evidence, by the Gaussian density of y under every model."""
    logs, models = [], list(itertools.product([0.0, 1.0], repeat=x.shape[1]))
    for model in models:
        covariance = SLAB**2 * (x * torch.tensor(model)) @ x.T + NOISE**2 * torch.eye(len(y))
        density = torch.distributions.MultivariateNormal(torch.zeros(len(y)), covariance).log_prob(y)
        size = sum(model)
        logs.append(density + size * math.log(INCLUSION) + (len(model) - size) * math.log(1 - INCLUSION))
    joint = torch.stack(logs)
    return joint.softmax(0) @ torch.tensor(models), joint.logsumexp(0)


@pytest.fixture(scope="module")
def converged():
    """Model and guide that 400 steps have brought to where nothing moves any more, by their slab."""

    @cache
    def of(slab):
        torch.manual_seed(0)
        with pyro.get_param_store().scope():
            return fitted(*regression(), 400, slab=slab)[:2]

    return of


def test_orthogonal_features_have_their_inclusion_probabilities(converged):
    x, y = regression()
    inclusion, evidence = all_models(x, y)
    model, guide = converged(None)
    (site,) = guide.site_guides().values()
    assert (site.gates()[0] - inclusion).abs().max() < 1e-3
    kl = SQSELBO().terms(model, guide, x, y[:, None]).kl.item()
    weight = torch.stack([draw["weight"][0] for draw in guide.draw_weights(20_000)])
    density = torch.distributions.Normal(weight @ x.T, NOISE).log_prob(y).sum(1)
    losses = kl - density
    assert abs(losses.mean() + evidence) < 4 * losses.std() / 20_000**0.5 + 0.05


@pytest.mark.parametrize("slab", [None, pyro.distributions.StudentT(4.0, 0.0, 0.6)], ids=["normal", "student"])
def test_gates_are_where_their_gradient_is_zero(converged, slab):
    # ∂ELBO/∂λ = 0 given the stationarity of w and s:
    # logit λ = logit λ₀ + w ∂κ/∂w + (s² - w²) ∂κ/∂s² - κ with κ = KL(N(w, s²)‖slab), whatever the slab.
    _, guide = converged(slab)
    (site,) = guide.site_guides().values()
    w, square = site.latent.detach().requires_grad_(), site.latent_scale.detach().square().requires_grad_()
    other = slab or pyro.distributions.Normal(0.0, SLAB)
    kl = torch.distributions.kl_divergence(torch.distributions.Normal(w, square.sqrt()), other)
    to_w, to_square = torch.autograd.grad(kl.sum(), (w, square))
    wanted = math.log(INCLUSION / (1 - INCLUSION)) + w * to_w + (square - w.square()) * to_square - kl
    torch.testing.assert_close(site.gates().detach(), wanted.detach().sigmoid(), atol=1e-3, rtol=0)


@pytest.mark.slow
def test_adam_comes_to_the_same():
    torch.manual_seed(0)
    x, y = regression()
    _, natural, _ = fitted(x, y, 800)
    net = nn.Linear(4, 1, bias=False)
    prior = SpikeAndSlab(INCLUSION, pyro.distributions.Normal(0.0, SLAB))
    model = BayesianNetwork(net, prior, Gaussian(NOISE), num_data=len(y))
    guide = SpikeGMMGuide(model)
    optim = pyro.optim.ClippedAdam({"lr": 0.1, "lrd": 0.01 ** (1 / 1500)})
    svi = pyro.infer.SVI(model, guide, optim, loss=SQSELBO())
    for _ in range(1500):
        svi.step(x, y[:, None])
    (site,), (other,) = guide.site_guides().values(), natural.site_guides().values()
    torch.testing.assert_close(site.gates(), other.gates(), atol=0.05, rtol=0)
    kept = other.gates() > 0.9
    torch.testing.assert_close(site.latent[kept], other.latent[kept], atol=0.03, rtol=0)
    torch.testing.assert_close(site.latent_scale[kept], other.latent_scale[kept], atol=0, rtol=0.1)


def test_other_parameters_are_optimized_too():
    torch.manual_seed(0)
    x, y = regression()
    model, _, _ = fitted(x, y + 3, 200, bias=True, others_args={"lr": 0.1})
    assert model.net.bias.item() == pytest.approx(3, abs=0.4)


def test_goes_on_from_its_state(tmp_path):
    x, y = regression()

    def steps(model, guide, optim, count):
        svi = pyro.infer.SVI(model, guide, optim, loss=SQSELBO())
        for _ in range(count):
            svi.step(x, y[:, None])

    def made():
        torch.manual_seed(0)
        model = BayesianNetwork(nn.Linear(4, 1), likelihood=Gaussian(NOISE), num_data=len(y))
        guide = SpikeGMMGuide(model)
        return model, guide, NaturalGradient(guide, steps=20)

    whole = made()
    torch.manual_seed(1)
    steps(*whole, 5)
    kept = [part.state_dict() for part in whole[:2]], whole[2].get_state(), torch.get_rng_state()
    torch.save(kept, tmp_path / "kept.pt")
    kept = torch.load(tmp_path / "kept.pt")
    steps(*whole, 5)
    pyro.clear_param_store()
    again = made()
    for part, state in zip(again[:2], kept[0], strict=True):
        part.load_state_dict(state)
    again[2].set_state(kept[1])
    torch.set_rng_state(kept[2])
    steps(*again, 5)
    for name, value in whole[1].state_dict().items():
        torch.testing.assert_close(again[1].state_dict()[name], value, rtol=0, atol=0)


def test_pruned_weights_stay_pruned():
    torch.manual_seed(0)
    x, y = regression()
    model = BayesianNetwork(nn.Linear(4, 1, bias=False), likelihood=Gaussian(NOISE), num_data=len(y))
    guide = SpikeGMMGuide(model)
    guide.prune({"weight": torch.tensor([[True, False, True, True]])})
    svi = pyro.infer.SVI(model, guide, NaturalGradient(guide), loss=SQSELBO())
    for _ in range(20):
        svi.step(x, y[:, None])
    (site,) = guide.site_guides().values()
    assert site.gates()[0, 1] == 0 and site.latent.isfinite().all() and site.gates().isfinite().all()


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"learning_rate": 0.0}, "learning_rate is 0.0, but must be above 0 and at most 1"),
        ({"width_rate": 2}, "width_rate is 2, but must be above 0 and at most 1"),
        ({"momentum": 1.0}, "momentum is 1.0, but must be at least 0 and below 1"),
        ({"steps": 0}, "steps is 0, but must be at least 1"),
        ({"gates_from": -1}, "gates_from is -1, but must be a number of steps"),
    ],
)
def test_impossible_rates(options, sentence):
    guide = SpikeGMMGuide(BayesianNetwork(nn.Linear(4, 1), likelihood="gaussian"))
    with pytest.raises(ArgumentError, match=sentence):
        NaturalGradient(guide, **options)


@pytest.mark.parametrize("options", [{"estimator": "straight_through"}, {"stage": "coded"}], ids=str)
def test_guides_without_widths_are_refused(options):
    guide = SpikeGMMGuide(BayesianNetwork(nn.Linear(4, 4), likelihood="gaussian"), 2, **options)
    with pytest.raises(NetworkError, match="a width for each weight, which this guide does not have"):
        NaturalGradient(guide)


def test_coding_ends_it():
    x, y = regression()
    model = BayesianNetwork(nn.Linear(4, 1), likelihood=Gaussian(NOISE), num_data=len(y))
    guide = SpikeGMMGuide(model, 2)
    svi = pyro.infer.SVI(model, guide, NaturalGradient(guide), loss=SQSELBO())
    svi.step(x, y[:, None])
    guide.start_coding()
    with pytest.raises(NetworkError, match="take another optimizer once it is coded"):
        svi.step(x, y[:, None])


def test_gates_take_no_other_temperature():
    guide = SpikeGMMGuide(BayesianNetwork(nn.Linear(4, 1), likelihood="gaussian"), gate_temperature=0.5)
    with pytest.raises(NetworkError, match="leave it at 1"):
        NaturalGradient(guide)
