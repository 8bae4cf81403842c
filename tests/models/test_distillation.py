"""Distillation's likelihood, against Hinton's loss and the categorical it contains."""

import pyro
import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from sqs_pyro import SQSELBO, BayesianNetwork, SpikeGMMGuide
from sqs_pyro.errors import DataError
from sqs_pyro.models import Categorical
from sqs_pyro.models.distillation import DistillationLikelihood, DistilledCategorical, DistilledLoader, TaughtBy
from sqs_pyro.models.likelihoods import Gaussian, categorical_last
from sqs_pyro.testing.statistics import assert_rate


def value(labels, probabilities):
    return torch.stack([F.one_hot(labels, probabilities.shape[-1]).float(), probabilities], -2)


class TestLaw:
    @pytest.mark.parametrize(("weight", "temperature"), [(0.3, 1.0), (0.5, 4.0), (1.0, 2.0)])
    def test_gradient_is_that_of_hintons_loss(self, weight, temperature):
        logits = torch.randn(7, 5, dtype=torch.float64, requires_grad=True)
        teacher, labels = torch.randn(7, 5, dtype=torch.float64), torch.randint(5, (7,))
        opinion = (teacher / temperature).softmax(-1)
        law = DistilledCategorical(logits, weight, temperature)
        observed = torch.stack([F.one_hot(labels, 5).double(), opinion], -2)
        (found,) = torch.autograd.grad(-law.log_prob(observed).sum(), logits)
        hard = F.cross_entropy(logits, labels, reduction="sum")
        soft = F.kl_div((logits / temperature).log_softmax(-1), opinion, reduction="sum")
        (expected,) = torch.autograd.grad((1 - weight) * hard + weight * temperature**2 * soft, logits)
        torch.testing.assert_close(found, expected)

    def test_without_weight_it_is_the_categorical(self):
        logits, labels = torch.randn(6, 4), torch.randint(4, (6,))
        found = DistilledCategorical(logits, 0.0, 2.0).log_prob(value(labels, torch.full((6, 4), 0.25)))
        torch.testing.assert_close(found, torch.distributions.Categorical(logits=logits).log_prob(labels))

    def test_samples_are_its_own_opinions(self):
        law = DistilledCategorical(torch.tensor([[0.0, 2.0]]), 0.5, 2.0)
        drawn = law.sample((4000,))
        assert drawn.shape == (4000, 1, 2, 2)
        assert (drawn.sum(-1) == 1).all()
        assert_rate(int(drawn[:, 0, 0, 1].sum()), 4000, float(torch.sigmoid(torch.tensor(2.0))))
        assert_rate(int(drawn[:, 0, 1, 1].sum()), 4000, float(torch.sigmoid(torch.tensor(1.0))))

    def test_shapes(self):
        law = DistilledCategorical(torch.zeros(1, 3), 0.5, 1.0)
        assert (law.batch_shape, law.event_shape) == ((1,), (2, 3))
        wide = law.expand((5,))
        assert wide.log_prob(wide.sample((2,))).shape == (2, 5)

    def test_values_that_are_no_probabilities(self):
        law = DistilledCategorical(torch.zeros(1, 3), 0.5, 1.0, validate_args=True)
        with pytest.raises(ValueError, match="Expected value argument"):
            law.log_prob(torch.ones(1, 2, 3))


class Loader:
    """Three minibatches whose order depends on the epoch."""

    def __init__(self):
        self.dataset, self.epoch = range(6), 0

    def __len__(self):
        return 3

    def __iter__(self):
        x = torch.arange(12.0).view(3, 2, 2) + self.epoch
        self.epoch += 1
        return iter([(part, torch.tensor([0, 2])) for part in x])


def loader_of(x, y):
    return DataLoader(TensorDataset(x, y), len(x))


class TestLoader:
    def test_says_what_the_teacher_thinks(self):
        teacher = nn.Linear(2, 3).eval()
        for x, observed in DistilledLoader(Loader(), teacher, temperature=3.0):
            torch.testing.assert_close(observed[:, 1], (teacher(x) / 3).softmax(-1))
            assert observed[:, 0].argmax(-1).tolist() == [0, 2]
            assert not observed.requires_grad

    def test_epochs_are_those_of_the_loader_inside(self):
        loader = DistilledLoader(Loader(), nn.Linear(2, 3), 1.0)
        assert (len(loader), len(loader.dataset)) == (3, 6)
        loader.epoch = 5
        first = next(iter(loader))[0]
        assert float(first[0, 0]) == 5 and loader.epoch == 6

    @pytest.mark.parametrize("axis", [1, -1])
    def test_images_and_tokens_with_labels_that_are_left_out(self, axis):
        """The same loss as of the labelled places alone, one by one."""
        labels = torch.tensor([[0, 2, 255], [255, 1, 1]])
        x = torch.randn(2, 5, 3)  # classes in dimension 1
        x = x if axis == 1 else x.transpose(1, 2)
        teacher, likelihood = nn.Identity(), Categorical(ignore_index=255)
        ((_, observed),) = DistilledLoader(loader_of(x, labels), teacher, 2.0, likelihood=likelihood)
        law = DistillationLikelihood(0.4, 2.0, axis)(x * 2)
        rows, known = x.movedim(axis, -1), labels != 255
        each = DistilledCategorical(rows[known] * 2, 0.4, 2.0)
        expected = each.log_prob(value(labels[known], (rows[known] / 2).softmax(-1))).sum()
        torch.testing.assert_close(law.log_prob(observed).sum(), expected)
        assert law.batch_shape == (2,)

    def test_probabilities_for_labels(self):
        x, soft = torch.randn(4, 3), torch.randn(4, 3).softmax(-1)
        ((_, observed),) = DistilledLoader(loader_of(x, soft), nn.Identity(), 2.0)
        torch.testing.assert_close(observed, torch.stack([soft, (x / 2).softmax(-1)], -2))

    def test_labels_of_other_classes(self):
        with pytest.raises(DataError, match="labels from 0 to 1, the teacher's classes"):
            list(DistilledLoader(Loader(), nn.Linear(2, 2), 1.0))


def test_is_a_likelihood_of_a_bayesian_network():
    net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3))
    model = BayesianNetwork(net, likelihood=DistillationLikelihood(0.5, 2.0), num_data=20)
    guide = SpikeGMMGuide(model, 3, estimator="straight_through")
    x, observed = torch.randn(10, 4), value(torch.randint(3, (10,)), torch.full((10, 3), 1 / 3))
    svi = pyro.infer.SVI(model, guide, pyro.optim.Adam({"lr": 1e-2}), loss=SQSELBO())
    losses = [svi.step(x, observed) for _ in range(30)]
    assert losses[-1] < losses[0]
    assert pyro.infer.Predictive(model, guide=guide, num_samples=3)(x)["obs"].shape == (3, 10, 2, 3)


def test_tokens_of_a_sequence_are_one_event():
    logits, labels = torch.randn(2, 5, 3), torch.randint(3, (2, 5))
    opinion = torch.randn(2, 5, 3).softmax(-1)
    observed = torch.stack([nn.functional.one_hot(labels, 3).float(), opinion], -2)
    law = DistillationLikelihood(0.4, 2.0)(logits)
    assert (law.batch_shape, law.event_shape) == ((2,), (5, 2, 3))
    each = DistilledCategorical(logits.view(10, 3), 0.4, 2.0).log_prob(observed.view(10, 2, 3))
    torch.testing.assert_close(law.log_prob(observed), each.view(2, 5).sum(1))


class TestTaughtBy:
    """The divergence from a teacher's distribution is that of torch, and in a model a loss of that many nats."""

    @staticmethod
    def logits():
        return torch.randn(2, 3, 5, 7, generator=torch.Generator().manual_seed(0))  # teacher, student: [B, T, C]

    def test_the_divergence_of_sequences_is_the_sum_over_their_tokens(self):
        teacher, student = self.logits()
        p, q = teacher.log_softmax(-1), student.log_softmax(-1)
        found = TaughtBy(categorical_last).divergence(student, teacher)
        torch.testing.assert_close(found, (p.exp() * (p - q)).sum((-1, -2)))

    def test_of_gaussians_it_is_half_the_squared_distance(self):
        teacher, student = self.logits()
        found = TaughtBy(Gaussian()).divergence(student, teacher)
        torch.testing.assert_close(found, 0.5 * (teacher - student).square().sum((-1, -2)))

    def test_the_loss_of_a_model_has_its_value_and_gradient(self):
        torch.manual_seed(0)
        net, x, teacher = nn.Linear(4, 3), torch.randn(6, 4), torch.randn(6, 3)
        model = BayesianNetwork(net, likelihood=TaughtBy(categorical_last), num_data=12, include="^weight$")
        guide = SpikeGMMGuide(model, num_components=2, stage="frozen", estimator="straight_through")
        loss = SQSELBO(kl_weight=0.0).differentiable_loss(model, guide, x, teacher)
        weight = guide.harden()["weight"].dense()
        logits = (x @ weight.T + net.bias).log_softmax(-1)
        expected = 2 * nn.functional.kl_div(logits, teacher.softmax(-1), reduction="sum")  # N / B = 2
        torch.testing.assert_close(loss, expected)
        gradients = [torch.autograd.grad(value, net.bias, retain_graph=True)[0] for value in (loss, expected)]
        torch.testing.assert_close(*gradients)
