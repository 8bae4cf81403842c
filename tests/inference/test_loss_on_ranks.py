"""The ELBO as a module under DistributedDataParallel: two ranks with half a minibatch each, as one with all."""

from pathlib import Path

import torch
from kits.ranks import run_on_ranks

TRAINING = """
import sys
import pyro
import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from sqs_pyro import BayesianNetwork, SpikeGMMGuide, SQSELBO
from sqs_pyro.ranks import started

torch.manual_seed(0)
net = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 2))
x, y = torch.randn(12, 4), torch.arange(12) % 2
model = BayesianNetwork(net, num_data=120)
guide = SpikeGMMGuide(model, 3, estimator=sys.argv[2])  # which are draws that differ, and which are none
with started() as ranks:
    loss = SQSELBO()(model, guide)
    if ranks.size > 1:
        loss = DistributedDataParallel(loss, find_unused_parameters=True)  # codebooks, while the guide is dense
    torch.manual_seed(ranks.rank)
    optimizer = torch.optim.SGD([p for p in loss.parameters() if p.requires_grad], lr=1e-3, momentum=0.9)
    rows = slice(12 * ranks.rank // ranks.size, 12 * (ranks.rank + 1) // ranks.size)
    for _ in range(4):
        optimizer.zero_grad()
        loss(x[rows], y[rows]).backward()
        optimizer.step()
    state = {**model.state_dict(), **guide.state_dict(prefix="guide.")}
    torch.save({"state": state, "draw": torch.rand(3)}, f"{sys.argv[1]}/{sys.argv[2]}-{ranks.size}-{ranks.rank}")
"""


def after(place: Path, estimator: str, size: int) -> list[dict]:
    run_on_ranks(size, TRAINING, place, estimator)
    return [torch.load(place / f"{estimator}-{size}-{rank}") for rank in range(size)]


def test_two_ranks_with_half_a_minibatch_are_one_with_all_of_it(tmp_path: Path):
    (alone,), (first, second) = (after(tmp_path, "straight_through", size) for size in (1, 2))
    for name, value in alone["state"].items():
        torch.testing.assert_close(first["state"][name], value, rtol=1e-4, atol=1e-6)
        assert torch.equal(first["state"][name], second["state"][name])


def test_draws_differ_and_parameters_do_not(tmp_path: Path):
    first, second = after(tmp_path, "local", 2)
    assert not torch.equal(first["draw"], second["draw"])
    for name, value in first["state"].items():
        assert torch.equal(second["state"][name], value)
