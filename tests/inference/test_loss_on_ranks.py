"""The ELBO as a module under DDP, FSDP and on divided sites: two ranks with half a minibatch each, as one."""

from pathlib import Path

import pytest
import torch
from kits.ranks import run_on_ranks
from torch import nn

from sqs_pyro import BayesianNetwork, SpikeGMMGuide

TRAINING = """
import sys
import pyro
import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from sqs_pyro import BayesianNetwork, SpikeGMMGuide, SQSELBO, elbo_report
from sqs_pyro.errors import SQSError
from sqs_pyro.inference import EqualMass, PruningSchedule
from sqs_pyro.models import LearnedPrior, shard_sites
from sqs_pyro.ranks import started


def masks_of_nan(guide):
    saliencies = guide.saliencies()
    if ranks.rank == 1:  # which the others hear of
        saliencies["2.weight"].to_local()[0] = torch.nan
    return PruningSchedule(0.5, 1).masks(saliencies, 1)


REFUSED = [
    lambda model, guide, x, y: guide.get_posterior(),
    lambda model, guide, x, y: SpikeGMMGuide(model, 3, grid="uniform"),
    lambda model, guide, x, y: guide.prune({"0.weight": torch.ones(9, 4)}),
    lambda model, guide, x, y: masks_of_nan(guide),
    lambda model, guide, x, y: elbo_report(model, guide, x, y),
    lambda model, guide, x, y: SpikeGMMGuide(model, 3, windows=EqualMass(2)),
    lambda model, guide, x, y: SpikeGMMGuide(model, 3, groups=6),
    lambda model, guide, x, y: shard_sites(model, model.mesh),
    lambda model, guide, x, y: shard_sites(guide, model.mesh),
    lambda model, guide, x, y: shard_sites(BayesianNetwork(nn.Linear(4, 3), LearnedPrior()), model.mesh),
]


def whole(value):
    return value.full_tensor() if isinstance(value, DTensor) else value


def trained(estimator, how):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 9), nn.Tanh(), nn.Linear(9, 2))
    x, y = torch.randn(12, 4), torch.arange(12) % 2
    model = BayesianNetwork(net, num_data=120)
    if how == "rows":
        shard_sites(model, mesh=init_device_mesh("cpu", (ranks.size,)))
    guide = SpikeGMMGuide(model, 3, estimator=estimator)  # which are draws that differ, and which are none
    loss = SQSELBO()(model, guide)
    # Gates are equal: of the first site all weights are kept, of the second the first 13 of 18.
    first = {} if how == "sharded" else PruningSchedule(0.9, 1).masks(guide.saliencies("gate"), 1)
    if ranks.size > 1 and how == "whole":  # codebooks have no gradient while the guide is dense
        loss = DistributedDataParallel(loss, find_unused_parameters=True)
    elif ranks.size > 1 and how == "sharded":
        fully_shard(loss, mesh=init_device_mesh("cpu", (ranks.size,)))
    torch.manual_seed(ranks.rank)
    optimizer = torch.optim.SGD([p for p in loss.parameters() if p.requires_grad], lr=1e-3, momentum=0.9)
    rows = slice(12 * ranks.rank // ranks.size, 12 * (ranks.rank + 1) // ranks.size)
    for _ in range(4):
        optimizer.zero_grad()
        value = loss(x[rows], y[rows])
        value.backward()
        optimizer.step()
    state = {**model.state_dict(), **guide.state_dict(prefix="guide.")}
    own = {name: value.to_local().numel() for name, value in state.items() if isinstance(value, DTensor)}
    state = {name: whole(value).clone() for name, value in state.items()}
    hard = guide.harden() if how != "sharded" and estimator != "local" else {}
    refused = []
    for needs_all_weights in REFUSED if how == "rows" else ():
        try:
            needs_all_weights(model, guide, x, y)
        except SQSError as error:
            refused.append(str(error))
    pruned = {}
    if how == "rows" or ranks.size == 1:
        inputs = {"0.weight": 1 + torch.arange(36).view(9, 4), "2.weight": 1 + torch.arange(9)}
        for scope, masks in {"first": first, **{
            scope: PruningSchedule(0.4, 1, scope=scope).masks(guide.saliencies("activation", inputs), 1)
            for scope in ("layer", "global")
        }}.items():
            guide.prune(masks)
            guide.start_coding()
            pruned[scope] = {
                "masks": {name: whole(mask) for name, mask in masks.items()},
                "weights": {name: coded.dense() for name, coded in guide.harden().items()},
                "rate": guide.nonzero_rate(),
                "widths": [site.scale.detach().clone() for site in guide.sites.values()],
            }
    return {
        "refused": refused, "pruned": pruned,
        "state": state, "draw": torch.rand(3), "own": own, "loss": value.item(),
        "hard": {name: coded.dense() for name, coded in hard.items()},
    }


with started() as ranks:
    found = {how: trained(sys.argv[2], how) for how in sys.argv[3:]}
    torch.save(found, f"{sys.argv[1]}/{ranks.rank}")
"""
WAYS = ("whole", "sharded", "rows")


def after(place: Path, estimator: str, size: int, *ways: str) -> list[dict]:
    run_on_ranks(size, TRAINING, place, estimator, *ways)
    return [torch.load(place / str(rank)) for rank in range(size)]


def test_two_ranks_with_half_a_minibatch_are_one_with_all_of_it(tmp_path: Path):
    alone = after(tmp_path, "straight_through", 1, "whole")[0]["whole"]
    ranks = after(tmp_path, "straight_through", 2, *WAYS)
    for way in WAYS:
        first, second = (rank[way] for rank in ranks)
        assert bool(first["own"]) == (way != "whole")
        for name, value in alone["state"].items():
            # Codes of rows are kept in the weight's shape.
            torch.testing.assert_close(first["state"][name].view(value.shape), value, rtol=1e-4, atol=1e-6)
            assert torch.equal(first["state"][name], second["state"][name])
    first, second = (rank["rows"] for rank in ranks)
    latents = "guide.sites.0/weight.latent_unconstrained"
    assert (first["own"][latents], second["own"][latents]) == (5 * 4, 4 * 4)
    assert first["own"]["net.0.weight"] == first["own"]["guide.sites.0/weight.mask"] == 5 * 4
    # The KL is of all rows; the negative log-likelihoods are of each rank's half, whose mean is the whole's.
    assert (first["loss"] + second["loss"]) / 2 == pytest.approx(alone["loss"], rel=1e-5)
    for name, weight in alone["hard"].items():
        assert torch.equal(first["hard"][name], second["hard"][name])
        torch.testing.assert_close(first["hard"][name], weight)
    # Masks and codebooks are those of all rows; pruned by the first masks, a layer has lost none and one its last.
    assert alone["pruned"]["first"]["masks"]["2.weight"].flatten().tolist() == [True] * 13 + [False] * 5
    for scope, expected in alone["pruned"].items():
        for found in (first["pruned"][scope], second["pruned"][scope]):
            assert found["rate"] == expected["rate"]
            for name, mask in expected["masks"].items():
                assert torch.equal(found["masks"][name], mask)
            torch.testing.assert_close(found["weights"], expected["weights"], rtol=1e-3, atol=1e-4)
            torch.testing.assert_close(found["widths"], expected["widths"], rtol=1e-3, atol=1e-5)
    # What ranks have learned goes on in a guide that is not divided.
    net = nn.Sequential(nn.Linear(4, 9), nn.Tanh(), nn.Linear(9, 2))
    guide = SpikeGMMGuide(BayesianNetwork(net, num_data=120), 3, estimator="straight_through")
    own = {name.removeprefix("guide."): value for name, value in first["state"].items() if "guide." in name}
    guide.load_state_dict(own)
    for name, coded in guide.harden().items():
        torch.testing.assert_close(coded.dense(), alone["hard"][name])
    words = [
        "all weights",
        "grid",
        "divided among ranks",
        "NaN",
        "a report",
        "windows",
        "tiles",
        "already",
        "SpikeGMMGuide",
        "LearnedPrior",
    ]
    assert len(first["refused"]) == len(words)
    for sentence, word in zip(first["refused"], words, strict=True):
        assert word in sentence


def test_draws_differ_and_parameters_do_not(tmp_path: Path):
    ranks = after(tmp_path, "local", 2, "whole", "rows")
    for way in ("whole", "rows"):
        first, second = (rank[way] for rank in ranks)
        assert not torch.equal(first["draw"], second["draw"])
        for name, value in first["state"].items():
            assert torch.equal(second["state"][name], value)
