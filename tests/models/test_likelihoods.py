"""Labels of every form under every likelihood, against torch's own losses; nothing is ever broadcast."""

from types import SimpleNamespace

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from sqs_pyro import SQSELBO, BayesianNetwork, SpikeGMMGuide
from sqs_pyro.errors import DataError, NetworkError
from sqs_pyro.models.likelihoods import Bernoulli, Categorical, Gaussian, resolve
from sqs_pyro.models.observation import observe, settle

B, C = 6, 4
LABELS = torch.tensor([0, 3, 1, 1, 2, 0])
WEIGHTS = torch.tensor([0.5, 2.0, 1.0, 0.25])


def logits(*shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(len(shape)))


def integers(*shape, high=C):
    return torch.randint(high, shape, generator=torch.Generator().manual_seed(sum(shape)))


def log_likelihood(likelihood, output, y):
    """What a model is trained on, and the shape that every example has its own of."""
    law, value = observe(resolve(likelihood), output, y)
    found = law.log_prob(value)
    assert found.shape == law.batch_shape == (len(y),)
    return float(found.sum())


FLAT = logits(B, C)
ONE_HOT, SOFT = F.one_hot(LABELS, C), logits(B, C).softmax(-1)
IMAGE, IMAGE_LABELS = logits(B, C, 3, 5), integers(B, 3, 5)
TOKENS, TOKEN_LABELS = logits(B, 7, C), integers(B, 7)
SOME = LABELS.masked_fill(torch.tensor([1, 0, 0, 1, 0, 0]).bool(), -100)
VOID = IMAGE_LABELS.masked_fill(IMAGE_LABELS == 2, 255)

# name: (likelihood, output, labels, the same by torch)
CLASSES = {
    "integers": ("categorical", FLAT, LABELS, (FLAT, LABELS)),
    "int32": ("categorical", FLAT, LABELS.int(), (FLAT, LABELS)),
    "uint8": ("categorical", FLAT, LABELS.to(torch.uint8), (FLAT, LABELS)),
    "floats": ("categorical", FLAT, LABELS.double(), (FLAT, LABELS)),
    "bool": ("categorical", FLAT[:, :2], LABELS > 0, (FLAT[:, :2], (LABELS > 0).long())),
    "column": ("categorical", FLAT, LABELS[:, None], (FLAT, LABELS)),
    "one-hot": ("categorical", FLAT, ONE_HOT, (FLAT, LABELS)),
    "one-hot bool": ("categorical", FLAT, ONE_HOT.bool(), (FLAT, LABELS)),
    "one-hot floats": ("categorical", FLAT, ONE_HOT.float(), (FLAT, LABELS)),
    "probabilities": ("categorical", FLAT, SOFT, (FLAT, SOFT)),
    "probabilities, weighted": (Categorical(class_weights=WEIGHTS), FLAT, SOFT, (FLAT, SOFT, WEIGHTS)),
    "weighted": (Categorical(class_weights=WEIGHTS.tolist()), FLAT, LABELS, (FLAT, LABELS, WEIGHTS)),
    "some": ("categorical", FLAT, SOME, (FLAT, SOME)),
    "image": ("categorical", IMAGE, IMAGE_LABELS, (IMAGE, IMAGE_LABELS)),
    "image with a channel": ("categorical", IMAGE, IMAGE_LABELS[:, None], (IMAGE, IMAGE_LABELS)),
    "image, void": (Categorical(ignore_index=255), IMAGE, VOID, (IMAGE, VOID.masked_fill(VOID == 255, -100))),
    "image, one-hot": (
        "categorical",
        IMAGE,
        F.one_hot(IMAGE_LABELS, C).movedim(-1, 1),
        (IMAGE, IMAGE_LABELS),
    ),
    "image, probabilities": ("categorical", IMAGE, IMAGE.softmax(1), (IMAGE, IMAGE.softmax(1))),
    "sequence": ("categorical", logits(B, C, 7), TOKEN_LABELS, (logits(B, C, 7), TOKEN_LABELS)),
    "tokens": ("categorical", TOKENS, TOKEN_LABELS, (TOKENS.transpose(1, 2), TOKEN_LABELS)),
    "tokens, probabilities": (
        "categorical",
        TOKENS,
        TOKENS.softmax(-1),
        (TOKENS.transpose(1, 2), TOKENS.softmax(-1).transpose(1, 2)),
    ),
    "square, torch": (
        Categorical(class_axis=1),
        logits(B, C, C),
        integers(B, C),
        (logits(B, C, C), integers(B, C)),
    ),
    "square, last": (
        Categorical(class_axis=-1),
        logits(B, C, C),
        integers(B, C),
        (logits(B, C, C).transpose(1, 2), integers(B, C)),
    ),
    "square, transformers": (
        "categorical",
        SimpleNamespace(logits=logits(B, C, C)),
        integers(B, C),
        (logits(B, C, C).transpose(1, 2), integers(B, C)),
    ),
}


@pytest.mark.parametrize("case", CLASSES)
def test_classes_against_cross_entropy(case):
    likelihood, output, y, (z, target, *weight) = CLASSES[case]
    expected = F.cross_entropy(z, target, *weight, reduction="sum")
    assert log_likelihood(likelihood, output, y) == pytest.approx(-float(expected), rel=1e-5)


@pytest.mark.parametrize("case", CLASSES)
def test_what_the_first_minibatch_settles_holds_for_the_others(case):
    likelihood, output, y, _ = CLASSES[case]
    settled = settle(resolve(likelihood), output, y)
    assert log_likelihood(settled, output, y) == log_likelihood(likelihood, output, y)
    assert settled(output).batch_shape == (B,)  # then no labels are needed


SEVERAL = torch.rand(B, C, generator=torch.Generator().manual_seed(1)) < 0.4
MASKED = SEVERAL.float().masked_fill(torch.eye(B, C).bool(), -100)


@pytest.mark.parametrize(
    ("likelihood", "z", "y"),
    [
        ("multilabel", FLAT, SEVERAL),
        ("bernoulli", FLAT, SEVERAL.int()),
        ("multilabel", FLAT, SEVERAL.float()),
        ("multilabel", FLAT, SOFT),
        ("bernoulli", FLAT[:, :1], SEVERAL[:, 0]),
        ("bernoulli", FLAT[:, 0], SEVERAL[:, :1].long()),
        (lambda z: dist.Bernoulli(logits=z), FLAT, SEVERAL.int()),
        (lambda z: dist.Bernoulli(logits=z).to_event(1), FLAT, SEVERAL),
        (Bernoulli(pos_weight=3.0), FLAT, SEVERAL),
        ("multilabel", FLAT, MASKED),
    ],
)
def test_several_labels_against_binary_cross_entropy(likelihood, z, y):
    weight = getattr(likelihood, "pos_weight", None)
    expected = F.binary_cross_entropy_with_logits(
        z, y.view_as(z).float().clamp_min(0), pos_weight=weight, reduction="none"
    )
    expected = float(expected[y.view_as(z) != -100].sum())
    assert log_likelihood(likelihood, z, y) == pytest.approx(-expected, rel=1e-5)


@pytest.mark.parametrize(
    ("z", "y"),
    [
        (FLAT, FLAT + 1),
        (FLAT[:, :1], FLAT[:, 1]),
        (FLAT[:, 0], FLAT[:, :1]),
        (FLAT[:, 0], LABELS),
        (FLAT[:, :1], LABELS.double()),
        (IMAGE[:, :1], IMAGE[:, 0]),
    ],
)
@pytest.mark.parametrize(
    "likelihood", ["gaussian", lambda z: dist.Normal(z, 1.0), lambda z: dist.Normal(z, 1.0).to_event(z.dim() - 1)]
)
def test_numbers_against_the_squared_error(z, y, likelihood):
    error = (z - y.view_as(z)).square().sum() / 2 + z.numel() * torch.log(torch.tensor(2 * torch.pi)) / 2
    assert log_likelihood(likelihood, z, y) == pytest.approx(-float(error), rel=1e-5)


@pytest.mark.parametrize(
    ("likelihood", "z", "y"),
    [
        ("gaussian", FLAT, LABELS),
        ("gaussian", FLAT, FLAT[:, :1]),
        ("gaussian", FLAT[:, :1], FLAT),
        ("gaussian", FLAT, FLAT.T),
        ("gaussian", FLAT[:, :1], FLAT[:-1, 0]),
        ("gaussian", logits(B, C, 1), FLAT[:, :1]),
        ("multilabel", FLAT, SEVERAL[:, :2]),
        ("categorical", FLAT, LABELS[:-1]),
        ("categorical", FLAT, integers(B, 2)),
        ("categorical", FLAT, logits(B, 1)),
        ("categorical", FLAT, torch.full((B,), torch.nan)),
        ("categorical", FLAT, SEVERAL.int()),
        ("categorical", IMAGE, integers(B, 5, 3)),
        ("categorical", logits(B, 3, 3, 3), integers(B, 3, 3)),
        ("categorical", logits(B, C, C), integers(B, C)),
        (lambda z: dist.Normal(z[:, :1], z.exp()[:, 0]), FLAT, FLAT[:, 0]),  # broadcast by the user's own
        (lambda z: dist.Categorical(logits=z).to_event(1), IMAGE, IMAGE_LABELS),
    ],
)
def test_what_does_not_fit_is_one_sentence(likelihood, z, y):
    with pytest.raises(DataError) as raised:
        observe(resolve(likelihood), z, y)
    assert str(raised.value).startswith("Labels ") and "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("likelihood", "output", "y", "sentence"),
    [
        ("categorical", FLAT[:, :1], SEVERAL[:, 0], "use 'bernoulli' for labels 0 and 1"),
        ("categorical", FLAT[:, 0], SEVERAL[:, 0], "use 'bernoulli' for labels 0 and 1"),
        (Categorical(class_weights=[1.0]), FLAT, LABELS, "class_weights has 1 numbers, but there are 4 classes"),
        (
            Categorical(class_axis=3),
            FLAT,
            LABELS,
            r"class_axis is 3, but the network's output has the shape \[6, 4\]",
        ),
        (lambda z: z, FLAT, LABELS, "must give a distribution of pyro.distributions"),
        (
            lambda z: torch.distributions.Normal(z, 1.0),
            FLAT,
            FLAT,
            "must give a distribution of pyro.distributions",
        ),
        (lambda z: dist.Normal(z, 1.0).to_event(2), FLAT, FLAT, "an empty batch shape"),
    ],
)
def test_likelihoods_that_do_not_fit_the_network(likelihood, output, y, sentence):
    with pytest.raises(NetworkError, match=sentence):
        observe(resolve(likelihood), output, y)


@pytest.mark.parametrize(
    "arguments", [{"class_axis": 0}, {"class_weights": [1.0, -1.0]}, {"class_weights": [[1.0]]}]
)
def test_impossible_arguments(arguments):
    with pytest.raises(NetworkError):
        Categorical(**arguments)


def test_without_labels_the_classes_of_an_image_are_not_guessed():
    with pytest.raises(NetworkError, match=r"Categorical\(class_axis=1\)"):
        resolve("categorical")(IMAGE)
    assert Categorical(class_axis=1)(IMAGE).event_shape == (3, 5)


@pytest.mark.parametrize(
    ("likelihood", "y"),
    [
        ("categorical", LABELS % 3),
        ("categorical", SOFT[:, :3] / SOFT[:, :3].sum(1, keepdim=True)),
        ("multilabel", SEVERAL[:, :3]),
    ],
)
def test_in_svi_and_predictive(likelihood, y):
    net = nn.Sequential(nn.Linear(5, 8), nn.ReLU(), nn.Linear(8, 3))
    model = BayesianNetwork(net, likelihood=likelihood, num_data=B)
    guide = SpikeGMMGuide(model, 3, estimator="straight_through")
    svi = pyro.infer.SVI(model, guide, pyro.optim.Adam({"lr": 1e-2}), loss=SQSELBO())
    x = torch.randn(B, 5)
    losses = [svi.step(x, y) for _ in range(20)]
    assert losses[-1] < losses[0]
    assert len(pyro.infer.Predictive(model, guide=guide, num_samples=2)(x)["obs"][0]) == B


@pytest.mark.parametrize("wrong", [torch.randn(B), torch.randn(B, 1), torch.randn(B - 1, 3)])
def test_svi_alone_never_broadcasts(wrong):
    model = BayesianNetwork(nn.Linear(5, 3), likelihood="gaussian", num_data=B)
    svi = pyro.infer.SVI(
        model, SpikeGMMGuide(model, 3, estimator="straight_through"), pyro.optim.Adam({"lr": 1e-2}), loss=SQSELBO()
    )
    with pytest.raises(DataError, match="nothing is broadcast"):
        svi.step(torch.randn(B, 5), wrong)


def test_a_column_is_read_as_the_numbers_it_holds():
    losses = []
    for y in (torch.ones(B), torch.ones(B, 1)):
        torch.manual_seed(0)
        pyro.clear_param_store()
        model = BayesianNetwork(nn.Linear(5, 1), likelihood=Gaussian(), num_data=B)
        svi = pyro.infer.SVI(
            model,
            SpikeGMMGuide(model, 2, estimator="straight_through"),
            pyro.optim.Adam({"lr": 1e-2}),
            loss=SQSELBO(),
        )
        losses.append(svi.step(torch.ones(B, 5), y))
    assert losses[0] == losses[1]


@pytest.mark.parametrize(
    "make",
    [
        lambda: Categorical(class_weights="abc"),
        lambda: Categorical(class_weights=[0.0, 0.0]),
        lambda: Categorical(ignore_index=None),
        lambda: Categorical(ignore_index=1.5),
        lambda: Categorical(class_axis=1.0),
        lambda: Bernoulli(pos_weight=-1.0),
        lambda: Bernoulli(pos_weight="a"),
        lambda: Bernoulli(ignore_index=True),
        lambda: Gaussian("a"),
        lambda: Gaussian(float("inf")),
        lambda: Gaussian(torch.ones(2, 2)),
        lambda: Gaussian(None),
    ],
)
def test_impossible_arguments_are_told_at_once(make):
    with pytest.raises(NetworkError, match=r"(must be|should be)") as raised:
        make()
    assert "\n" not in str(raised.value)
