"""Blockwise compression on ranks: the same file from one or many, whatever becomes of them on the way."""

import json
from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest
from kits.ranks import TRANSFORMERS, run_on_ranks, start_ranks
from kits.tiny_transformers import tiny

from sqs_pyro.compression.blockwise import time_plan
from sqs_pyro.compression.blockwise.machines import MACHINES
from sqs_pyro.compression.blockwise.shares import Shares
from sqs_pyro.compression.blockwise.time_plan import TimePlan, plan_time
from sqs_pyro.ranks import Ranks

#: What each of these has in common: a network, sequences, and what is done with them.
SETUP = """
import contextlib
import io
import itertools
import json
import os
import signal
import sys
from collections import Counter
from pathlib import Path

import torch
import torch.distributed as dist
from kits.tiny_transformers import tiny

import sqs_pyro.ranks
from sqs_pyro import compress_transformer, save
from sqs_pyro.errors import DataError, RankError, RecipeError
from sqs_pyro.compression.blockwise import codebooks, laplace
from sqs_pyro.compression.blockwise.laplace import LayerLikelihood
from sqs_pyro.compression.blockwise.one_block import BlockCoder
from sqs_pyro.integrations.checkpoint import compress_checkpoint
from sqs_pyro.packing.layouts import PackedTensor
from sqs_pyro.ranks import Ranks, ranks, started

place = Path(sys.argv[1])
RECIPE = {"bits": 2.5, "num_components": 7, "importance_sequences": 4, "batch_size": 2, "rounds": 1, "units": 4}
CASES = {
    "llama_tied": {},
    "llama": {"grid": "uniform", "settle_steps": 2},
    "bert": {"units": 5, "finish_steps": 1},
}
ROUNDED = {"num_components": 7, "group_size": 32, "batch_size": 2, "units": 4}


def network(name):
    torch.manual_seed(0)
    if name in ("gptq", "awq"):
        return tiny("llama", num_hidden_layers=1, hidden_size=64, intermediate_size=96)
    return tiny(name, num_hidden_layers=2 if name == "llama_tied" else 1)


def sequences(seed=1):
    return torch.randint(3, 64, (14, 10), generator=torch.Generator().manual_seed(seed))


def compressed(name="llama_tied", **options):
    recipe = {**RECIPE, **CASES[name]} if name in CASES else {**ROUNDED, "method": name}
    return compress_transformer(network(name), sequences(), recipe, **options).network
"""

#: Told which of the cases to take, "streamed" among them.
EVERY = (
    SETUP
    + """
sent = Counter()  # bytes and calls of what is summed and gathered, and operations of factors


def counted(owner, name, what):
    call = getattr(owner, name)

    def counting(*args, **kwargs):
        value = call(*args, **kwargs)
        sent.update(what(value, *args))
        return value

    setattr(owner, name, counting)


def bytes_to_others(value, into, own, *sizes):
    others = here.size - 1
    return {"bytes": own.nbytes * others // (here.size if sizes else 1)}  # to each a slice, or the same to all


def summed(value, *rest):
    # Moments, squared gradients, what a head says of each token; else a few numbers.
    large = value.dim() and (value.dtype == torch.float32 or len(value) == 64)
    if not (bytes_sent := sent.pop("bytes", 0)):
        return {}  # a rank's own
    return {"large": 1, "summed": bytes_sent} if large else {"small": 1}


def best_codewords(*args, best=codebooks.best_codewords):
    before = sent["small"]
    found = best(*args)
    sent["of codewords"] += sent["small"] - before
    return found


def gathered(values, *rest):
    sent.pop("bytes", None)
    if isinstance(values[0], torch.Tensor) and values[0].dtype == torch.uint8:
        return {"symbols": sum(map(len, values)) * values[0].shape[1]}
    every = list(itertools.chain.from_iterable(each.values() for each in values if isinstance(each, dict)))
    if every and isinstance(every[0], PackedTensor):
        return {"packed": sum(each.num_bytes for each in every)}
    if every and isinstance(every[0], tuple):  # layers that one rank has coded
        symbols = sum(coded.codes.nbytes + coded.mask.nbytes for coded, _ in every)
        return {"whole": len(every), "symbols": symbols, "groups": 1}
    return {}


def streamed():
    if here.leads:
        network("llama").save_pretrained(place / "checkpoint")
    here.wait()
    recipe = {**RECIPE, "allocation": "even", "embedding": True}
    result = compress_checkpoint(place / "checkpoint", sequences(), recipe, directory=place / "kept")
    return result.network


with started() as here:
    if here.size == 2:
        counted(sqs_pyro.ranks, "_all_gather", bytes_to_others)
        counted(dist, "all_to_all_single", bytes_to_others)
        counted(Ranks, "summed", summed)
        counted(Ranks, "gathered", gathered)
        # Operations in float64: a factor, an inverse, and two curvatures' traces with a factor.
        counted(laplace, "_cholesky", lambda found, matrix: {"factors": len(matrix) ** 3 / 3})
        counted(laplace, "_triangular_inverse", lambda found, factor: {"factors": 0.4 * len(factor) ** 3})
        counted(LayerLikelihood, "plus", lambda found, own, other: {"factors": 4 * len(own.curvature) ** 3})
        codebooks.best_codewords = best_codewords
    for name in sys.argv[2:]:
        save(streamed() if name == "streamed" else compressed(name), place / f"{name}.{here.rank}")
        if name == "llama_tied":
            print(json.dumps(sent))
"""
)


@pytest.fixture(scope="module")
def alone(tmp_path_factory) -> Callable[..., Path]:
    """Where one rank has written the files of some cases."""

    @cache
    def place_of(*names: str) -> Path:
        place = tmp_path_factory.mktemp("alone")
        run_on_ranks(1, EVERY, place, *names, imported=TRANSFORMERS)
        return place

    return place_of


FIRST = ("llama_tied", "bert", "gptq", "awq")
OTHERS = ("llama", "streamed")


@pytest.mark.parametrize(
    ("size", "names"),
    [
        (2, FIRST),
        pytest.param(2, OTHERS, marks=pytest.mark.slow),
        pytest.param(3, FIRST, marks=pytest.mark.slow),
        pytest.param(3, OTHERS, marks=pytest.mark.slow),
    ],
)
def test_the_file_is_the_same(
    size: int, names: tuple[str, ...], alone: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    printed = run_on_ranks(size, EVERY, tmp_path, *names, imported=TRANSFORMERS)
    for name in names:
        for rank in range(size):
            assert (tmp_path / f"{name}.{rank}").read_bytes() == (alone(*names) / f"{name}.0").read_bytes(), name
    kept = {path.name for path in tmp_path.glob("kept/*")}
    assert kept == ({"embedding.pt", "head.pt", "block-000.pt"} if "streamed" in names else set())
    counts = [json.loads(each) for each in printed if each] if size == 2 else []
    for sent in counts:
        plan = _check_counts(sent, monkeypatch)
    if counts:  # of the rank that has most: the embedding is forecast by one
        assert plan.factors * MACHINES["cpu"].doubles == pytest.approx(max(sent["factors"] for sent in counts))


def _check_counts(sent: dict[str, int], monkeypatch: pytest.MonkeyPatch) -> TimePlan:
    """What a rank has sent is what is planned, but for the steps that codewords took, which nobody can know."""
    net = tiny("llama_tied", num_hidden_layers=2)
    recipe = {
        "bits": 2.5,
        "num_components": 7,
        "importance_sequences": 4,
        "batch_size": 2,
        "rounds": 1,
        "units": 4,
    }
    assert (sent["whole"], sent["groups"]) == (2 * 4, 2 * 2)  # of each block k and v, gate and up
    weights = 2 * (7 - 4) + 1  # the others, of each of which codewords are chosen twice
    monkeypatch.setattr(time_plan, "_GRADIENT_STEPS", sent["of codewords"] / (2 * weights) - 1)
    plan = plan_time(net, 14, 10, recipe, MACHINES["cpu"], streamed=False, ranks=2)
    planned = plan.sent
    assert (planned.summed, planned.symbols) == (sent["summed"], sent["symbols"])
    # The largest weight, its symbols; whole layers; behind each block whether to stop, and what is packed.
    gathered = 2 * weights + 2 * 2 + 2 * 2
    assert planned.packed == pytest.approx(
        sent["packed"], rel=0.5
    )  # codebooks are half of weights as few as these
    assert planned.number == 2 * sent["large"] + sent["small"] + gathered
    return plan


# Of a rank that ends in the middle of the second block, or is asked to end in the middle of the first.
ENDING = (
    SETUP
    + """
compress = BlockCoder.compress


def ending(self, i, *rest):
    if sys.argv[2] == "killed" and i == 1 and ranks().rank == 1:
        os._exit(9)
    if sys.argv[2] == "stopped" and i == 0 and ranks().rank == 1:
        signal.raise_signal(signal.SIGINT)
    return compress(self, i, *rest)


BlockCoder.compress = ending
with started() as here:
    try:
        save(compressed(directory=place / "blocks"), place / f"file.{here.rank}")
    except (RankError, KeyboardInterrupt) as error:
        print(type(error).__name__, error)
        sys.exit(1)
"""
)


@pytest.mark.slow
@pytest.mark.parametrize(("how", "others"), [("killed", "RankError"), ("stopped", "KeyboardInterrupt")])
def test_a_rank_that_ends(how: str, others: str, alone: Callable[..., Path], tmp_path: Path):
    ended = [each.wait() for each in start_ranks(2, ENDING, tmp_path, how, imported=TRANSFORMERS)]
    assert [each.returncode for each in ended] == [1, 9 if how == "killed" else 1], ended
    assert ended[0].stdout.startswith(others)
    blocks = tmp_path / "blocks"
    assert {path.name for path in blocks.glob("*.pt")} == {"plan.pt", "embedding.pt", "block-000.pt"}
    kept = (blocks / "block-000.pt").stat().st_mtime_ns
    run_on_ranks(3, ENDING, tmp_path, "well", imported=TRANSFORMERS)
    assert (blocks / "block-000.pt").stat().st_mtime_ns == kept
    assert (tmp_path / "file.0").read_bytes() == (alone(*FIRST) / "llama_tied.0").read_bytes()


REFUSED = (
    SETUP
    + """
with started() as here:
    for recipe, seed in (({"units": 1}, 0), ({}, here.rank)):
        try:
            compress_transformer(network("llama"), sequences(seed), {**RECIPE, **recipe})
        except (RecipeError, DataError) as error:
            print(error)
"""
)


def test_refusals():
    for said in run_on_ranks(2, REFUSED, "", imported=TRANSFORMERS):
        units, data = said.splitlines()
        assert units.startswith("2 ranks share the 1 unit of blockwise.units: start as many, or set")
        assert data.startswith("Ranks 0 and 1 were given another data")


@pytest.mark.parametrize(("count", "most", "size"), [(7, 3, 1), (7, 3, 2), (5, 8, 3), (2, 8, 3), (1, 4, 2)])
def test_every_thing_is_in_one_unit_of_one_rank(count: int, most: int, size: int):
    shares = [Shares(count, most, Ranks(rank, size)) for rank in range(size)]
    things = [range(count)[each.own][part] for each in shares for part in each.parts]
    assert [thing for unit in things for thing in unit] == list(range(count))
    assert len(things) == min(most, count)
    assert max(map(len, things)) - min(map(len, things)) <= 1


UNEVEN = """
import torch
from sqs_pyro.compression.blockwise.shares import Shares
from sqs_pyro.ranks import started

with started() as here:
    shares = Shares(2, 8, here)  # fewer than there are ranks
    own = torch.arange(2)[shares.own]
    assert shares.sum(lambda part: own[part].sum()) == 1
    assert shares.joined(own).tolist() == [0, 1]
    every = shares.everywhere(own.tolist(), torch.device("cpu"))
    assert [every[i] for i in range(len(every))] == [0, 1] == every[:]
"""


def test_ranks_without_things():
    run_on_ranks(3, UNEVEN, imported=TRANSFORMERS)  # which is there already
