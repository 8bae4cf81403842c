"""Shards of a minibatch: what a step on them is, and that one rank or several come to the same bytes."""

import itertools
import json
import random
from pathlib import Path
from typing import Any

import pyro
import pytest
import torch
from kits.ranks import run_on_ranks, start_ranks
from torch import nn
from torch.nn.utils.rnn import pack_sequence
from torch.utils.data import DataLoader, TensorDataset

from sqs_pyro import SQSELBO, BayesianNetwork, SpikeGMMGuide, compress
from sqs_pyro.compression.checkpoint import read_checkpoint
from sqs_pyro.compression.finetune.loop import Driver
from sqs_pyro.compression.finetune.recipe import CompressionRecipe
from sqs_pyro.compression.finetune.shards import Shards
from sqs_pyro.errors import RecipeError
from sqs_pyro.ranks import Ranks, RankWarning


def loader(examples: int = 22, batch_size: int = 8) -> DataLoader:
    generator = torch.Generator().manual_seed(1)
    y = torch.arange(examples) % 2
    x = torch.randn(examples, 4, generator=generator) + 2.0 * y[:, None]
    return DataLoader(TensorDataset(x, y), batch_size)


def network(*more: nn.Module) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 12), nn.BatchNorm1d(12), nn.ReLU(), *more, nn.Linear(12, 2))


def parts(net: nn.Module, recipe: dict[str, Any]) -> tuple[BayesianNetwork, SpikeGMMGuide]:
    model = BayesianNetwork(net, num_data=22)
    return model, SpikeGMMGuide(model, 3, stage="dense", estimator="straight_through", **recipe)


def test_a_step_is_one_on_the_mean_of_shards():
    """Against each shard by itself under the plain ELBO: gradients, NLL and KL, running statistics."""
    recipe = CompressionRecipe(
        epochs=1,
        shards=3,
        kl_weight=0.5,
        kl_every=1,
        momentum=0.0,
        weight_decay=0.0,
        num_components=3,
        gate_learning_rate=0.1,
    )
    model, guide = parts(network(), {})
    driver = Driver(model, guide, recipe, loader())
    before = {name: p.detach().clone() for name, p in driver.model.named_parameters()}
    (x, y), *_ = loader()
    with pyro.get_param_store().scope():
        driver._train_step(x, y)

    total, norms = 0.0, []
    other, own = parts(network(), {})
    start = {name: buffer.clone() for name, buffer in other.net.named_buffers()}
    for number, rows in enumerate([slice(0, 2), slice(2, 5), slice(5, 8)]):
        other.net.load_state_dict(start, strict=False)
        elbo = SQSELBO(kl_weight=0.5 if number == 0 else 0.0)
        with pyro.get_param_store().scope():
            terms = elbo.terms(other, own, x[rows], y[rows])
        loss = (terms.nll * len(y[rows]) / 8 + (0.5 * terms.kl if number == 0 else 0)) / 22
        loss.backward()
        total += float(loss.detach())
        norms.append((len(y[rows]) / 8, {name: b.clone() for name, b in other.net.named_buffers()}))
    expected = {name: p.grad for name, p in other.named_parameters() if p.grad is not None}
    rate = driver.history[0].learning_rate
    assert len(expected) == 4  # two biases, and a weight and a bias of the norm
    for name, gradient in expected.items():
        moved = before[name] - dict(model.named_parameters())[name]
        torch.testing.assert_close(moved, rate * gradient, rtol=1e-4, atol=1e-7)
    for name, site in own.named_parameters():
        if site.grad is not None:
            torch.testing.assert_close(dict(guide.named_parameters())[name].grad, site.grad)
    assert driver.history[0].loss == pytest.approx(total)
    for name, buffer in model.net.named_buffers():
        mean = sum(share * statistics[name] for share, statistics in norms)
        torch.testing.assert_close(buffer, mean if buffer.is_floating_point() else torch.tensor(1))


class Drawing(nn.Module):
    """Remembers a random number of each pass in training."""

    drawn: list[float] = []  # noqa: RUF012  outside of instances, which are copied

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.training and torch.is_grad_enabled():
            self.drawn.append(float(torch.rand(())))
        return x


def test_draws_are_a_shards_own():
    net, recipe = network(Drawing()), {"epochs": 2, "num_components": 3}
    seen = []
    for shards, seed in ((2, 0), (2, 0), (2, 1), (4, 0)):
        Drawing.drawn.clear()
        compress(net, loader(16), {**recipe, "shards": shards, "batch_norm_batches": 0}, seed=seed)
        seen.append(Drawing.drawn[-4 * shards :])  # two epochs of two minibatches
    assert seen[0] == seen[1]
    for drawn in seen:
        assert len(set(drawn)) == len(drawn)
    assert not set(seen[0]) & set(seen[2])
    assert set(seen[0]) < set(seen[3])  # of the shards' numbers, and not of how many there are


def test_smaller_minibatches_have_fewer_shards_and_no_smaller_ones():
    _, guide = parts(network(), {})
    shards = Shards(guide, 4, 10, 0, Ranks())
    for examples, wanted in ((10, [2, 3, 2, 3]), (12, [3] * 4), (9, [3] * 3), (3, [3]), (1, [1])):
        found = shards.parts(examples)
        assert [each.stop - each.start for each in found] == wanted
        assert [found[0].start, found[-1].stop] == [0, examples]
        assert all(a.stop == b.start for a, b in itertools.pairwise(found))


def test_a_slow_rank_is_named_once(monkeypatch: pytest.MonkeyPatch):
    _, guide = parts(network(), {})
    shards = Shards(guide, 4, 8, 0, Ranks(0, 3))
    monkeypatch.setattr(Ranks, "gathered", lambda ranks, seconds: [0.4, 1.0, 0.4])
    with pytest.warns(RankWarning, match="Rank 1 takes 2.5 times as long for a shard as the others"):
        shards.compare_paces()
    shards.compare_paces()  # without a further word


@pytest.mark.parametrize(
    ("net", "shards", "sentence"),
    [
        (network(), 5, "a minibatch of 8 examples cannot be divided into so many of at least two.*give at most 4"),
        (nn.Sequential(nn.Linear(4, 9), nn.Linear(9, 2)), 9, "a minibatch of 8 examples .* many: give at most 8"),
    ],
)
def test_too_many_shards_are_refused(net: nn.Module, shards: int, sentence: str):
    with pytest.raises(RecipeError, match=f"'compression.shards' is {shards}, but {sentence}"):
        compress(net, loader(), {"shards": shards, "num_components": 3})


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.cell, self.head = nn.GRU(4, 6), nn.Linear(6, 2)

    def forward(self, x: Any) -> torch.Tensor:
        return self.head(self.cell(x)[1][0])


def test_what_cannot_be_divided_is_refused():
    def packed(rows: list) -> tuple:
        return pack_sequence([x[None] for x, _ in rows]), torch.stack([y for _, y in rows])

    of_packed = DataLoader(loader().dataset, 8, collate_fn=packed)
    with pytest.raises(RecipeError, match="the PackedSequence of a minibatch's inputs cannot be divided"):
        compress(Recurrent(), of_packed, {"shards": 2, "num_components": 3})


# ---- on ranks ----

QUICK = {
    "epochs": 3,
    "nonzero_rate": 0.4,
    "num_components": 3,
    "pruning": {"every": 2},
    "refresh_every": 3,
    "kl_every": 2,
    "kl_weight": 1.0,
    "batch_norm_batches": 2,
    "shards": 6,
}
RECIPES = {
    "schedule": {**QUICK, "pruning": {"every": 2, "saliency": "activation"}, "gate_learning_rate": 0.1},
    "rate_distortion": {
        **QUICK,
        "allocation": "rate_distortion",
        "prior": {"kind": "learned"},
        "distillation": {},
        "target_ratio": 1.5,
    },
}
RUN = """
import json, os, sys, threading
import torch
from torch import nn
from sqs_pyro import compress, save
from sqs_pyro.data import ArrayLoader
from sqs_pyro.compression.interruption import interruptions_as_exceptions
from sqs_pyro.errors import SQSError
from sqs_pyro.ranks import started

recipe, out, checkpoint, left, number, seconds = json.loads(sys.argv[1])


class Faulty(nn.Module):
    def forward(self, x):
        global left
        if self.training and torch.is_grad_enabled():
            left -= 1
            if left == 0:
                os.kill(os.getpid(), number)
        return x


torch.manual_seed(0)
net = nn.Sequential(
    nn.Conv2d(1, 6, 3, bias=False), nn.BatchNorm2d(6), nn.ReLU(), nn.Dropout(0.1), nn.AdaptiveAvgPool2d(2),
    nn.Flatten(), Faulty(), nn.Linear(24, 64), nn.ReLU(), nn.Linear(64, 3),
)
y = torch.arange(58) % 3  # the last minibatch has two shards: fewer than ranks
x = torch.randn(58, 1, 6, 6) + 2.0 * (y.float() - 1)[:, None, None, None]
data = ArrayLoader(x, y, 24, shuffle=True)
try:
    with interruptions_as_exceptions(), started() as ranks:
        if ranks.rank != ranks.size - 1:
            left = seconds = 0
        if seconds:
            threading.Timer(seconds, os._exit, [9]).start()
        result = compress(net, data, recipe, validation=data, checkpoint=checkpoint, seed=3)
        save(result.network, f"{out}-{ranks.size}-{ranks.rank}.safetensors")
except KeyboardInterrupt as error:
    print(type(error).__name__)
    sys.exit(143)
except SQSError as error:
    print(error)
    sys.exit(2)
"""


def arguments(
    recipe: str, out: Path, kept: Path | None = None, passes: int = 0, signal: int = 0, seconds: float = 0.0
) -> str:
    """What `RUN` is told: its last rank sends itself a signal in so many passes, or is gone after seconds."""
    return json.dumps([RECIPES[recipe], str(out), kept and str(kept), passes, signal, seconds])


@pytest.fixture(scope="module")
def of_one(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """The files of one rank."""
    place = tmp_path_factory.mktemp("one")
    files = {}
    for recipe in RECIPES:
        run_on_ranks(1, RUN, arguments(recipe, place / recipe))
        files[recipe] = (place / f"{recipe}-1-0.safetensors").read_bytes()
    return files


@pytest.mark.parametrize(
    ("recipe", "size"), [pytest.param("schedule", 3, marks=pytest.mark.slow), ("rate_distortion", 2)]
)
def test_any_number_of_ranks_gives_the_same_bytes(recipe: str, size: int, of_one: dict, tmp_path: Path):
    run_on_ranks(size, RUN, arguments(recipe, tmp_path / "file"))
    for rank in range(size):
        assert (tmp_path / f"file-{size}-{rank}.safetensors").read_bytes() == of_one[recipe]


def test_faults_and_resumption_with_other_numbers_of_ranks(of_one: dict, tmp_path: Path):
    kept = tmp_path / "kept.pt"

    def ended(size: int, passes: int, signal: int) -> list:
        told = arguments("schedule", tmp_path / "file", kept, passes, signal)
        return [started.wait() for started in start_ranks(size, RUN, told)]

    # SIGTERM to one of two: both stop after the same step, in the midst of an epoch of three.
    stopped = ended(2, 13, 15)
    assert [(each.returncode, each.stdout) for each in stopped] == [(143, "Terminated\n")] * 2, stopped
    assert read_checkpoint(kept)["step"] % 3
    # The last of three is killed: the others say so, and what was kept stays.
    before = kept.read_bytes()
    killed = ended(3, 1, 9)
    assert [each.returncode for each in killed] == [2, 2, -9], killed
    assert all("can no longer reach the others" in each.stdout for each in killed[:2])
    assert kept.read_bytes() == before
    run_on_ranks(1, RUN, arguments("schedule", tmp_path / "file", kept))
    assert (tmp_path / "file-1-0.safetensors").read_bytes() == of_one["schedule"]


@pytest.mark.slow
def test_thirty_losses_at_random_times(of_one: dict, tmp_path: Path):
    chance, lost = random.Random(0), 0
    for number in range(30):
        kept, file = tmp_path / f"{number}.pt", tmp_path / str(number)
        size, later = chance.randint(2, 3), chance.randint(1, 3)
        told = arguments("schedule", file, kept, seconds=chance.uniform(0.3, 4.0))
        ended = [started.wait() for started in start_ranks(size, RUN, told)]
        gone = [each.returncode for each in ended]
        if gone[-1] and any(gone[:-1]):  # else it was faster, or the others had ended
            assert gone == [2] * (size - 1) + [9], ended
            assert all("can no longer reach the others" in each.stdout for each in ended[:-1])
            lost += 1
        run_on_ranks(later, RUN, arguments("schedule", file, kept))
        assert Path(f"{file}-{later}-0.safetensors").read_bytes() == of_one["schedule"]
    assert lost > 10
