"""How far one step moves what learns."""

import pytest
import torch
from torch import nn

from sqs_pyro.compression.finetune.optimizers import make_gradients_dense, optimizers
from sqs_pyro.compression.finetune.recipe import CompressionRecipe
from sqs_pyro.inference.elbo import SQSELBO
from sqs_pyro.inference.guides.spike_gmm import SpikeGMMGuide
from sqs_pyro.models import BayesianNetwork


@pytest.fixture
def model():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(8, 6), nn.LayerNorm(6), nn.Linear(6, 3))
    with torch.no_grad():
        net[2].weight.mul_(100)
    return BayesianNetwork(net, include=[r"^[02]\.weight$"])


def first_step(model, **keys):
    """Parameters before and behind one step at the highest learning rate, gradients of 3 everywhere."""
    recipe = CompressionRecipe(**keys)
    guide = SpikeGMMGuide(model, 3, estimator="straight_through")
    found = optimizers(model, guide, recipe)
    learning = [p for optimizer in found for group in optimizer.param_groups for p in group["params"]]
    before = [p.detach().clone() for p in learning]
    for parameter in learning:
        parameter.grad = torch.full_like(parameter, 3.0)
    for optimizer in found:
        for group in optimizer.param_groups:
            group["lr"] = group["highest_lr"]
        optimizer.step()
    return guide, list(zip(learning, before, strict=True))


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_everything_that_learns_moves_once(model, optimizer):
    guide, moved = first_step(model, optimizer=optimizer, weight_decay=0.0)
    names = {id(p): name for name, p in [*model.named_parameters(), *guide.named_parameters()]}
    found = [names[id(p)] for p, _ in moved]
    assert len(set(found)) == len(found)
    assert sum("latent" in name for name in found) == sum("loc" in name for name in found) == 2
    assert {name for name, p in model.named_parameters() if p.requires_grad} <= set(found)
    assert all((p != before).all() for p, before in moved)


def test_adamw_steps_by_the_learning_rate(model):
    """Its first step does not depend on the gradient's size."""
    guide, moved = first_step(model, optimizer="adamw", learning_rate=1e-2, weight_decay=0.0)
    before = {id(p): value for p, value in moved}
    for site in guide.site_guides().values():
        latent = site.latent_unconstrained
        start = before[id(latent)]
        torch.testing.assert_close(start - latent, torch.full_like(start, 1e-2), atol=1e-6, rtol=1e-3)


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_decay_shrinks_matrices_alone_and_by_the_learning_rate(model, optimizer):
    keys = {"optimizer": optimizer, "learning_rate": 1e-2, "momentum": 0.0}
    _, plain = first_step(model, **keys, weight_decay=0.0)
    values = [p.detach().clone() for p, _ in plain]
    with torch.no_grad():
        for p, before in plain:
            p.copy_(before)
    _, decayed = first_step(model, **keys, weight_decay=0.5)
    latents = [p for p, _ in decayed if p.dim() > 1 and p.shape in ((6, 8), (3, 6))]
    assert len(latents) == 2
    for (p, before), without in zip(decayed, values, strict=True):
        expected = without - 1e-2 * 0.5 * before if any(p is latent for latent in latents) else without
        torch.testing.assert_close(p.detach(), expected)


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_complex_and_sparse_gradients_move_what_is_not_compressed(optimizer):
    class Spectral(nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.words, self.linear = nn.Embedding(9, 8, sparse=True), nn.Linear(8, 3)
            self.response = nn.Parameter(torch.randn(5, dtype=torch.cfloat))

        def forward(self, words):
            seen = torch.fft.rfft(self.words(words).mean(1)) * self.response
            return self.linear(torch.fft.irfft(seen, n=8))

    model = BayesianNetwork(Spectral(), num_data=6)
    guide = SpikeGMMGuide(model, 3, estimator="straight_through")
    found = optimizers(model, guide, CompressionRecipe(optimizer=optimizer, learning_rate=0.01))
    own = {"words": model.net.words.weight, "response": model.net.response}
    before = {name: value.detach().clone() for name, value in own.items()}
    SQSELBO().terms(model, guide, torch.arange(6).view(3, 2), torch.arange(3)).loss.backward()
    make_gradients_dense(found)
    for each in found:
        each.step()
    assert all((value != before[name]).any() for name, value in own.items())
