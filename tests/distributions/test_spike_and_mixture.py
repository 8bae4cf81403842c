"""SpikeAndMixture as a law, and the KL of the guide's laws against it: quadrature, code lengths, gradients."""

import hypothesis.strategies as st
import numpy as np
import pyro.distributions as dist
import pytest
import scipy.stats
import torch
from hypothesis import given, settings
from torch.autograd import gradcheck
from torch.distributions import kl_divergence

from sqs_pyro.distributions import (
    CodebookGMM,
    GaussianSpikeAndSlab,
    LatentSpikeAndSlab,
    SpikeAndMixture,
    SpikeGMM,
    certified_bracket,
    kl_bound,
    log_sum_divergence,
    shares_components,
)
from sqs_pyro.testing.distributions import PriorContract
from sqs_pyro.testing.statistics import bernoulli_kl, component_edges, mixture_kl, mixture_logpdf

F64 = torch.float64
SHAPE = (6, 4, 2)
GROUPS = {"layer": 1, "channel": 6, "tile": 12}


def codebook(groups: int = 1, components: int = 5, seed: int = 0, width: float = 0.3) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(seed)
    loc, scale, mixing = (torch.randn(groups, components, dtype=F64, generator=generator) for _ in range(3))
    return loc, width * scale.exp(), mixing.log_softmax(-1)


def guide_law(groups: int = 1, temperature: float = 0.7, width: float = 0.3) -> CodebookGMM:
    generator = torch.Generator().manual_seed(1)
    gates, latent = (torch.randn(*SHAPE, dtype=F64, generator=generator) for _ in range(2))
    return CodebookGMM(gates.sigmoid(), latent, *codebook(groups, width=width), temperature=temperature)


def shared_prior(q: CodebookGMM, inclusion: float = 0.3) -> SpikeAndMixture:
    """The prior that shares the components of a law of the guide."""
    return SpikeAndMixture(torch.tensor(inclusion, dtype=F64), *q.codebook, q.batch_shape)


def true_kl(q: SpikeGMM, p: SpikeAndMixture) -> np.ndarray:
    """By quadrature, weight by weight."""
    shape = (*q.batch_shape, q.num_components)
    phi, loc, scale = (x.expand(shape).detach().numpy() for x in (q.responsibilities, q.loc, q.scale))
    shape = (*p.batch_shape, p.num_components)
    of_p = [x.expand(shape).detach().numpy()[..., None, :] for x in (p.logits.exp(), p.loc, p.scale)]
    slab = mixture_kl(phi, loc, scale, lambda x: mixture_logpdf(x[..., None], *of_p)[..., 0])
    gates = q.gates.detach().numpy()
    return bernoulli_kl(gates, p.inclusion.detach().numpy()) + gates * slab


class TestOneCodebook(PriorContract):
    exact_for_one_component = False

    def make(self):
        return SpikeAndMixture(torch.tensor([0.1, 0.5, 0.9], dtype=F64), *codebook(), (3,))

    def edges(self):
        loc, scale, _ = (x.numpy() for x in codebook())
        return component_edges(loc[0], scale[0])


class TestCodebookAWeight(TestOneCodebook):
    def make(self):
        return SpikeAndMixture(torch.tensor(0.4, dtype=F64), *codebook(3), (3,))

    def edges(self):
        loc, scale, _ = (x.numpy().ravel() for x in codebook(3))
        return component_edges(loc, scale)


class TestGaussianSpike(PriorContract):
    has_atom = False
    exact_for_one_component = False  # which of the two Gaussians a value is from cannot be read off it

    def make(self):
        return GaussianSpikeAndSlab(torch.tensor([0.1, 0.5, 0.9], dtype=F64), 0.1, 1.3)

    def edges(self):
        return component_edges(np.zeros(2), np.array([0.1, 1.3]))


class TestPlainNormal(PriorContract):
    """torch's own density as a prior, without a spike of any kind."""

    has_atom = False
    exact_for_one_component = False  # with the spike there are two

    def make(self):
        return dist.Normal(torch.tensor([0.0, 0.3, -0.2], dtype=F64), torch.tensor([1.0, 0.5, 2.0], dtype=F64))


def test_density_of_groups_in_row_major_order():
    loc, scale, log_mixing = codebook(12)
    law = SpikeAndMixture(torch.tensor(0.3, dtype=F64), loc, scale, log_mixing, SHAPE)
    value = torch.randn(SHAPE, dtype=F64)
    for i, (x, got) in enumerate(zip(value.flatten(), law.log_prob(value).flatten(), strict=True)):
        mixing, mu, sigma = (c[i // 4].numpy() for c in (log_mixing.exp(), loc, scale))
        density = 0.3 * (mixing * scipy.stats.norm.pdf(x.item(), mu, sigma)).sum()
        assert got.item() == pytest.approx(np.log(density))


@pytest.mark.parametrize("groups", GROUPS)
class TestSharedComponents:
    def test_chain_rule(self, groups):
        q = guide_law(GROUPS[groups])
        p = shared_prior(q)
        phi, pi = q.responsibilities.numpy(), np.broadcast_to(p.logits.exp().numpy(), (*SHAPE, 5))
        expected = bernoulli_kl(q.gates.numpy(), 0.3) + q.gates.numpy() * scipy.stats.entropy(phi, pi, axis=-1)
        assert shares_components(q, p)
        np.testing.assert_allclose(kl_bound(q, p), expected, rtol=1e-12)
        np.testing.assert_allclose(kl_bound(q.explicit(), p), expected, rtol=1e-9)
        np.testing.assert_allclose(kl_divergence(q, p), expected, rtol=1e-12)

    def test_hard_codes_cost_their_code_length(self, groups):
        q = guide_law(GROUPS[groups], temperature=1e-6)
        hard = CodebookGMM((q.gates > 0.5).double(), q.latent, *q.codebook)
        hard.temperature = 1e-6
        p = shared_prior(hard)
        zero, code = np.log(0.7), np.log(0.3) + p.logits.expand(*SHAPE, 5).numpy()
        length = -np.where(q.gates > 0.5, np.take_along_axis(code, q.codes.numpy()[..., None], -1)[..., 0], zero)
        for kind in ("jensen", "dominant"):
            np.testing.assert_allclose(kl_bound(hard, p, kind), length, rtol=1e-9)

    def test_bracket(self, groups):
        for width in (0.02, 0.3, 3.0):
            q = guide_law(GROUPS[groups], width=width)
            p = shared_prior(q)
            lower, upper = (x.numpy() for x in certified_bracket(q, p))
            true = true_kl(q, p)
            assert (lower <= true + 1e-8).all() and (true <= upper + 1e-8).all()

    def test_bracket_of_other_components(self, groups):
        q = guide_law(GROUPS[groups])
        for components in (5, 3):
            other = codebook(GROUPS[groups], components, seed=7)
            p = SpikeAndMixture(torch.tensor(0.3, dtype=F64), *other, SHAPE)
            assert not shares_components(q, p)
            lower, upper = (x.numpy() for x in certified_bracket(q, p))
            true = true_kl(q, p)
            assert (lower <= true + 1e-8).all() and (true <= upper + 1e-8).all()
            for kind in ("jensen", "dominant", "lower"):
                explicit = kl_bound(q.explicit(), p, kind)
                torch.testing.assert_close(
                    kl_bound(q, p, kind), explicit, atol=2e-2 if kind == "lower" else 1e-9, rtol=0
                )

    @pytest.mark.parametrize("shared", [True, False])
    def test_gradients(self, groups, shared):
        q = guide_law(GROUPS[groups])
        inputs = [x.clone().requires_grad_() for x in (q.gates, q.latent, *codebook(GROUPS[groups]))]
        inclusion, other = torch.tensor(0.3, dtype=F64, requires_grad=True), codebook(GROUPS[groups], seed=7)

        def bound(inclusion, gates, latent, loc, scale, log_mixing):
            log_mixing = log_mixing.log_softmax(-1)
            law = CodebookGMM(gates, latent, loc, scale, log_mixing, temperature=0.7, validate_args=False)
            ours = (loc, scale, log_mixing) if shared else other
            return kl_bound(law, SpikeAndMixture(inclusion, *ours, SHAPE, validate_args=False))

        assert gradcheck(bound, (inclusion, *inputs))


@settings(max_examples=50)
@given(
    seed=st.integers(0, 2**32 - 1),
    components=st.integers(1, 6),
    temperature=st.floats(0.05, 3.0),
    width=st.floats(0.01, 3.0),
)
def test_bracket_holds_for_random_codebooks(seed, components, temperature, width):
    rng = np.random.default_rng(seed)
    loc, scale, log_mixing = codebook(1, components, seed=seed % 1000, width=width)
    gates, latent = torch.from_numpy(rng.beta(0.5, 0.5, size=50)), torch.from_numpy(2 * rng.normal(size=50))
    q = CodebookGMM(gates, latent, loc, scale, log_mixing, temperature=temperature)
    p = shared_prior(q, rng.uniform(0.02, 0.98))
    lower, upper = (x.numpy() for x in certified_bracket(q, p))
    true = true_kl(q, p)
    tolerance = 1e-8 * (1 + np.abs(true))
    assert (lower <= true + tolerance).all() and (true <= upper + tolerance).all()


def test_the_bracket_closes_for_separate_components():
    """What the bounds lose is what a draw does not say of its component: nothing, if components are far apart."""
    q = guide_law(width=0.001)
    lower, upper = certified_bracket(q, shared_prior(q))
    torch.testing.assert_close(lower, upper, atol=1e-6, rtol=0)


def test_bits_back():
    """Expected length of the symbols under the prior's code, less the entropy of q, symbol by symbol."""
    q = guide_law(GROUPS["channel"])
    p = shared_prior(q)
    gates, phi = q.gates.numpy()[..., None], q.responsibilities.numpy()
    of_q = np.concatenate([1 - gates, gates * phi], -1)
    pi = np.broadcast_to(p.logits.exp().numpy(), phi.shape)
    of_p = np.concatenate([np.full_like(gates, 0.7), 0.3 * pi], -1)
    length = -(of_q * np.log2(of_p)).sum(-1)
    back = scipy.stats.entropy(of_q, axis=-1, base=2)
    np.testing.assert_allclose(kl_bound(q, p).numpy() / np.log(2), length - back, rtol=1e-9)


def test_log_sum_bound_against_quadrature():
    loc, scale, log_mixing = codebook(1, 4, seed=3)
    at, widths = torch.linspace(-3, 3, 25, dtype=F64), torch.logspace(-2, 0.5, 25, dtype=F64)
    bound = log_sum_divergence(at, widths, loc, scale, log_mixing).numpy()
    of_p = [x.numpy()[0] for x in (log_mixing.exp(), loc, scale)]
    true = mixture_kl(
        np.ones((25, 1)), at.numpy()[:, None], widths.numpy()[:, None], lambda x: mixture_logpdf(x, *of_p)
    )
    assert (true <= bound + 1e-8).all() and (bound - true).min() < 0.1


class TestWarmUp:
    """One Gaussian around each latent, before there are codes."""

    def laws(self, groups: int):
        generator = torch.Generator().manual_seed(2)
        gates, latent = (torch.randn(*SHAPE, dtype=F64, generator=generator) for _ in range(2))
        return gates.sigmoid(), latent, torch.tensor(0.2, dtype=F64), codebook(groups)

    @pytest.mark.parametrize("groups", GROUPS)
    def test_bracket_and_gradients(self, groups):
        gates, latent, scale, prior = self.laws(GROUPS[groups])
        inputs = [x.clone().requires_grad_() for x in (gates, latent, scale, *prior)]

        def bound(gates, latent, scale, *prior):
            q = LatentSpikeAndSlab(gates, latent, scale, validate_args=False)
            return kl_bound(q, SpikeAndMixture(torch.tensor(0.3, dtype=F64), *prior, SHAPE, validate_args=False))

        assert gradcheck(bound, inputs)
        q = LatentSpikeAndSlab(gates, latent, scale)
        p = SpikeAndMixture(torch.tensor(0.3, dtype=F64), *prior, SHAPE)
        lower, upper = (x.numpy() for x in certified_bracket(q, p))
        true = true_kl(q, p)
        assert (lower <= true + 1e-8).all() and (true <= upper + 1e-8).all()
        torch.testing.assert_close(kl_bound(q, p), kl_bound(q.explicit(), p))


def test_nothing_of_size_n_by_k_is_kept():
    latent = torch.randn(800, requires_grad=True)
    loc = torch.linspace(-2, 2, 16)[None].clone().requires_grad_()
    saved: list[int] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: (saved.append(x.numel()), x)[1], lambda x: x):
        q = CodebookGMM(torch.full((800,), 0.5), latent, loc, torch.ones(1, 16), torch.full((1, 16), 1 / 16).log())
        p = SpikeAndMixture(torch.tensor(0.5), *q.codebook, (800,))
        kl_bound(q, p).sum().backward()
    assert 0 < max(saved) <= 800


def test_sentences():
    loc, scale, log_mixing = codebook(5)
    with pytest.raises(ValueError, match=r"must all be \[G, K\].*for weights \(12,\)"):
        SpikeAndMixture(torch.tensor(0.5), loc, scale, log_mixing, (12,))
    with pytest.raises(ValueError, match="gates must lie in"):
        SpikeAndMixture(torch.tensor(1.5), loc, scale, log_mixing, (10,))
    with pytest.raises(RuntimeError):
        SpikeAndMixture(torch.tensor(0.5), *codebook(3), (3,)).expand((4,))


def test_draws_have_no_gradient():
    law = SpikeAndMixture(torch.tensor(0.5, requires_grad=True), *codebook(), (1000,))
    assert isinstance(law, dist.TorchDistribution) and not law.has_rsample
    draws = law()
    assert not draws.requires_grad and 0.4 < float((draws == 0).double().mean()) < 0.6
