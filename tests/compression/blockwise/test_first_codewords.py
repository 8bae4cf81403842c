"""What codewords start from where values are few: against plain K-means, and the objective that it makes least."""

import pytest
import torch
from compression.blockwise.test_sequential_coding import layer

from sqs_pyro.compression.blockwise.codebooks import FreeCodebook
from sqs_pyro.compression.blockwise.first_codewords import few, with_zero
from sqs_pyro.compression.blockwise.laplace import PLACES
from sqs_pyro.compression.blockwise.shares import Shares
from sqs_pyro.compression.finetune.rate_distortion import fit_symbol_prior
from sqs_pyro.distributions.kmeans import kmeans_1d


def precisions(own):
    order, upper = own.conditioning
    variances = torch.empty(len(order), dtype=torch.float64).index_copy_(0, order, upper.diagonal().square())
    return own.importance[:, None] / variances


def test_the_histogram_is_that_of_plain_rounding():
    own = layer(rows=20)
    found, step = own.histogram, own.reach / PLACES
    places, counts = (own.mean / step).round().unique(return_counts=True)
    at = places.long() + PLACES
    torch.testing.assert_close(found.values[at], places * step)
    assert torch.equal(found.counts[at], counts.double()) and float(found.counts.sum()) == own.mean.numel()
    expected = [float(precisions(own)[(own.mean / step).round() == place].sum()) for place in places]
    torch.testing.assert_close(found.mass[at], torch.tensor(expected).double())
    units = type(own)(own.mean, own.curvature, own.importance, Shares(20, 4)).histogram
    torch.testing.assert_close(units.mass, found.mass)


@pytest.mark.parametrize("k", [1, 3, 7])
def test_without_a_price_they_are_k_means_by_precision(k):
    own = layer(rows=60)
    found, rates = FreeCodebook(k).start(own, 1e-9)
    clusters = kmeans_1d(own.mean.reshape(1, -1), k + 1, precisions(own).reshape(1, -1)).loc[0]
    zero = int(clusters.abs().argmin())

    def lost(points):
        each = precisions(own)[..., None] * (own.mean[..., None] - points).square()
        return float(each.amin(-1).sum())

    centred = torch.cat([clusters[:zero], clusters[zero + 1 :], clusters.new_zeros(1)])
    assert lost(with_zero(found)) <= 1.02 * lost(centred)  # zero is zero, and others make up for it
    assert len(found) == k and float(rates.neg().exp().sum()) == pytest.approx(1)
    assert torch.equal(found, found.sort().values)


@pytest.mark.parametrize("beta", [0.1, 3.0, 30.0])
def test_a_price_on_rates_makes_their_sum_with_errors_less(beta):
    own = layer(rows=60)
    start = FreeCodebook(7).start(own, 1e-9)[0].double()

    def objective(codewords, rates):
        errors = 0.5 * precisions(own)[..., None] * (own.mean[..., None] - with_zero(codewords)).square()
        return float((errors + beta * rates).amin(-1).sum())

    nearest = (own.mean[..., None] - with_zero(start)).abs().argmin(-1).reshape(-1)
    before = fit_symbol_prior(torch.bincount(nearest, minlength=8)[None]).rates[0]
    # By the mean precision of weights of a size: next to nothing is lost where the price is.
    assert objective(*few(own, beta, start)) < objective(start, before) * (1.003 if beta < 1 else 1)


def test_a_layer_of_zeros_has_codewords_too():
    own = layer()
    found, rates = FreeCodebook(3).start(type(own)(0 * own.mean, own.curvature, own.importance), 1e-3)
    assert found.isfinite().all() and rates.isfinite().all() and len(found) >= 1
