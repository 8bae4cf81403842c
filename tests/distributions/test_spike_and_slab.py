"""SpikeAndSlab against scipy, its limits, its gradients and its sentences."""

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import scipy.stats
import torch

from sqs_pyro.distributions import SpikeAndSlab
from sqs_pyro.testing.distributions import PriorContract
from sqs_pyro.testing.statistics import component_edges

F64 = torch.float64


def tensor(*values: float) -> torch.Tensor:
    return torch.tensor(values, dtype=F64)


class TestNormalSlab(PriorContract):
    def make(self):
        return SpikeAndSlab(tensor(0.1, 0.5, 0.9), dist.Normal(tensor(0.0, 0.3, -0.2), tensor(1.0, 0.5, 2.0)))


class TestSharedNormalSlab(PriorContract):
    """One number and one slab for a whole layer: the form every network uses."""

    def make(self):
        return SpikeAndSlab(0.3, dist.Normal(torch.zeros((), dtype=F64), torch.ones((), dtype=F64))).expand([3])


class TestLaplaceSlab(PriorContract):
    def make(self):
        return SpikeAndSlab(tensor(0.1, 0.5, 0.9), dist.Laplace(tensor(0.0), tensor(0.8)))

    def edges(self):
        return np.linspace(-30, 30, 1201)  # the kink at 0 is an edge


class TestStudentTSlab(PriorContract):
    def make(self):
        return SpikeAndSlab(tensor(0.1, 0.5, 0.9), dist.StudentT(tensor(9.0), tensor(0.0), tensor(0.5)))

    def edges(self):
        tail = np.geomspace(10, 1e5, 400)
        return np.concatenate([-tail[::-1], np.linspace(-10, 10, 401)[1:-1], tail])


class TestMixtureSlab(PriorContract):
    """A user's slab without a name: two Gaussians of different widths."""

    has_bound = False

    def make(self):
        parts = dist.Normal(tensor(0.0, 0.0), tensor(0.1, 1.0))
        slab = dist.MixtureSameFamily(dist.Categorical(tensor(0.4, 0.6)), parts)
        return SpikeAndSlab(tensor(0.1, 0.5, 0.9), slab)

    def edges(self):
        return component_edges(np.zeros(2), np.array([0.1, 1.0]))


def test_log_prob_against_scipy():
    law = TestNormalSlab().make()
    value = tensor(0.0, 0.7, -1.3)
    slab = scipy.stats.norm.logpdf([0.0, 0.7, -1.3], [0.0, 0.3, -0.2], [1.0, 0.5, 2.0])
    expected = [np.log(0.9), np.log(0.5) + slab[1], np.log(0.9) + slab[2]]
    np.testing.assert_allclose(law.log_prob(value).numpy(), expected, rtol=1e-12)


@pytest.mark.parametrize("inclusion", [0.0, 1.0])
def test_limits(inclusion):
    slab = dist.Normal(tensor(0.3), tensor(0.5))
    law = SpikeAndSlab(tensor(inclusion), slab)
    draws = law.sample((1000,))
    assert ((draws != 0) == bool(inclusion)).all()
    value = tensor(0.0, 0.7)[:, None]
    expected = [-np.inf, slab.log_prob(tensor(0.7)).item()] if inclusion else [0.0, -np.inf]
    np.testing.assert_allclose(law.log_prob(value).squeeze(1).numpy(), expected)
    assert law.mean.item() == pytest.approx(0.3 * inclusion)
    assert law.variance.item() == pytest.approx(0.25 * inclusion)


@pytest.mark.parametrize("inclusion", [0.0, 0.4, 1.0])
def test_log_prob_gradients_are_finite(inclusion):
    probability, loc = tensor(inclusion).requires_grad_(), tensor(0.1).requires_grad_()
    law = SpikeAndSlab(probability, dist.Normal(loc, tensor(1.0)))
    log_prob = law.log_prob(tensor(0.0, 0.7)[:, None])
    log_prob[log_prob.isfinite()].sum().backward()
    assert probability.grad.isfinite().all() and loc.grad.isfinite().all()


def test_slab_that_is_infinite_at_zero_sends_no_nan_back():
    concentration = tensor(0.5).requires_grad_()
    law = SpikeAndSlab(tensor(0.5), dist.Gamma(concentration, tensor(1.0)))
    law.log_prob(tensor(0.0)).sum().backward()
    assert concentration.grad.item() == 0.0
    assert law.support.check(tensor(0.0, 1.0, -1.0)).tolist() == [True, True, False]


def test_slab_without_zero_in_its_support():
    loc = tensor(0.2).requires_grad_()
    law = SpikeAndSlab(tensor(0.25), dist.LogNormal(loc, tensor(1.0)))
    log_prob = law.log_prob(tensor(0.0, 2.0)[:, None]).squeeze(1)
    expected = [np.log(0.75), np.log(0.25) + scipy.stats.lognorm.logpdf(2.0, 1.0, scale=np.exp(0.2))]
    np.testing.assert_allclose(log_prob.detach().numpy(), expected)
    log_prob.sum().backward()
    assert loc.grad.item() == pytest.approx(np.log(2.0) - 0.2)


def test_rsample_gradients():
    probability, loc, scale = (tensor(v).expand(500).clone().requires_grad_() for v in (0.4, 0.3, 0.5))
    law = SpikeAndSlab(probability, dist.Normal(loc, scale))
    assert law.has_rsample and not SpikeAndSlab(0.5, dist.Bernoulli(0.5)).has_rsample
    value = law.rsample()
    value.sum().backward()
    drawn = value != 0
    assert 0.3 < drawn.double().mean() < 0.5
    assert torch.equal(loc.grad, drawn.double())  # pathwise where the gate is open
    torch.testing.assert_close(scale.grad[drawn], ((value - 0.3) / 0.5)[drawn].detach())
    torch.testing.assert_close(probability.grad[drawn], value[drawn].detach())  # dθ/dλ = slab draw
    assert (probability.grad[~drawn] != 0).all()


def test_shared_parameters_stay_shared():
    law = SpikeAndSlab(0.3, dist.Normal(0.0, 1.0)).expand([64, 32])
    assert law.base_inclusion.shape == () and law.base_slab.batch_shape == ()
    assert law.inclusion.shape == law.slab.batch_shape == (64, 32)
    assert law.inclusion.untyped_storage().nbytes() == 4


def test_in_a_plate_with_poutine():
    law = SpikeAndSlab(0.5, dist.Normal(0.0, 1.0))

    def model():
        with pyro.plate("rows", 4), pyro.poutine.scale(scale=2.0):
            return pyro.sample("w", law)

    trace = pyro.poutine.trace(model).get_trace()
    trace.compute_log_prob()
    site = trace.nodes["w"]
    assert site["value"].shape == (4,)
    torch.testing.assert_close(site["log_prob"], 2 * law.log_prob(site["value"]))


@pytest.mark.parametrize(
    ("make", "sentence"),
    [
        (lambda: SpikeAndSlab(1.5, dist.Normal(0.0, 1.0)), r"inclusion must lie in \[0, 1\].* to 1.5"),
        (lambda: SpikeAndSlab(torch.tensor([0.5, -0.1]), dist.Normal(0.0, 1.0)), r"from -0.1 to 0.5"),
        (lambda: SpikeAndSlab(float("nan"), dist.Normal(0.0, 1.0)), r"inclusion must lie in \[0, 1\]"),
        (lambda: SpikeAndSlab(0.5, dist.Normal(torch.zeros(3), 1.0).to_event(1)), r"event_shape \(3,\)"),
        (lambda: SpikeAndSlab(0.5, 1.0), r"must be a distribution of scalars.*got 1.0"),
    ],
)
def test_bad_arguments(make, sentence):
    with pytest.raises(ValueError, match=sentence):
        make()


def test_values_are_validated_and_validation_can_be_off():
    law = SpikeAndSlab(0.5, dist.Normal(0.0, 1.0))
    with pytest.raises(ValueError, match="within the support"):
        law.log_prob(torch.tensor(float("nan")))
    SpikeAndSlab(1.5, dist.Normal(0.0, 1.0), validate_args=False)
