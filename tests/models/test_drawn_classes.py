"""Classes that a network draws, against the frequencies that their probabilities say."""

import pyro.distributions as dist
import pytest
import scipy.stats
import torch

from sqs_pyro.models import label_distributions
from sqs_pyro.models.label_distributions import ClassLabels, drawn_classes
from sqs_pyro.testing.statistics import FAILURE_RATE

ROWS = torch.tensor([[0.1, 0.0, 0.25, 0.6, 0.05], [0.0, 0.0, 0.4, 0.3, 0.3]])


@pytest.mark.parametrize("at_once", [1 << 22, 8])  # all rows, or one after the other
def test_frequencies_are_the_probabilities(at_once: int, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(label_distributions, "_AT_ONCE", at_once)
    drawn = ClassLabels(ROWS.log(), -100, validate_args=False).sample((20_000,))  # a probability of 0
    assert drawn.shape == (20_000, 2) and drawn.dtype == torch.int64
    for row, p in zip(drawn.T, ROWS, strict=True):
        counts = row.bincount(minlength=5)
        assert not counts[p == 0].any()
        expected = 20_000 * p[p > 0].double()
        assert scipy.stats.chisquare(counts[p > 0], expected / expected.sum() * 20_000).pvalue > FAILURE_RATE


def test_the_tail_of_a_large_vocabulary():
    """Half of the mass is on tokens of a probability of 1e-5 each."""
    p = torch.cat([torch.tensor([50_000.0]), torch.ones(50_000)])[None] / 100_000
    drawn = drawn_classes(p, 4000)
    assert drawn.shape == (4000, 1) and int(drawn.max()) <= 50_000
    tail = drawn[drawn > 0]
    assert scipy.stats.binomtest(len(tail), 4000, 0.5).pvalue > FAILURE_RATE
    assert scipy.stats.kstest(tail / 50_000, "uniform").pvalue > FAILURE_RATE


def test_shapes_are_those_of_a_categorical():
    logits = torch.randn(3, 2, 6)
    for shape in ((), (4,), (4, 5)):
        expected = dist.Categorical(logits=logits).sample(torch.Size(shape))
        assert ClassLabels(logits, -100).sample(shape).shape == expected.shape
    assert ClassLabels(logits[:, :1], -100).expand((3, 7)).sample((2,)).shape == (2, 3, 7)
