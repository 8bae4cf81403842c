"""A network that knows where it has seen nothing: regression on a sine, with a gap in the data.

A trained network is one curve. Here every weight and every bias has a posterior, so that there are many curves,
which agree where there are data and part where there are none. The noise of the data is learned, too. In this
posterior weights are independent of each other: in the gap such a family is too sure (Foong et al. 2020).

    python examples/bnn_regression.py [band.png]
"""

import sys

import pyro
import torch
from pyro.distributions import Normal
from torch import nn

from sqs_pyro import SQSELBO, BayesianNetwork, SpikeAndSlab, SpikeGMMGuide
from sqs_pyro.models import LearnedGaussian

pyro.set_rng_seed(0)
x = torch.cat([torch.linspace(-2.2, -0.7, 60), torch.linspace(0.7, 2.2, 60)]).unsqueeze(1)
y = torch.sin(2 * x) + 0.1 * torch.randn(120, 1)

# A network as anyone trains it; the posterior starts there.
net = nn.Sequential(nn.Linear(1, 16), nn.ReLU(), nn.Linear(16, 1))
adam = torch.optim.Adam(net.parameters(), 0.01)
for _ in range(1000):
    adam.zero_grad()
    nn.functional.mse_loss(net(x), y).backward()
    adam.step()

# include=".*" makes biases random as well; a weight is zero with probability 0.1.
prior = SpikeAndSlab(torch.tensor(0.9), Normal(0.0, 1.0))
model = BayesianNetwork(net, prior, LearnedGaussian(0.3), num_data=len(x), include=".*")
guide = SpikeGMMGuide(model, num_components=1)
svi = pyro.infer.SVI(model, guide, pyro.optim.ClippedAdam({"lr": 0.02, "lrd": 0.997}), loss=SQSELBO())
for _ in range(800):
    svi.step(x, y)

# Curves are at "logits"; "obs" has the noise as well.
places = torch.linspace(-4, 4, 161).unsqueeze(1)
draws = pyro.infer.Predictive(model, guide=guide, num_samples=100)(places)
mean, sd = draws["logits"].mean(0).squeeze(1), draws["logits"].std(0).squeeze(1)

distance, truth = places.abs().squeeze(1), torch.sin(2 * places).squeeze(1)
within, beyond = (distance >= 0.7) & (distance <= 2.2), distance > 2.2
covered = ((truth - mean).abs() < 2 * sd)[within].float().mean()
print(f"noise: {model.likelihood.scale.item():.2f}, truth: 0.10")
print(f"truth within two standard deviations where there are data: {covered:.0%}")
print(f"standard deviation of the curve within the data: {sd[within].mean():.3f}, beyond: {sd[beyond].mean():.3f}")

if len(sys.argv) > 1:
    from matplotlib import pyplot

    low, high = draws["obs"].squeeze(2).quantile(torch.tensor([0.05, 0.95]), dim=0)
    pyplot.fill_between(places.squeeze(1), low, high, alpha=0.3, label="90 % of new observations")
    pyplot.plot(places, mean, label="mean of all curves")
    pyplot.plot(x, y, ".", color="black", label="data")
    pyplot.legend()
    pyplot.savefig(sys.argv[1])
