"""Which features matter? Linear regression with a spike and a slab, beside a truth that is known.

Under a spike-and-slab prior a weight is exactly zero with some probability. Its posterior says of each feature how
probable it is that it matters at all, and how large its weight then is. How many features matter is not given:
the inclusion probability of the prior is learned.

    python examples/spike_and_slab_regression.py
"""

import pyro
import torch
from torch import nn

from sqs_pyro import SQSELBO, BayesianNetwork, SpikeGMMGuide
from sqs_pyro.models import HierarchicalInclusion, LearnedGaussian

pyro.set_rng_seed(0)
features, examples = 20, 100
truth = torch.zeros(features)
truth[[2, 7, 11]] = torch.tensor([1.5, -1.0, 0.4])
x = torch.randn(examples, features)
y = x @ truth + 0.5 * torch.randn(examples)

# The probability that a feature matters has a Beta prior: three of ten weights, with the weight of ten examples.
prior = HierarchicalInclusion(3.0, 7.0, slab_scale=1.0)
model = BayesianNetwork(nn.Linear(features, 1), prior, LearnedGaussian(1.0), num_data=examples)
guide = SpikeGMMGuide(model, num_components=4)
svi = pyro.infer.SVI(model, guide, pyro.optim.ClippedAdam({"lr": 0.05, "lrd": 0.993}), loss=SQSELBO())
for _ in range(500):
    svi.step(x, y)

draws = pyro.infer.Predictive(model, guide=guide, num_samples=1000)(x[:1])["weight"].reshape(-1, features)
inclusion = (draws != 0).float().mean(0)
print("feature  truth  probable  mean if it matters")
for feature in range(features):
    drawn = draws[:, feature]
    mean = drawn[drawn != 0].mean()
    print(f"{feature:7}  {truth[feature]:5.1f}  {inclusion[feature]:8.2f}  {mean:18.2f}")
chosen = (inclusion > 0.5).nonzero().flatten().tolist()
print(f"chosen: {chosen}, truth: {truth.nonzero().flatten().tolist()}")
print(f"noise: {model.likelihood.scale.item():.2f}, truth: 0.50")
