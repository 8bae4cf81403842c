import contextlib
import copy
import math
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import nn

from sqs_pyro.compression.baseline import BaselineRecipe, kept_epoch, learning_rate, train_baseline
from sqs_pyro.compression.checkpoint import read_checkpoint
from sqs_pyro.compression.patience import Kept
from sqs_pyro.data import ArrayLoader, Augmentation, DataRecipe, load_data
from sqs_pyro.errors import DataError, DivergenceError, NetworkError, OutputError, RecipeError
from sqs_pyro.evaluation.classification import evaluate
from sqs_pyro.networks.digits import digits_net
from sqs_pyro.recipes import parse


def small_net() -> nn.Module:
    """Convolution, norm and dropout: weights, running statistics and random numbers, all of them state."""
    torch.manual_seed(1)
    return nn.Sequential(
        nn.Conv2d(1, 8, 3, padding=1, bias=False),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.Dropout(0.2),
        nn.Flatten(),
        nn.Linear(8 * 8 * 8, 4),
    )


def small_loader(seed: int = 0, count: int = 96) -> ArrayLoader:
    labels = torch.arange(count) % 4
    images = torch.rand(count, 1, 8, 8, generator=torch.Generator().manual_seed(0)) + labels.view(-1, 1, 1, 1)
    return ArrayLoader(
        images, labels, 16, (2.0,), (1.2,), shuffle=True, augment=Augmentation(1, False), seed=seed, drop_last=True
    )


def plain_loader() -> ArrayLoader:
    """For validation: neither shuffled nor augmented."""
    images, labels = small_loader().dataset.tensors
    return ArrayLoader(images, labels, 40, (2.0,), (1.2,))


class InterruptedLoader:
    """The same minibatches, and Ctrl-C at the given one."""

    def __init__(self, loader: ArrayLoader, at: int) -> None:
        self.loader, self.left = loader, at

    def __getattr__(self, name: str):
        return getattr(self.loader, name)

    def __len__(self) -> int:
        return len(self.loader)

    def __iter__(self) -> Iterator:
        for minibatch in self.loader:
            self.left -= 1
            if self.left < 0:
                raise KeyboardInterrupt
            yield minibatch


def same_state(one: nn.Module, other: nn.Module) -> bool:
    return all(torch.equal(a, other.state_dict()[name]) for name, a in one.state_dict().items())


@pytest.mark.parametrize(
    "recipe",
    [
        BaselineRecipe(epochs=4, learning_rate=0.05),
        BaselineRecipe(epochs=4, learning_rate=0.05, channels_last=False, label_smoothing=0.1),
        BaselineRecipe(epochs=4, learning_rate=0.05, precision="bfloat16"),
    ],
    ids=["channels_last", "contiguous", "bfloat16"],
)
@pytest.mark.parametrize("interrupted_at", [0, 6, 15])
def test_interrupted_and_resumed_equals_uninterrupted(tmp_path: Path, recipe: BaselineRecipe, interrupted_at: int):
    straight = small_net()
    history = train_baseline(straight, small_loader(), plain_loader(), recipe)
    path = tmp_path / "kept" / "baseline.pt"
    with pytest.raises(KeyboardInterrupt):
        interrupted = InterruptedLoader(small_loader(), interrupted_at)
        train_baseline(small_net(), interrupted, plain_loader(), recipe, checkpoint=path)
    assert path.exists() == (interrupted_at >= 6)  # six minibatches an epoch
    torch.manual_seed(99)  # whatever happened in between
    resumed = small_net()
    resumed_history = train_baseline(resumed, small_loader(), plain_loader(), recipe, checkpoint=path)
    assert same_state(straight, resumed)
    assert [(r.epoch, r.loss, r.validation_loss) for r in resumed_history] == [
        (r.epoch, r.loss, r.validation_loss) for r in history
    ]
    assert [file.name for file in path.parent.iterdir()] == ["baseline.pt"]


class TestPatience:
    recipe = BaselineRecipe(epochs=6, learning_rate=0.05, patience=2)
    scores = (0.3, 0.5, 0.4, 0.5, 0.9, 0.9)  # after the fourth epoch it is over

    def train(self, net, loader=None, checkpoint=None, done=0):
        """Train, with a validation that says what it is told to of each epoch; ``done`` were before this call."""
        told, states = [None] * done, {}

        def progress(record):
            told.append(record)
            states[record.epoch] = {name: value.clone() for name, value in net.state_dict().items()}

        options = {"judge": lambda net, validation: self.scores[len(told)], "checkpoint": checkpoint}
        loader = loader or small_loader()
        return train_baseline(net, loader, plain_loader(), self.recipe, progress=progress, **options), states

    def test_it_stops_and_keeps_the_best(self):
        net = small_net()
        history, states = self.train(net)
        assert kept_epoch(history, self.recipe) == Kept(best=2, last=4, planned=6) and len(history) == 4
        assert all(torch.equal(value, states[2][name]) for name, value in net.state_dict().items())
        assert any(not torch.equal(value, states[4][name]) for name, value in net.state_dict().items())

    @pytest.mark.parametrize("epochs", [1, 2, 3, 4])
    def test_resumed_equals_uninterrupted(self, epochs, tmp_path):
        straight, path = small_net(), tmp_path / "c.pt"
        history, _ = self.train(straight)
        with contextlib.suppress(KeyboardInterrupt):  # six minibatches an epoch; after the fourth it is finished
            self.train(small_net(), InterruptedLoader(small_loader(), 6 * epochs), path)
        resumed = small_net()
        again, _ = self.train(resumed, checkpoint=path, done=epochs)
        assert same_state(straight, resumed)
        assert [record.validation_score for record in again] == [record.validation_score for record in history]

    def test_kept_states_of_before_have_no_such_key(self):
        assert "patience" not in BaselineRecipe().model_dump()

    def test_without_validation_it_is_refused(self):
        with pytest.raises(RecipeError, match=r"'baseline\.patience' needs validation data"):
            train_baseline(small_net(), small_loader(), None, self.recipe)


def test_a_finished_checkpoint_only_loads_its_weights(tmp_path: Path):
    path, recipe = tmp_path / "baseline.pt", BaselineRecipe(epochs=2, learning_rate=0.05)
    net = small_net()
    history = train_baseline(net, small_loader(), None, recipe, checkpoint=path)
    before = path.read_bytes()
    again, told = small_net(), []
    assert train_baseline(again, small_loader(), None, recipe, checkpoint=path, progress=told.append) == history
    assert same_state(net, again) and path.read_bytes() == before and not told


def test_a_failed_write_leaves_the_previous_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    path, recipe = tmp_path / "baseline.pt", BaselineRecipe(epochs=3, learning_rate=0.05)
    with pytest.raises(KeyboardInterrupt):
        train_baseline(small_net(), InterruptedLoader(small_loader(), 8), None, recipe, checkpoint=path)
    before = path.read_bytes()

    def half_written(state, file) -> None:
        file.write(b"half")
        raise OSError("No space left on device")

    monkeypatch.setattr(torch, "save", half_written)
    with pytest.raises(OutputError, match="No space"):
        train_baseline(small_net(), small_loader(), None, recipe, checkpoint=path)
    assert path.read_bytes() == before and [file.name for file in tmp_path.iterdir()] == ["baseline.pt"]


def test_learning_rate_rises_linearly_and_falls_as_half_a_cosine_to_zero():
    rates = [learning_rate(step, 110, 10, 0.4) for step in range(111)]
    assert rates[:11] == pytest.approx([0.4 * (i + 1) / 11 for i in range(11)])
    assert rates[60] == pytest.approx(0.2)  # half way down
    assert rates[35] == pytest.approx(0.4 * math.cos(math.pi / 8) ** 2)
    assert rates[110] == pytest.approx(0, abs=1e-12)
    assert learning_rate(0, 10, 0, 0.4) == 0.4


def test_steps_agree_with_the_formulas_of_nesterov_momentum():
    """A linear network in float64; gradients, momentum, decay of the weight only, written out."""
    torch.manual_seed(0)
    net = nn.Linear(3, 2).double()
    x, y = torch.randn(8, 3, dtype=torch.float64), torch.randint(0, 2, (8,))
    recipe = BaselineRecipe(
        epochs=5, learning_rate=0.3, momentum=0.8, weight_decay=0.1, warmup=0, label_smoothing=0.2
    )
    weight, bias = net.weight.detach().clone(), net.bias.detach().clone()
    momenta = [torch.zeros_like(weight), torch.zeros_like(bias)]
    for step in range(5):
        rate = 0.3 * (1 + math.cos(math.pi * step / 5)) / 2
        probabilities = (x @ weight.T + bias).float().softmax(1).double()
        target = torch.eye(2, dtype=torch.float64)[y] * 0.8 + 0.1
        error = (probabilities - target) / 8
        for parameter, gradient, momentum in zip(
            (weight, bias), (error.T @ x + 0.1 * weight, error.sum(0)), momenta, strict=True
        ):
            momentum.mul_(0.8).add_(gradient)
            parameter.sub_(rate * (gradient + 0.8 * momentum))
    train_baseline(net, [(x, y)], None, recipe)
    torch.testing.assert_close(net.weight.detach(), weight, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(net.bias.detach(), bias, rtol=1e-5, atol=1e-6)


def test_nothing_outside_changes():
    """The caller's random numbers go on as before, and weights can be viewed as flat vectors afterwards."""
    net = small_net()
    before = torch.get_rng_state()
    weight = net[0].weight
    train_baseline(net, small_loader(), None, BaselineRecipe(epochs=1))
    assert torch.equal(torch.get_rng_state(), before)
    assert net[0].weight is weight and all(p.is_contiguous() for p in net.parameters())


def test_records_are_what_they_say():
    net, told = small_net(), []
    recipe = BaselineRecipe(epochs=6, learning_rate=0.01)
    history = train_baseline(net, small_loader(), plain_loader(), recipe, progress=told.append)
    assert told == history and [record.epoch for record in history] == [1, 2, 3, 4, 5, 6]
    result = evaluate(net, plain_loader())
    assert (history[-1].validation_loss, history[-1].validation_score) == (result.nll, result.accuracy)
    assert history[-1].loss < history[0].loss and history[-1].accuracy > history[0].accuracy


@pytest.mark.parametrize("bad_step", [2, 31])
def test_a_loss_that_is_not_finite_is_an_error_with_its_step(tmp_path: Path, bad_step: int):
    x, y = torch.randn(4, 3), torch.tensor([0, 1, 0, 1])
    minibatches = [(x, y)] * 40
    minibatches[bad_step - 1] = (x * float("nan"), y)
    path = tmp_path / "baseline.pt"
    sentence = f"loss is nan at step {bad_step} .epoch 1. with learning_rate=0.1: lower it"
    with pytest.raises(DivergenceError, match=sentence):
        train_baseline(nn.Linear(3, 2), minibatches, None, BaselineRecipe(), checkpoint=path)
    assert not path.exists()


def test_divergence_keeps_the_last_good_checkpoint(tmp_path: Path):
    path = tmp_path / "baseline.pt"
    x, y = torch.randn(4, 3), torch.tensor([0, 1, 0, 1])
    minibatches = [(x, y)] * 3

    def spoil(record) -> None:
        minibatches[1] = (x * float("nan"), y)

    with pytest.raises(DivergenceError, match=r"at step 5 .epoch 2."):
        train_baseline(nn.Linear(3, 2), minibatches, None, BaselineRecipe(), checkpoint=path, progress=spoil)
    assert len(read_checkpoint(path)["history"]) == 1


def test_weights_that_are_not_finite_after_the_last_step():
    net = nn.Linear(3, 2)
    net.register_parameter("unused", nn.Parameter(torch.tensor([float("inf")])))
    with pytest.raises(DivergenceError, match=r"Weights of 'unused' are not finite after epoch 1"):
        train_baseline(net, [(torch.randn(4, 3), torch.zeros(4, dtype=torch.long))], None, BaselineRecipe())


@pytest.mark.parametrize("labels", [[0, 2], [-1, 0]])
def test_labels_that_do_not_fit_the_network(labels: list[int]):
    with pytest.raises(DataError, match=r"Training labels in minibatch 1 run from .* has 2 classes"):
        train_baseline(nn.Linear(3, 2), [(torch.randn(2, 3), torch.tensor(labels))], None, BaselineRecipe())


def test_no_minibatch():
    with pytest.raises(DataError, match="no minibatch to train on"):
        train_baseline(nn.Linear(3, 2), [], None, BaselineRecipe())


class TestCheckpointsOfAnotherRun:
    @pytest.fixture
    def kept(self, tmp_path: Path) -> Path:
        path = tmp_path / "baseline.pt"
        train_baseline(small_net(), small_loader(), None, BaselineRecipe(epochs=1), checkpoint=path)
        return path

    def resume(self, path: Path, net: nn.Module | None = None, loader=None, **values) -> None:
        recipe = BaselineRecipe(**{"epochs": 1, **values})
        train_baseline(net or small_net(), loader or small_loader(), None, recipe, checkpoint=path)

    def test_another_recipe(self, kept: Path):
        with pytest.raises(RecipeError, match=r"made with another recipe \(epochs: 1 -> 2, lr: 0.1 -> 0.2\)"):
            self.resume(kept, epochs=2, lr=0.2)

    def test_other_data(self, kept: Path):
        with pytest.raises(DataError, match=r"made with other data \(minibatches: 6 -> 3, examples: 96 -> 48"):
            self.resume(kept, loader=small_loader(count=48))

    def test_another_network(self, kept: Path):
        other = small_net()
        other[5] = nn.Linear(512, 5)
        before = copy.deepcopy(other)
        with pytest.raises(NetworkError, match=r"of another network \(module 5: 'Linear.*features=4.*features=5"):
            self.resume(kept, net=other)
        assert same_state(before, other)

    def test_truncated(self, kept: Path):
        kept.write_bytes(kept.read_bytes()[:-100])
        with pytest.raises(NetworkError, match=r"cannot be read .*delete it to start again"):
            self.resume(kept)

    def test_no_checkpoint_at_all(self, kept: Path):
        torch.save({"recipe": {}}, kept)
        with pytest.raises(NetworkError, match="its checksum is missing: it is damaged, or of an older version"):
            self.resume(kept)


def test_digits_train_in_seconds():
    data = load_data(DataRecipe(name="digits", batch_size=64))
    torch.manual_seed(0)
    net = digits_net(width=16)
    train_baseline(net, data.train, data.validation, BaselineRecipe(epochs=8))
    assert evaluate(net, data.test).accuracy >= 0.96


@pytest.mark.slow
def test_digits_baseline_reaches_its_accuracy():
    data = load_data(DataRecipe(name="digits", batch_size=64))
    torch.manual_seed(0)
    net = digits_net()
    train_baseline(net, data.train, data.validation, BaselineRecipe(epochs=20))
    assert evaluate(net, data.test).accuracy >= 0.975


def test_older_names_of_keys_are_taken():
    assert BaselineRecipe(lr=0.2) == BaselineRecipe(learning_rate=0.2)
    both = parse(BaselineRecipe, {"learning_rate": 0.1, "lr": 0.2})  # as of `--set baseline.lr=0.2`
    assert both.learning_rate == 0.2
    written = both.model_dump(mode="json", exclude_defaults=True)
    assert written == {"lr": 0.2}  # as older versions read it
    assert parse(BaselineRecipe, written) == both
    with pytest.raises(RecipeError, match="'learning_rate' is -1, but should be greater than 0"):
        parse(BaselineRecipe, {"lr": -1})
