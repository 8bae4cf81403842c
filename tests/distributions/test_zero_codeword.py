"""Zero as a codeword: the constraint, and DGMS, LSQ and TTQ against the rules of their papers."""

import pytest
import torch
from torch import nn
from torch.distributions import Categorical, MixtureSameFamily, Normal, biject_to, constraints

from sqs_pyro.distributions.codebook import Codebook
from sqs_pyro.distributions.codebook_gmm import CodebookGMM
from sqs_pyro.distributions.kmeans import kmeans_1d
from sqs_pyro.distributions.uniform_grid import UniformGrid
from sqs_pyro.distributions.zero_codeword import (
    ZeroFirst,
    kmeans_with_zero,
    lsq_codebook,
    lsq_value,
    ternary_codebook,
    ternary_codes,
    ttq_value,
)
from sqs_pyro.errors import ArgumentError
from sqs_pyro.inference import SpikeGMMGuide
from sqs_pyro.models import BayesianNetwork


@pytest.mark.parametrize(("others", "size"), [(constraints.real_vector, 4), (UniformGrid(4), 1)])
def test_there_and_back(others, size):
    form = ZeroFirst(others)
    transform, x = biject_to(form), torch.randn(2, size, dtype=torch.float64)
    y = transform(x)
    assert y.shape == (2, 5) and bool((y[:, 0] == 0).all()) and bool(form.check(y).all())
    torch.testing.assert_close(transform.inv(y), x)
    assert transform.forward_shape((2, size)) == (2, 5) and transform.inverse_shape((2, 5)) == (2, size)
    assert not bool(form.check(y + 0.1).any())


class TestTTQ:
    """Zhu, Han, Mao & Dally 2017, "Trained ternary quantization", equations 7 to 9."""

    LATENT = torch.tensor([[0.9, 0.04, -0.2, -0.05, 0.3, -1.0, 0.05]])
    SCALES = torch.tensor([[0.0, -0.7, 0.4]])  # 0, -w_n, w_p

    def test_threshold(self):
        # 0.05 max|w| = 0.05: what is as large as that is zero.
        assert ternary_codes(self.LATENT, 0.05).tolist() == [[2, 0, 1, 0, 2, 1, 0]]

    def test_gradients(self):
        latent, loc = self.LATENT.clone().requires_grad_(), self.SCALES.clone().requires_grad_()
        codes = ternary_codes(self.LATENT, 0.05)
        value = ttq_value(latent, torch.ones_like(latent), loc, codes)
        assert value.tolist() == [pytest.approx([0.4, 0, -0.7, 0, 0.4, -0.7, 0])]
        upstream = torch.tensor([[1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0]])
        value.backward(upstream)
        # ∂L/∂w_p sums over the positive ones; ∂L/∂w_n, by W^t = -w_n there, is minus that of the codeword -w_n.
        assert loc.grad[0, 1:].tolist() == [3 + 6, 1 + 5]
        # ∂L/∂w: times w_p above the threshold, times 1 within, times w_n below.
        assert latent.grad.tolist() == [pytest.approx([0.4, 2.0, 2.1, 4.0, 2.0, 4.2, 7.0])]

    def test_codewords_begin_as_means_of_their_signs(self):
        found = ternary_codebook(self.LATENT, 0.05)
        assert found.loc.tolist() == [pytest.approx([0.0, -0.6, 0.6])]
        assert ternary_codebook(torch.tensor([[1.0, 0.5, 0.0]]), 0.05).loc.tolist() == [
            pytest.approx([0.0, -0.5, 0.75])  # no negative weight: the mean size stands in
        ]


class TestLSQ:
    """Esser et al. 2020, "Learned step size quantization", equations 1 to 5."""

    def test_gradients(self):
        step, latent = 0.25, torch.tensor([[0.1, -0.2, 0.3, 0.9, -0.8, 0.0]], requires_grad=True)
        loc = torch.tensor([[0.0, -2 * step, -step, step]], requires_grad=True)  # 2 bits: Q_N = 2, Q_P = 1
        value = lsq_value(latent, torch.ones(1, 6), loc, torch.zeros(1, 6, dtype=torch.uint8))
        assert value.tolist() == [pytest.approx([0.0, -0.25, 0.25, 0.25, -0.5, 0.0])]
        upstream = torch.tensor([[1.0, 2.0, 3.0, 4.0, 5.0, 6.0]])
        value.backward(upstream)
        of_step = torch.tensor(
            [0 - 0.4, -1 + 0.8, 1.0, 1.0, -2.0, 0.0]
        )  # w / s = 0.4, -0.8; others are beyond the ends
        # s is the last codeword here, times Q_P = 1; its gradient is scaled by 1 / sqrt(N Q_P).
        assert float(loc.grad[0, -1]) == pytest.approx(float((of_step * upstream[0]).sum()) / 6**0.5, rel=1e-5)
        assert latent.grad.tolist() == [pytest.approx([1.0, 2.0, 0.0, 0.0, 0.0, 6.0])]

    def test_the_first_step(self):
        values = torch.tensor([[0.5, -1.5, 1.0, -1.0]])
        found = lsq_codebook(values, 7)  # 3 bits: -4 to 3
        step = 2 * 1.0 / 3**0.5
        assert found.loc.tolist() == [pytest.approx([step * n for n in (0, -4, -3, -2, -1, 1, 2, 3)])]
        assert float(found.inertia) == pytest.approx(
            2 * (0.5 - 0) ** 2 * 0.5 + (1.5 - step) ** 2 + 2 * (step - 1) ** 2
        )


class TestDGMS:
    """Dong et al. 2022: soft responsibilities of a mixture whose first component is around zero."""

    def test_soft_weights_are_tweedies(self):
        # Of components of one width, Σ_k γ_k μ_k = w + σ² d/dw log p(w), whatever γ is computed by.
        loc, sigma, mixing = torch.tensor([[0.0, -0.6, 0.5]]), 0.3, torch.tensor([[0.5, 0.2, 0.3]])
        latent = torch.linspace(-1, 1, 9, dtype=torch.float64)
        law = MixtureSameFamily(Categorical(mixing[0].double()), Normal(loc[0].double(), sigma))
        moved = latent.clone().requires_grad_()
        (score,) = torch.autograd.grad(law.log_prob(moved).sum(), moved)
        codebook = Codebook(loc.double(), torch.full_like(loc, sigma).double(), mixing.log().double())
        q = CodebookGMM(torch.ones_like(latent), latent, *codebook, estimator="soft")
        torch.testing.assert_close(q.rsample(), latent + sigma**2 * score)

    def test_it_begins_with_kmeans(self):
        values = torch.randn(2, 500, generator=torch.Generator().manual_seed(0)) + 0.3
        plain, found = kmeans_1d(values, 5), kmeans_with_zero(values, 4)
        for row in range(2):
            nearest = int(plain.loc[row].abs().argmin())
            others = [k for k in range(5) if k != nearest]
            assert found.loc[row].tolist() == [0.0, *plain.loc[row, others].tolist()]
            assert found.mixing[row, 0] == plain.mixing[row, nearest]


def guide_of(weight, **options):
    net = nn.Linear(weight.shape[1], weight.shape[0], bias=False)
    net.weight.data = weight
    return SpikeGMMGuide(BayesianNetwork(net, num_data=10), stage="coded", **options)


@pytest.mark.parametrize(
    "options",
    [
        {"num_components": 4, "estimator": "soft", "zero": "codeword"},
        {"num_components": 3, "estimator": "lsq", "grid": "uniform", "zero": "codeword"},
        {"num_components": 2, "estimator": "ttq", "zero": 0.1},
    ],
)
def test_zeros_that_ship_are_those_at_the_codeword(options):
    weight = torch.randn(20, 10, generator=torch.Generator().manual_seed(0))
    guide = guide_of(weight, **options)
    (site,), (coded,) = guide.site_guides().values(), guide.harden(torch.float32).values()
    assert coded.num_components == options["num_components"]
    if options["estimator"] == "ttq":
        zero = weight.abs() <= 0.1 * weight.abs().max()
        expected = torch.where(weight > 0, site.loc[0, 2], site.loc[0, 1]).masked_fill(zero, 0)
    elif options["estimator"] == "lsq":
        step = float(site.loc[0, -1].detach())
        expected, zero = step * (weight / step).round().clamp(-2, 1), (weight / step).round() == 0
    else:  # the largest posterior of a mixture with these parameters
        codebook = site.codebook()
        posterior = codebook.log_mixing[0] + Normal(codebook.loc[0], codebook.scale[0]).log_prob(weight[..., None])
        expected, zero = codebook.loc[0][posterior.argmax(-1)], posterior.argmax(-1) == 0
    assert bool((coded.mask == ~zero).all()) and 0 < int(zero.sum()) < zero.numel()
    torch.testing.assert_close(
        coded.dense(), expected.detach(), rtol=5e-3, atol=0
    )  # steps are rounded to bfloat16
    assert guide.nonzero_rate() == pytest.approx(float((~zero).float().mean()))


def test_zeros_come_back():
    """Weights at the codeword zero get gradients, and leave it."""
    guide = guide_of(torch.tensor([[0.01, -1.0, 1.0, 0.8]]), num_components=2, estimator="ttq", zero=0.05)
    (site,) = guide.site_guides().values()
    assert guide.nonzero_rate() == 0.75
    (value,) = guide().values()
    value[0, 0].backward()
    with torch.no_grad():
        site.latent_unconstrained.add_(0.2 * site.latent_unconstrained.grad)
    guide()
    assert guide.nonzero_rate() == 1.0


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"zero": "spike"}, "gate, codeword or a number"),
        ({"zero": 1.5}, "gate, codeword or a number"),
        ({"zero": "codeword"}, "whose gates are drawn"),
        ({"zero": "codeword", "estimator": "soft", "num_components": 256}, "at most 255"),
        ({"zero": 0.05, "estimator": "ttq", "num_components": 3}, "a codeword for each sign"),
        ({"estimator": "ttq"}, "give zero as a number"),
        ({"estimator": "lsq", "zero": "codeword"}, "grid 'uniform'"),
    ],
)
def test_what_does_not_go_together(options, said):
    with pytest.raises(ArgumentError, match=said):
        guide_of(torch.randn(30, 10), **options)
