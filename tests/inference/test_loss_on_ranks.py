"""The ELBO as a module under DDP and FSDP: two ranks with half a minibatch each, as one with all of it."""

from pathlib import Path

import pytest
import torch
from kits.ranks import run_on_ranks

TRAINING = """
import sys
import pyro
import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
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
    if ranks.size > 1 and sys.argv[3] == "whole":  # codebooks have no gradient while the guide is dense
        loss = DistributedDataParallel(loss, find_unused_parameters=True)
    elif ranks.size > 1:
        mesh = init_device_mesh("cpu", (ranks.size,))
        fully_shard(loss, mesh=mesh)
    torch.manual_seed(ranks.rank)
    optimizer = torch.optim.SGD([p for p in loss.parameters() if p.requires_grad], lr=1e-3, momentum=0.9)
    rows = slice(12 * ranks.rank // ranks.size, 12 * (ranks.rank + 1) // ranks.size)
    for _ in range(4):
        optimizer.zero_grad()
        loss(x[rows], y[rows]).backward()
        optimizer.step()
    state = {**model.state_dict(), **guide.state_dict(prefix="guide.")}
    sharded = [value for value in state.values() if isinstance(value, DTensor)]
    state = {name: value.full_tensor() if isinstance(value, DTensor) else value for name, value in state.items()}
    torch.save({"state": state, "draw": torch.rand(3), "sharded": len(sharded)}, f"{sys.argv[1]}/{ranks.rank}")
"""


def after(place: Path, estimator: str, size: int, how: str = "whole") -> list[dict]:
    run_on_ranks(size, TRAINING, place, estimator, how)
    return [torch.load(place / str(rank)) for rank in range(size)]


@pytest.mark.parametrize("how", ["whole", "sharded"])
def test_two_ranks_with_half_a_minibatch_are_one_with_all_of_it(how: str, tmp_path: Path):
    (alone,), (first, second) = (after(tmp_path, "straight_through", size, how) for size in (1, 2))
    assert bool(first["sharded"]) == (how == "sharded")
    for name, value in alone["state"].items():
        torch.testing.assert_close(first["state"][name], value, rtol=1e-4, atol=1e-6)
        assert torch.equal(first["state"][name], second["state"][name])


def test_draws_differ_and_parameters_do_not(tmp_path: Path):
    first, second = after(tmp_path, "local", 2)
    assert not torch.equal(first["draw"], second["draw"])
    for name, value in first["state"].items():
        assert torch.equal(second["state"][name], value)
