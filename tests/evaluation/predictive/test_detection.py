"""Entropies against torch's distributions and scipy, AUROC against scikit-learn."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import entropy
from sklearn.metrics import roc_auc_score

from sqs_pyro.errors import DataError
from sqs_pyro.evaluation.predictive.detection import (
    auroc,
    mixture_log_probabilities,
    mutual_information,
    predictive_entropy,
)


def log_probabilities(draws: int = 5) -> torch.Tensor:
    return (2 * torch.randn(draws, 40, 6)).log_softmax(-1)


def test_entropy_of_the_mixture():
    p = log_probabilities().double().exp().mean(0)
    torch.testing.assert_close(mixture_log_probabilities(log_probabilities()).shape, p.shape)
    torch.testing.assert_close(predictive_entropy(p.log()).numpy(), entropy(p.numpy(), axis=1))


def test_mutual_information_is_the_mean_divergence_from_the_mixture():
    log_p = log_probabilities().double()
    torch.testing.assert_close(mixture_log_probabilities(log_p).exp(), log_p.exp().mean(0))
    p = log_p.exp().numpy()
    divergence = sum(entropy(each, p.mean(0), axis=1) for each in p) / len(p)
    torch.testing.assert_close(mutual_information(log_p).numpy(), divergence)


def test_draws_that_agree_have_none_and_certain_ones_that_do_not_have_all():
    same = log_probabilities(1).expand(4, -1, -1)
    assert float(mutual_information(same).max()) < 1e-6 and float(mutual_information(same).min()) >= 0
    certain = torch.tensor([[[0.0, -torch.inf]], [[-torch.inf, 0.0]]])
    torch.testing.assert_close(mutual_information(certain), torch.full((1,), 2.0, dtype=torch.float64).log())


@given(st.lists(st.integers(0, 6), min_size=1, max_size=30), st.lists(st.integers(0, 6), min_size=1, max_size=30))
def test_auroc_with_ties(inside, outside):
    expected = roc_auc_score([0] * len(inside) + [1] * len(outside), inside + outside)
    assert auroc(torch.tensor(inside), torch.tensor(outside)) == pytest.approx(expected)


def test_auroc_of_many():
    inside, outside = torch.randn(5000), torch.randn(3000) + 0.5
    expected = roc_auc_score([0] * 5000 + [1] * 3000, torch.cat([inside, outside]))
    assert auroc(inside, outside) == pytest.approx(expected, abs=1e-9)
    assert auroc(inside, inside) == 0.5


@pytest.mark.parametrize("wrong", [torch.zeros(0), torch.tensor([torch.nan])])
def test_auroc_of_nothing(wrong):
    with pytest.raises(DataError, match="must be at least one, and none of them NaN"):
        auroc(torch.zeros(3), wrong)
