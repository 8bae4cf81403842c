"""A prior of your own, in one file: a spike and a slab of two Gaussians, one narrow and one wide.

A distribution of single weights is all that is needed: it then trains with a KL from draws. A formula for the
KL, or for a bound of it, takes the place of the draws by one registration.

    python examples/own_prior.py
"""

import math

import pyro
import torch
from pyro.distributions import MixtureSameFamily, Normal
from torch import nn
from torch.distributions import Categorical, kl_divergence

from sqs_pyro import SQSELBO, BayesianNetwork, SpikeAndSlab, SpikeGMMGuide
from sqs_pyro.distributions import SpikeGMM, gate_divergence, kl_bound, register_bound


class ScaleMixture(SpikeAndSlab):
    """``(1-λ) δ₀ + λ (½ N(0, 0.1²) + ½ N(0, 1))``: most weights are small, a few may be large."""

    scales = torch.tensor([0.1, 1.0])

    def __init__(self, inclusion):
        slab = MixtureSameFamily(Categorical(torch.ones(2)), Normal(torch.zeros(2), self.scales))
        super().__init__(inclusion, slab)

    def expand(self, batch_shape, _instance=None):
        return super().expand(batch_shape, self._get_checked_instance(ScaleMixture, _instance))


@register_bound("jensen", SpikeGMM, ScaleMixture)
def _(q, p):  # of each Gaussian of q, the KL to the closer one of the two, which has half the mass
    component = Normal(q.loc.unsqueeze(-1), q.scale.unsqueeze(-1))  # [..., K, 1]
    closer = kl_divergence(component, Normal(0.0, p.scales)).amin(-1)
    slab = (q.responsibilities * (closer + math.log(2))).sum(-1)
    return gate_divergence(q.gates, p.inclusion) + q.gates * slab


pyro.set_rng_seed(0)
x = torch.randn(200, 12)
truth = torch.tensor([3.0, -2.0, 1.0] + [0.1] * 3 + [0.0] * 6)
y = x @ truth + torch.randn(200)
model = BayesianNetwork(nn.Linear(12, 1), ScaleMixture(torch.tensor(0.5)), "gaussian", 200)
guide = SpikeGMMGuide(model, num_components=1)
svi = pyro.infer.SVI(model, guide, pyro.optim.ClippedAdam({"lr": 0.05, "lrd": 0.995}), loss=SQSELBO())
for _ in range(600):
    svi.step(x, y)

draws = pyro.infer.Predictive(model, guide=guide, num_samples=500)(x[:1])["weight"].reshape(500, 12)
for name, row in {"truth": truth, "mean": draws.mean(0), "included": (draws != 0).float().mean(0)}.items():
    print(f"{name:<8}", " ".join(f"{value:5.2f}" for value in row))

# The formula against draws: a bound is never below the KL.
q = pyro.poutine.trace(guide).get_trace(x, y).nodes["weight"]["fn"].base_dist
p, values = model.priors["weight"].base_dist, q.sample((20_000,))
kl = (q.log_prob(values) - p.log_prob(values)).mean(0).sum()
print(f"KL from draws {kl:.2f}, bound {kl_bound(q, p).sum():.2f}")
