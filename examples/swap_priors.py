"""The same network under five priors: a prior is one argument, everything else stays.

A small classifier of handwritten digits is trained as usual, and gets a posterior under each prior. The table
shows what the priors do: how many weights the posterior keeps, and how good an average is on new digits.

    python examples/swap_priors.py
"""

import copy

import pyro
import torch
from torch import nn

from sqs_pyro import SQSELBO, BayesianNetwork, SpikeGMMGuide
from sqs_pyro.data.digits import load_digits
from sqs_pyro.models import HierarchicalInclusion, LearnedPrior, normal_prior, scale_matched_prior

PRIORS = {
    "Gaussian, no spike": normal_prior(),
    "spike and Gaussian": scale_matched_prior(0.2),
    "spike and Laplace": scale_matched_prior(0.2, "laplace"),
    "random inclusion": HierarchicalInclusion(),
    "learned from the weights": LearnedPrior(),
}

digits = load_digits()
x, y = digits.train_images.flatten(1), digits.train_labels
x_test, y_test = digits.test_images.flatten(1), digits.test_labels

pyro.set_rng_seed(0)
trained = nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10))
adam = torch.optim.Adam(trained.parameters(), 0.01)
for _ in range(200):
    adam.zero_grad()
    nn.functional.cross_entropy(trained(x), y).backward()
    adam.step()

print(f"{'prior':<26}{'weights kept':>13}{'accuracy':>10}{'NLL':>8}")
for name, prior in PRIORS.items():
    pyro.set_rng_seed(1)
    model = BayesianNetwork(copy.deepcopy(trained), prior, num_data=len(y))
    guide = SpikeGMMGuide(model, num_components=8)
    svi = pyro.infer.SVI(model, guide, pyro.optim.ClippedAdam({"lr": 0.05, "lrd": 0.99}), loss=SQSELBO())
    for step in range(300):
        batch = slice(step % 5 * 250, step % 5 * 250 + 250)
        svi.step(x[batch], y[batch])
    draws = pyro.infer.Predictive(model, guide=guide, num_samples=20)(x_test)
    probabilities = draws["logits"].softmax(-1).mean(0)
    kept = torch.cat([draws[site].flatten() != 0 for site in model.site_values()]).float().mean()
    accuracy = (probabilities.argmax(-1) == y_test).float().mean()
    nll = nn.functional.nll_loss(probabilities.log(), y_test)
    print(f"{name:<26}{kept:>13.0%}{accuracy:>10.1%}{nll:>8.3f}")
