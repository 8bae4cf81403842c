"""What does not fit is told before the first step, and named by its minibatch when it comes later."""

import traceback
from typing import ClassVar

import pytest
import torch
from pyro import distributions as dist
from torch import nn
from torch.utils.data import DataLoader, Dataset, IterableDataset, TensorDataset

import sqs_pyro
from sqs_pyro.compression.baseline import BaselineRecipe, train_baseline
from sqs_pyro.errors import DataError, NetworkError, SQSError
from sqs_pyro.evaluation.classification import evaluate, largest_difference
from sqs_pyro.models.likelihoods import Categorical

X, Y = torch.randn(32, 6, generator=torch.Generator().manual_seed(0)), torch.arange(32) % 3
RECIPE = {"epochs": 2, "num_components": 4}


def loader(x=X, y=Y, size=8, **options):
    return DataLoader(TensorDataset(x, y), size, **options)


def mlp(outputs=3, norm=False):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8) if norm else nn.ReLU(), nn.Linear(8, outputs))


def told(net, train, before=0, **options):
    """The sentence in which a compression is refused, before any step, or before one that is given."""
    steps = []
    with pytest.raises(SQSError) as raised:
        sqs_pyro.compress(net, train, options.pop("recipe", RECIPE), progress=steps.append, **options)
    assert (steps[-1].step if steps else 0) == before
    sentence = str(raised.value)
    assert "\n" not in sentence and sentence.endswith(".")
    return sentence


class Flags(nn.Module):
    def __init__(self):
        super().__init__()
        self.net = mlp()

    def forward(self, u, v):
        return self.net(u + v)


class Complex(Flags):
    def forward(self, x):
        return torch.complex(self.net(x), self.net(x))


def judge_that_raises(net, validation):
    raise KeyError("top-5")


LATER = X.clone()
LATER[20, 3] = torch.nan


def changed(at, x=lambda x: x, y=lambda y: y):
    """A loader that is wrong in one minibatch."""

    class Batches(list):
        dataset = range(32)

    pairs = [(X[i : i + 8], Y[i : i + 8]) for i in range(0, 32, 8)]
    pairs[at] = (x(pairs[at][0]), y(pairs[at][1]))
    return Batches(pairs)


class TestBeforeTraining:
    cases: ClassVar = {
        "labels out of range": (mlp, loader(y=Y + 1), {}, "run from 1 to 3, but the network has 3 classes"),
        "a class to leave out": (mlp, loader(y=Y.masked_fill(Y == 1, 255)), {}, "Categorical(ignore_index=255)"),
        "fractions": (mlp, loader(y=Y + 0.5), {}, "have a fraction"),
        "NaN labels": (mlp, loader(y=Y.masked_fill(Y == 0, 0) * torch.nan), {}, "are NaN or have a fraction"),
        "NaN targets": (mlp, loader(y=X[:, :3] * torch.nan), {"likelihood": "gaussian"}, "holds 24 values of 24"),
        "NaN inputs": (mlp, loader(X * torch.nan), {}, "minibatch 1 holds 48 values of 48"),
        "uint8": (
            mlp,
            loader(X.to(torch.uint8)),
            {},
            "is uint8 [8, 6], but the weights of Sequential are float32",
        ),
        "float64": (mlp, loader(X.double()), {}, "convert the inputs (x.to(torch.float32))"),
        "float64 weights": (lambda: mlp().double(), loader(), {}, "convert the inputs (x.to(torch.float64))"),
        "a key that nothing takes": (
            mlp,
            changed(0, x=lambda x: {"input": x, "path": ["a"] * 8}),
            {},
            "forward(input) has no argument 'path', so leave that out or rename it",
        ),
        "metadata": (mlp, loader(), {"metadata": ["mine"]}, "The metadata is a list, but must be a mapping"),
        "seed": (mlp, loader(), {"seed": "a"}, "The seed is 'a'"),
        "other features": (mlp, loader(X[:, :5]), {}, "fails on training minibatch 1 (float32 [8, 5])"),
        "one of two inputs": (Flags, loader(), {}, "to Flags.forward(u, v), which takes other arguments"),
        "not broadcast": (mlp, loader(y=X[:, :1]), {"likelihood": "gaussian"}, "nothing is broadcast"),
        "single logit": (lambda: mlp(1), loader(), {}, "use 'bernoulli' for labels 0 and 1"),
        "no label at all": (mlp, loader(y=Y * 0 - 100), {}, "Every one of the training labels is -100"),
        "no label to judge by": (
            mlp,
            loader(),
            {"validation": loader(y=Y * 0 - 100)},
            "Every one of the validation labels is -100",
        ),
        "complex": (Complex, loader(), {}, "output is complex (complex64 [8, 3])"),
        "multi-hot": (mlp, loader(y=torch.ones(32, 3)), {}, "use likelihood='multilabel'"),
        "shares": (mlp, loader(y=X[:, :3]), {"likelihood": "multilabel"}, "which the likelihood can never give"),
        "likelihood": (mlp, loader(), {"likelihood": lambda z: dist.Categorical(z["a"])}, "The likelihood fails"),
        "weights": (mlp, loader(y=torch.stack([Y, Y], 1)), {}, "Labels are int64 [8, 2]"),
        "one example left": (lambda: mlp(norm=True), loader(X[:25], Y[:25]), {}, "minibatch 4 has one example"),
        "a generator to judge by": (mlp, loader(), {"validation": iter(loader())}, "ends after one pass"),
        "other labels to judge by": (
            mlp,
            loader(),
            {"validation": loader(y=Y + 1)},
            "Validation labels in minibatch 1",
        ),
        "nothing to judge by": (mlp, loader(), {"validation": []}, "There is no validation minibatch"),
        "judge raises": (mlp, loader(), {"validation": loader(), "judge": judge_that_raises}, "KeyError: 'top-5'"),
        "judge NaN": (
            mlp,
            loader(),
            {"validation": loader(), "judge": lambda *_: float("nan")},
            "The judge says nan",
        ),
        "judge percent": (
            mlp,
            loader(),
            {"validation": loader(), "judge": lambda *_: 93.5},
            "The judge says 93.5",
        ),
        "judge nothing": (
            mlp,
            loader(),
            {"validation": loader(), "judge": lambda *_: None},
            "The judge says None",
        ),
        "distillation": (
            mlp,
            loader(),
            {"likelihood": Categorical(class_weights=[1, 1, 1]), "recipe": {**RECIPE, "distillation": {}}},
            "Distillation knows no class_weights",
        ),
    }

    @pytest.mark.parametrize("case", cases)
    def test_it_is_told(self, case):
        make, train, options, sentence = self.cases[case]
        assert sentence in told(make(), train, **dict(options))

    def test_a_mistake_in_the_network_is_named_and_stays_the_cause(self):
        mine = ZeroDivisionError("mine")

        class Broken(nn.Linear):
            def forward(self, x):
                raise mine

        with pytest.raises(DataError, match="ZeroDivisionError: mine") as raised:
            sqs_pyro.compress(Broken(6, 3), loader(), RECIPE)
        assert raised.value.__cause__ is mine


class Failing(Dataset):
    def __init__(self, at):
        self.at = at

    def __len__(self):
        return 32

    def __getitem__(self, i):
        if i == self.at:
            raise FileNotFoundError(f"{i}.png")
        return X[i], Y[i]


class TestLater:
    @pytest.mark.parametrize(
        ("train", "sentence"),
        [
            (DataLoader(Failing(20), 8), "The training data failed at minibatch 3 with FileNotFoundError: 20.png"),
            (DataLoader(Failing(20), 8, num_workers=1), "The training data failed at minibatch 3 with"),
            (changed(2, x=lambda x: x[:0], y=lambda y: y[:0]), "minibatch 3 is empty"),
            (changed(2, y=lambda y: y[:-1]), "minibatch 3: Labels are int64 [7] for logits of the shape [8, 3]"),
            (changed(2, y=lambda y: y + 2), "labels in minibatch 3 run from 2 to 4"),
            (changed(2, y=lambda y: y * torch.nan), "minibatch 3: Labels hold 8 numbers of 8 that are NaN"),
            (changed(2, x=lambda x: x[:, :4]), "training minibatch 3 (float32 [8, 4])"),
            (changed(2, x=lambda x: x * torch.inf), "minibatch 3 holds 48 values of 48 that are NaN or infinite"),
        ],
    )
    def test_training_names_the_minibatch(self, train, sentence):
        if isinstance(train, list):  # its length is what it yields
            assert len(train) == 4
        with pytest.raises(DataError) as raised:
            sqs_pyro.compress(mlp(), train, RECIPE)
        assert sentence in str(raised.value) and "\n" not in str(raised.value)
        # Else torch's iterator lives on in its own traceback, and when it is collected waits 5 s for its worker.
        if raised.value.__cause__ is not None:
            traceback.clear_frames(raised.value.__cause__.__traceback__)

    def test_evaluation_names_it(self):
        x = X.clone()
        x[9] = torch.nan
        with pytest.raises(DataError, match="Evaluation minibatch 2 holds 6 values of 48 that are NaN"):
            evaluate(mlp(), loader(x))
        with pytest.raises(DataError, match="failed at minibatch 3"):
            largest_difference(mlp(), mlp(), DataLoader(Failing(20), 8))
        with pytest.raises(DataError, match="no example to compare"):
            largest_difference(mlp(), mlp(), [])

    def test_a_loader_that_yields_more_than_it_says(self):
        class Twice(IterableDataset):
            def __len__(self):
                return 16

            def __iter__(self):
                return iter(list(zip(X, Y, strict=True)))

        assert "goes on after 2 minibatches in epoch 1" in told(mlp(), DataLoader(Twice(), 8), before=2)


def test_what_has_no_label_settles_nothing():
    images, where = torch.randn(32, 2, 4, 3), torch.arange(32 * 12).view(32, 4, 3) % 3
    late = where.masked_fill((torch.arange(32) < 10)[:, None, None], -100)
    net = nn.Conv2d(2, 3, 1)
    options = {"validation": loader(images, late)}
    result = sqs_pyro.compress(net, loader(images, late), {**RECIPE, "num_components": 2}, **options)
    assert result.model.likelihood.class_axis == 1
    assert result.history[-1].score == evaluate(result.network, loader(images[10:], late[10:])).accuracy


def test_a_judge_that_turns_gradients_off_does_so_for_itself():
    def judge(net, validation):
        torch.set_grad_enabled(False)
        return 0.5

    result = sqs_pyro.compress(mlp(), loader(), RECIPE, validation=loader(), judge=judge)
    assert result.history[-1].score == 0.5 and torch.is_grad_enabled()


def test_n_is_what_an_epoch_yields():
    subset = torch.utils.data.SubsetRandomSampler(range(12))
    result = sqs_pyro.compress(mlp(), loader(sampler=subset), {**RECIPE, "epochs": 1})
    assert result.model.num_data == 12


def test_trying_changes_nothing_that_training_sees():
    generator = torch.Generator().manual_seed(5)
    train = loader(shuffle=True, generator=generator)
    seen = []
    net = mlp(norm=True)
    net[0].register_forward_pre_hook(
        lambda module, inputs: seen.append(inputs[0]) if torch.is_grad_enabled() else None
    )
    before = {name: value.clone() for name, value in net.state_dict().items()}
    sqs_pyro.compress(net, train, {**RECIPE, "epochs": 1, "batch_norm_batches": 0}, validation=loader())
    generator.manual_seed(5)
    assert all(torch.equal(a, b) for a, (b, _) in zip(seen, train, strict=False))
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())


class TestBaseline:
    def test_labels_are_read_as_everywhere(self):
        for y in (Y, nn.functional.one_hot(Y, 3), Y[:, None], Y.double()):
            (record,) = train_baseline(
                mlp(), loader(y=y), loader(y=y), BaselineRecipe(epochs=1, learning_rate=0.01)
            )
            expected = train_baseline(mlp(), loader(), loader(), BaselineRecipe(epochs=1, learning_rate=0.01))[0]
            assert (record.loss, record.accuracy) == pytest.approx((expected.loss, expected.accuracy))

    @pytest.mark.parametrize(
        ("options", "error", "sentence"),
        [
            ({"validation": iter(loader())}, DataError, "ends after one pass"),
            ({"validation": loader(y=Y + 1)}, DataError, "Validation labels in minibatch 1 run from 1 to 3"),
            ({"train": loader(X * torch.nan)}, DataError, "Training minibatch 1 holds"),
            ({"train": loader(X.double())}, DataError, "convert the inputs"),
            ({"validation": loader(), "judge": judge_that_raises}, NetworkError, "top-5"),
        ],
    )
    def test_what_does_not_fit_is_told_first(self, options, error, sentence):
        net = mlp()
        before = net[0].weight.clone()
        options = {"train": loader(), "validation": None, **options}
        with pytest.raises(error, match=sentence):
            train_baseline(net, recipe=BaselineRecipe(epochs=1), **options)
        assert torch.equal(net[0].weight, before)
