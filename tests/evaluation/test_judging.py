"""Figures of all kinds of labels against torchmetrics and scikit-learn, and the judges likelihoods ask for."""

import json
from typing import ClassVar

import pytest
import torch
from kits.ranks import run_on_ranks
from pyro import distributions as dist
from sklearn.metrics import r2_score
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

import sqs_pyro
from sqs_pyro.errors import DataError, NetworkError
from sqs_pyro.evaluation.averaging import AveragedNetwork
from sqs_pyro.evaluation.classification import accuracy, evaluate
from sqs_pyro.evaluation.judging import judge_by, judged
from sqs_pyro.models.likelihoods import Bernoulli, Categorical, Gaussian, resolve

GENERATOR = torch.Generator().manual_seed(0)
N, C = 20, 4
IMAGES = torch.randn(N, C, 3, 5, generator=GENERATOR)
FLAT = IMAGES.mean((2, 3))
TOKENS = IMAGES[:, :, 0].transpose(1, 2).contiguous()  # [N, 5, C]
PIXELS = torch.randint(C, (N, 3, 5), generator=GENERATOR)
VOID = PIXELS.masked_fill(torch.rand(N, 3, 5, generator=GENERATOR) < 0.3, 255)
LABELS = PIXELS[:, 0, 0]
SOFT = torch.randn(N, C, generator=GENERATOR).softmax(-1)


def batches(x, y):
    return DataLoader(TensorDataset(x, y), 6)


def same(found, logits, y):
    """All figures from rows ``[n, C]`` and labels ``[n]``."""
    plain = evaluate(nn.Identity(), [(logits, y)])
    assert found.num_examples == plain.num_examples == len(y)
    for name in ("accuracy", "nll", "ece", "brier", "entropy"):
        assert getattr(found, name) == pytest.approx(getattr(plain, name), rel=1e-5), name


def test_images_are_judged_pixel_by_pixel():
    rows = IMAGES.movedim(1, -1).reshape(-1, C)
    same(evaluate(nn.Identity(), batches(IMAGES, PIXELS)), rows, PIXELS.flatten())
    assert evaluate(nn.Identity(), batches(IMAGES, PIXELS)).nll == pytest.approx(
        float(F.cross_entropy(IMAGES, PIXELS))
    )


def test_what_is_left_out_is_in_no_figure():
    known = VOID.flatten() != 255
    rows = IMAGES.movedim(1, -1).reshape(-1, C)[known]
    found = evaluate(nn.Identity(), batches(IMAGES, VOID), Categorical(ignore_index=255))
    same(found, rows, VOID.flatten()[known])
    assert found.nll == pytest.approx(float(F.cross_entropy(IMAGES, VOID, ignore_index=255)), rel=1e-5)
    some = LABELS.masked_fill(LABELS == 1, -100)
    same(evaluate(nn.Identity(), batches(FLAT, some)), FLAT[some != -100], some[some != -100])


def test_tokens_one_hot_and_columns():
    same(evaluate(nn.Identity(), batches(TOKENS, PIXELS[:, 0])), TOKENS.reshape(-1, C), PIXELS[:, 0].flatten())
    same(evaluate(nn.Identity(), batches(FLAT, F.one_hot(LABELS, C))), FLAT, LABELS)
    same(evaluate(nn.Identity(), batches(FLAT, LABELS[:, None].double())), FLAT, LABELS)


def test_probabilities_for_labels():
    found = evaluate(nn.Identity(), batches(FLAT, SOFT))
    assert found.nll == pytest.approx(float(F.cross_entropy(FLAT, SOFT)), rel=1e-5)
    assert found.accuracy == pytest.approx(float((FLAT.argmax(1) == SOFT.argmax(1)).double().mean()))
    assert found.brier == pytest.approx(float((FLAT.softmax(1) - SOFT).square().sum(1).mean()), rel=1e-5)


def test_an_average_of_images_asks_where_the_classes_are():
    net = nn.Conv2d(C, C, 1)
    average = AveragedNetwork(net, [{"weight": net.weight}, {"weight": net.weight}])
    with pytest.raises(NetworkError, match="set class_axis of the averaged network"):
        average(IMAGES)
    average.class_axis = 1
    torch.testing.assert_close(average(IMAGES), net(IMAGES).log_softmax(1))
    assert accuracy(average, batches(IMAGES, PIXELS)) == accuracy(net, batches(IMAGES, PIXELS))


SEVERAL = torch.rand(N, C, generator=GENERATOR) < 0.4
SHARE = float(((FLAT > 0) == SEVERAL).double().mean())
NUMBERS = FLAT + 0.3 * torch.randn(N, C, generator=GENERATOR)
R2 = r2_score(NUMBERS.numpy(), FLAT.numpy(), multioutput="variance_weighted")


@pytest.mark.parametrize(
    ("likelihood", "x", "y", "expected"),
    [
        ("categorical", FLAT, LABELS, float((FLAT.argmax(1) == LABELS).double().mean())),
        (lambda z: dist.Categorical(logits=z), FLAT, LABELS, float((FLAT.argmax(1) == LABELS).double().mean())),
        (Categorical(class_axis=1), IMAGES, PIXELS, float((IMAGES.argmax(1) == PIXELS).double().mean())),
        (
            lambda z: dist.Categorical(logits=z.movedim(1, -1)).to_event(2),
            IMAGES,
            PIXELS,
            float((IMAGES.argmax(1) == PIXELS).double().mean()),
        ),
        ("multilabel", FLAT, SEVERAL, SHARE),
        (lambda z: dist.Bernoulli(logits=z), FLAT, SEVERAL, SHARE),
        ("bernoulli", FLAT[:, :1], SEVERAL[:, 0], float(((FLAT[:, 0] > 0) == SEVERAL[:, 0]).double().mean())),
        (Bernoulli(ignore_index=7), FLAT[:1], torch.tensor([[1, 7, 7, 0]]) * 1, None),
        ("gaussian", FLAT, NUMBERS, R2),
        (Gaussian(0.3), FLAT[:, :1], NUMBERS[:, 0], r2_score(NUMBERS[:, 0].numpy(), FLAT[:, 0].numpy())),
        (lambda z: dist.Laplace(z, 1.0).to_event(1), FLAT, NUMBERS, R2),
        ("gaussian", FLAT[:, 0], NUMBERS[:, :1], r2_score(NUMBERS[:, 0].numpy(), FLAT[:, 0].numpy())),
        (
            lambda z: dist.Normal(z[:, 0], z[:, 1].exp()),
            FLAT,
            NUMBERS[:, 0],
            r2_score(NUMBERS[:, 0].numpy(), FLAT[:, 0].numpy()),
        ),
        ("gaussian", FLAT, FLAT, 1.0),
        ("gaussian", FLAT * 0, torch.zeros(N, C), 1.0),
    ],
)
def test_the_judge_follows_the_likelihood(likelihood, x, y, expected):
    found = judged(judge_by(resolve(likelihood)), nn.Identity(), batches(x, y))
    if expected is None:
        expected = float(((x[0, [0, 3]] > 0) == torch.tensor([True, False])).double().mean())
    assert found == pytest.approx(expected, abs=1e-5)


@pytest.mark.slow  # importing torchmetrics takes seconds
def test_figures_against_torchmetrics():
    metrics = pytest.importorskip("torchmetrics.functional")
    left_out = {"num_classes": C, "ignore_index": 255}
    found = evaluate(nn.Identity(), batches(IMAGES, VOID), Categorical(ignore_index=255))
    expected = metrics.classification.multiclass_accuracy(IMAGES, VOID, average="micro", **left_out)
    assert found.accuracy == pytest.approx(float(expected), abs=1e-6)
    expected = metrics.classification.multiclass_calibration_error(IMAGES, VOID, n_bins=15, **left_out)
    assert found.ece == pytest.approx(float(expected), abs=1e-5)
    assert judge_by(Bernoulli())(nn.Identity(), batches(FLAT, SEVERAL)) == pytest.approx(
        float(
            metrics.classification.multilabel_accuracy(
                FLAT.sigmoid(), SEVERAL.int(), num_labels=C, average="micro"
            )
        )
    )
    r2 = metrics.r2_score(FLAT, NUMBERS, multioutput="variance_weighted")
    assert judge_by(Gaussian())(nn.Identity(), batches(FLAT, NUMBERS)) == pytest.approx(float(r2), rel=1e-5)


def test_no_label_and_no_mean():
    with pytest.raises(DataError, match="all of them are left out"):
        evaluate(nn.Identity(), [(FLAT, torch.full((N,), -100))])
    with pytest.raises(NetworkError, match="The judge says nan"):
        judged(judge_by(lambda z: dist.Cauchy(z, 1.0)), nn.Identity(), batches(FLAT, NUMBERS))
    with pytest.raises(DataError, match="Normal is not of classes"):
        evaluate(nn.Identity(), batches(FLAT, NUMBERS), "gaussian")


ON_RANKS = """
import json
import torch
from torch import nn
from sqs_pyro.errors import DataError
from sqs_pyro.evaluation.judging import judge_by, judged
from sqs_pyro.models.likelihoods import Categorical, resolve
from sqs_pyro.ranks import started


class Counting(nn.Module):
    passes = 0

    def forward(self, x):
        self.passes += 1
        return x


def batches(x, y, size=6):
    return list(zip(x.split(size), y.split(size)))


with started() as ranks:
    torch.manual_seed(0)
    x, y = torch.randn(20, 4), torch.randint(4, (20,))
    y[3] = -100
    numbers = x + 0.5 * torch.randn(20, 4)
    ragged = [(a.flatten()[: 4 * len(a) - i][None], b.flatten()[: 4 * len(b) - i][None])
              for i, (a, b) in enumerate(batches(x, numbers))]
    found = []
    for likelihood, data in (
        (Categorical(), batches(x, y)),
        (Categorical(), batches(x, y, 20)),  # fewer minibatches than ranks
        (resolve("multilabel"), batches(x, (numbers > 0).float())),
        (resolve("gaussian"), batches(x, numbers)),
        (resolve("gaussian"), ragged),
    ):
        net = Counting()
        found.append(judged(judge_by(likelihood), net, data, ranks))
        assert net.passes == len(range(ranks.rank or ranks.size, len(data) + 1, ranks.size))
    found.append(judged(lambda net, data: ranks.rank + 0.25, net, data, ranks))  # a user's: the leader's alone
    broken = y.clone()
    broken[9] = 7  # in the second minibatch, which one rank has
    try:
        judged(judge_by(Categorical()), net, batches(x, broken), ranks)
    except DataError as error:
        found.append(str(error))
    print(json.dumps(found))
"""


def test_ranks_share_the_minibatches_and_say_what_one_says():
    (alone,) = run_on_ranks(1, ON_RANKS)
    assert run_on_ranks(2, ON_RANKS) == [alone, alone]  # to the last digit
    *figures, broken = json.loads(alone)
    assert figures[0] == figures[1] and figures[-1] == 0.25
    assert "7" in broken


class TestCompression:
    recipe: ClassVar = {"epochs": 2, "num_components": 4, "batch_norm_batches": 0}

    @pytest.mark.parametrize(
        ("likelihood", "y"),
        [
            ("categorical", PIXELS),
            (Categorical(ignore_index=255), VOID),
            (Categorical(class_weights=[1, 2, 1, 1]), PIXELS),
            ("categorical", IMAGES.softmax(1)),
            ("multilabel", IMAGES > 0),
            ("gaussian", IMAGES * 2),
            (lambda z: dist.Categorical(logits=z.movedim(1, -1)), PIXELS),
        ],
    )
    def test_the_judge_of_training_is_that_of_its_labels(self, likelihood, y):
        data = batches(IMAGES, y)
        result = sqs_pyro.compress(nn.Conv2d(C, C, 1), data, self.recipe, likelihood=likelihood, validation=data)
        assert result.history[-1].score <= 1
        assert judge_by(result.model.likelihood)(result.network, data) <= 1

    @pytest.mark.parametrize(
        ("likelihood", "y"),
        [("categorical", PIXELS), (Categorical(ignore_index=255), VOID), ("categorical", IMAGES.softmax(1))],
    )
    def test_distillation_reads_them_too(self, likelihood, y):
        recipe = {**self.recipe, "distillation": {"weight": 0.5, "temperature": 2.0}}
        data = batches(IMAGES, y)
        result = sqs_pyro.compress(nn.Conv2d(C, C, 1), data, recipe, likelihood=likelihood, validation=data)
        assert isinstance(result.model.likelihood, Categorical) and result.model.likelihood.class_axis == 1
