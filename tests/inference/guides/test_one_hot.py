"""Draws around the hard network: against that network, its components' widths, straight-through gradients."""

import math

import pyro
import pytest
import torch
from pyro.infer import Predictive
from torch import nn

from sqs_pyro.distributions.local_draw import LocalDraw
from sqs_pyro.inference.elbo import SQSELBO
from sqs_pyro.inference.guides.spike_gmm import SpikeGMMGuide
from sqs_pyro.models import BayesianNetwork

X, Y = torch.randn(6, 5), torch.tensor([0, 1, 2, 0, 1, 2])
NAMES = ("0.weight", "2.weight")


def guide_of(estimator: str = "one_hot", seed: int = 0, **options) -> SpikeGMMGuide:
    torch.manual_seed(seed)
    net = nn.Sequential(nn.Linear(5, 8), nn.ReLU(), nn.Linear(8, 3))
    guide = SpikeGMMGuide(BayesianNetwork(net, num_data=6), 4, estimator=estimator, **options)
    guide.prune({name: site.latent.abs() > 0.1 for name, site in guide.site_guides().items()})
    return guide


def spread(guide: SpikeGMMGuide, name: str) -> torch.Tensor:
    """The width of each weight's component, 0 for zeros, by indexing."""
    site = guide.site_guides()[name]
    widths = site.scale.detach()[0][site.codes[0].long()].view(site.shape)
    return torch.where(site.mask, widths, 0.0)


@pytest.mark.parametrize("stage", ["coded", "frozen"])
def test_a_draw_in_training_knows_the_hard_weights_and_widths(stage):
    guide = guide_of(stage=stage)
    hard = guide.harden(torch.float32)
    for name, value in guide(X, Y).items():
        assert isinstance(value, LocalDraw)
        mean, variance = value.moments
        assert torch.equal(mean, hard[name].dense())
        torch.testing.assert_close(variance, spread(guide, name) ** 2)


DRAWS = 1000


@pytest.mark.parametrize("temperature", [None, 0.25])
def test_draws_in_evaluation_have_these_moments(temperature):
    guide = guide_of(evaluation_temperature=temperature).eval()
    posterior = guide.get_posterior()
    with pyro.plate("draws", DRAWS):  # [DRAWS, 1, 1, ...]: weights of a site belong together
        draws = {name: value.view(DRAWS, *value.shape[-2:]) for name, value in guide().items()}
    for name in NAMES:
        hard, width = guide.harden(torch.float32)[name].dense(), spread(guide, name)
        width = width * math.sqrt(temperature or 1.0)
        torch.testing.assert_close(posterior[name].mean, hard)
        torch.testing.assert_close(posterior[name].variance.sqrt(), width)
        assert not draws[name][:, width == 0].any()
        error = width / math.sqrt(DRAWS)
        assert bool(((draws[name].mean(0) - hard).abs() <= 5 * error).all())
        assert bool(((draws[name].std(0) - width).abs() <= 4 * error).all())


def test_predictive_draws_them_too():
    guide = guide_of()
    values = Predictive(guide.model, guide=guide, num_samples=5, return_sites=("0.weight",))(X)["0.weight"]
    values = values.reshape(5, 8, 5)
    assert bool((values.std(0)[spread(guide, "0.weight") > 0] > 0).all())


def test_without_width_gradients_are_those_of_straight_through():
    def gradients(estimator: str) -> dict[str, torch.Tensor]:
        guide = guide_of(estimator, stage="coded")
        for site in guide.site_guides().values():
            site.scale = torch.full_like(site.scale, 1e-9)
        SQSELBO(kl_weight=0).differentiable_loss(guide.model, guide, X, Y).backward()
        return {name: p.grad for name, p in guide.named_parameters() if "latent" in name or "loc" in name}

    expected = gradients("straight_through")
    for name, gradient in gradients("one_hot").items():
        torch.testing.assert_close(gradient, expected[name])


def test_while_dense_it_is_drawn_around_the_latents():
    guide = guide_of(stage="dense")
    for name, value in guide(X, Y).items():
        site = guide.site_guides()[name]
        mean, variance = value.moments
        assert torch.equal(mean, site.latent * site.mask)
        assert torch.equal(variance > 0, site.mask)


def test_widths_and_mixing_do_not_learn():
    guide = guide_of(stage="coded")
    pyro.clear_param_store()
    SQSELBO().differentiable_loss(guide.model, guide, X, Y).backward()
    for name, parameter in guide.named_parameters():
        if "scale" in name or "mixing" in name:
            assert parameter.grad is None


def test_its_networks_are_coded_together():
    guide = guide_of()
    first, second = guide.draw_networks(2)
    for name in NAMES:
        assert not torch.equal(first[name].codes, second[name].codes)
        assert torch.equal(first[name].codebook, second[name].codebook)
