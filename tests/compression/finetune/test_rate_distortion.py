"""E- and M-steps of the learned prior, against brute force, the packer and the ELBO's own KL."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kits.ranks import run_on_ranks
from torch import nn
from torch.nn.functional import pad

from sqs_pyro.compression.finetune.rate_distortion import (
    RateDistortion,
    SymbolPrior,
    coded_bits,
    fit_symbol_prior,
    intervals,
    posterior,
)
from sqs_pyro.distributions import kl_bound
from sqs_pyro.inference.guides.spike_gmm import SpikeGMMGuide
from sqs_pyro.models import BayesianNetwork, LearnedPrior
from sqs_pyro.packing import CodedTensor
from sqs_pyro.packing.layouts import pack_tensor


def costs(latent, loc, rates, step):
    """``(w - c_z)²/2 + step rate_z`` of one site, ``[n, 1 + K]``, zero first."""
    values = pad(loc.double(), (1, 0))
    return 0.5 * (latent.double()[:, None] - values) ** 2 + step * rates.double()


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(1, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 36, 20), nn.Linear(20, 3))


def guided(num_components=6, scope="layer", groups="layer"):
    model = BayesianNetwork(network(), prior=LearnedPrior(scope=scope), num_data=100)
    return model, SpikeGMMGuide(model, num_components, groups=groups, estimator="straight_through")


def even(guide, value=100.0):
    return dict.fromkeys(guide.site_guides(), value)


class TestIntervals:
    @settings(max_examples=300)
    @given(st.integers(1, 7), st.integers(0, 10_000), st.floats(0, 3), st.booleans())
    def test_agree_with_trying_every_symbol(self, k, seed, step, ties):
        generator = torch.Generator().manual_seed(seed)
        loc = torch.randn(k, generator=generator, dtype=torch.float64)
        if ties:
            loc[k // 2 :] = loc[0]
        rates = 3 * torch.rand(1 + k, generator=generator, dtype=torch.float64)
        latent = 3 * torch.randn(200, generator=generator, dtype=torch.float64)
        start, end = intervals(loc[None], rates[None], torch.tensor([step], dtype=torch.float64))
        cost = costs(latent, loc, rates, step)
        inside = (latent[:, None] > start) & (latent[:, None] < end)
        assert (inside.sum(1) == 1).all(), "the intervals do not tile the line"
        chosen = cost[inside]
        torch.testing.assert_close(chosen, cost.amin(1))

    def test_a_dear_symbol_rules_nowhere(self):
        start, end = intervals(
            torch.tensor([[-1.0, 0.5, 1.0]]), torch.tensor([[0.1, 1.0, 50.0, 1.0]]), torch.ones(1)
        )
        assert start[0, 2] == end[0, 2] or start[0, 2] > end[0, 2] - 1e-12


class TestLaws:
    def test_shares_maximise_the_likelihood_of_the_symbols(self):
        counts = torch.tensor([[70.0, 10.0, 20.0], [1.0, 1.0, 98.0]])
        best = (counts * fit_symbol_prior(counts).rates).sum(1)
        shares = counts / counts.sum(1, keepdim=True)
        entropy = -(counts * shares.log()).sum(1).double()
        assert (best >= entropy - 1e-9).all()  # no law codes in less than the empirical entropy
        torch.testing.assert_close(best, entropy, rtol=0.02, atol=0)  # the pseudo-counts cost this much

    def test_rates_are_a_law(self):
        prior = SymbolPrior(torch.tensor([0.3]), torch.tensor([[0.25, 0.75]]).log())
        torch.testing.assert_close((-prior.rates).exp(), torch.tensor([[0.7, 0.075, 0.225]]))

    def test_a_pooled_inclusion_is_that_of_all_weights(self):
        counts = torch.tensor([[900.0, 50.0, 50.0], [50.0, 25.0, 25.0]])
        prior = fit_symbol_prior(counts, pool_inclusion=True)
        torch.testing.assert_close(prior.inclusion, torch.full((2,), 152.0 / 1103, dtype=torch.float64))


class TestCodedBits:
    @pytest.mark.parametrize("rate", [0.05, 0.3, 1.0])
    @pytest.mark.parametrize("k", [2, 9])
    def test_predicts_the_bytes_of_the_entropy_layout(self, k, rate):
        n = 20_000
        codes = torch.multinomial(torch.arange(1.0, 1 + k), n, replacement=True).to(torch.uint8)
        mask = torch.rand(n) < rate
        codes[~mask] = 0
        packed = pack_tensor(CodedTensor(codes, mask, torch.randn(1, k).half().float()), "entropy")
        counts = torch.bincount(torch.where(mask, codes.int() + 1, 0), minlength=1 + k)
        bits = float(coded_bits(counts[None]))
        assert packed.num_bytes * 8 == pytest.approx(bits, rel=2e-3, abs=64)


class TestPosterior:
    def test_is_the_closed_form(self):
        latent, loc = torch.randn(1, 50), torch.tensor([[-1.0, 0.7]])
        rates, step = torch.tensor([0.2, 2.0, 3.0]), 0.3
        codes, log_odds = posterior(latent, loc, rates, step)
        cost = costs(latent[0], loc[0], rates, step)
        assert torch.equal(codes[0], cost[:, 1:].argmin(1))
        expected = (cost[:, 0] - cost[:, 1:].amin(1)) / step
        torch.testing.assert_close(log_odds[0].double(), expected, rtol=1e-5, atol=1e-5)


class TestFit:
    @pytest.mark.parametrize("groups", ["layer", "channel"])
    def test_reaches_the_bits_that_are_asked_for(self, groups):
        _, guide = guided(num_components=3, groups=groups)
        fitting = RateDistortion(guide)
        most = fitting.bits_at(0.0, even(guide))
        for share in (0.8, 0.5, 0.3):
            found = fitting.fit(even(guide), bits=share * most)
            assert found.bits == pytest.approx(share * most, rel=0.03)
            assert found.beta == fitting.beta > 0

    def test_more_beta_is_fewer_bits_and_fewer_weights(self):
        bits, rates = [], []
        for beta in (1e-3, 1e-2, 1e-1, 1.0):
            _, guide = guided()
            bits.append(RateDistortion(guide).fit(even(guide), beta=beta).bits)
            rates.append(guide.nonzero_rate())
        assert bits == sorted(bits, reverse=True) and rates == sorted(rates, reverse=True)
        assert rates[0] > 0.8 and rates[-1] < 0.2

    def test_every_step_lowers_the_free_energy(self):
        """Coordinate descent on ``Σ h (w - c_z)²/2 + β Σ rate_z``, but for the pseudo-counts of the M-step."""
        _, guide = guided()
        fitting, precision, beta = RateDistortion(guide), even(guide), 0.05

        @torch.no_grad()
        def free_energy() -> float:
            total = 0.0
            for i, site in enumerate(guide.site_guides().values()):
                values = site.harden(torch.float32, keep_codes=True).dense()
                symbols = torch.where(site.gates() > 0.5, site.codes.view(site.shape).long() + 1, 0)
                quadratic = 0.5 * precision[site.site_name] * (site.latent - values).square().sum()
                total += float(quadratic + beta * fitting.symbol_prior.rates[i][symbols].sum())
            return total

        with torch.no_grad():
            for site in guide.site_guides().values():
                site.loc = 0.6 * site.loc  # far from the optimum
        energies = []
        for _ in range(6):
            fitting.fit(precision, beta=beta, rounds=1)
            energies.append(free_energy())
        assert all(later <= earlier * (1 + 1e-4) for earlier, later in itertools.pairwise(energies))
        assert energies[-1] < 0.995 * energies[0]

    def test_the_guide_holds_the_e_step(self):
        _, guide = guided()
        RateDistortion(guide).fit(even(guide), beta=0.05)
        for site in guide.site_guides().values():
            assert torch.equal(site.codes, site.most_probable_codes())

    @torch.no_grad()
    def test_its_kl_is_the_elbos(self):
        """At one-hot posteriors the KL of the learned prior is the code length."""
        model, guide = guided()
        fitting = RateDistortion(guide)
        found = fitting.fit(even(guide), beta=0.05)
        model.prior.set_inclusion(dict(zip(fitting.sites, fitting.symbol_prior.inclusion.tolist(), strict=True)))
        guide.temperature = 1e-4
        total = 0.0
        for name, site in guide.site_guides().items():
            site.gate_logit = 200 * (site.gates() - 0.5).sign()
            q, p = guide.distribution(site), model.priors[name].base_dist
            total += float(kl_bound(q, p, "jensen").sum())
        assert total == pytest.approx(found.kl, rel=1e-4)

    def test_pooling_keeps_a_sparse_layer_alive(self):
        """A layer of small weights: under its own ρ a non-zero is dearer than under the network's."""
        kept = {}
        for pooled in (False, True):
            _, guide = guided()
            large, small = (guide.site_guides()[name] for name in ("3.weight", "4.weight"))
            with torch.no_grad():
                large.latent *= 3
                small.latent *= 0.5
            large.fit_codebook(), small.fit_codebook()
            RateDistortion(guide, pool_inclusion=pooled).fit(even(guide), beta=0.05, rounds=10)
            kept[pooled] = int((small.gates() > 0.5).sum())
        assert kept[True] > kept[False]


DIVIDED = """
import sys
import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from sqs_pyro import BayesianNetwork, SpikeGMMGuide
from sqs_pyro.compression.finetune.rate_distortion import RateDistortion
from sqs_pyro.compression.finetune.structured_zeros import StructuredRateDistortion
from sqs_pyro.errors import NetworkError
from sqs_pyro.models import shard_sites
from sqs_pyro.ranks import started

found = {}
with started() as ranks:
    for groups in ("layer", "channel"):
        torch.manual_seed(0)
        net = nn.Sequential(nn.Linear(30, 41), nn.Tanh(), nn.Linear(41, 7))
        model = BayesianNetwork(net, num_data=100)
        if ranks.size > 1:
            shard_sites(model, mesh=init_device_mesh("cpu", (ranks.size,)))
        guide = SpikeGMMGuide(model, 5, groups=groups, estimator="straight_through")
        precision = {name: 10.0 * (1 + i) for i, name in enumerate(guide.site_names)}
        for pooled in (False, True):
            fitting = RateDistortion(guide, pool_inclusion=pooled)
            most = fitting.bits_at(0.0, precision)
            fit = fitting.fit(precision, bits=0.6 * most)
            found[groups, pooled] = {
                "most": most, "fit": vars(fit), "inclusion": fitting.symbol_prior.inclusion,
                "weights": {name: coded.dense() for name, coded in guide.harden().items()},
                "rate": guide.nonzero_rate(),
            }
    if ranks.size > 1:
        try:
            StructuredRateDistortion(guide)
        except NetworkError as error:
            found["refused"] = str(error)
    torch.save(found, f"{sys.argv[1]}/{ranks.size}-{ranks.rank}")
"""


def test_beta_of_sites_that_ranks_divide_is_that_of_all_weights(tmp_path):
    for size in (1, 2):
        run_on_ranks(size, DIVIDED, tmp_path)
    alone = torch.load(tmp_path / "1-0")
    first, second = (torch.load(tmp_path / f"2-{rank}") for rank in range(2))
    for ranks in (first, second):
        assert "all weights" in ranks.pop("refused")
    for key, expected in alone.items():
        for found in (first[key], second[key]):
            assert (found["most"], found["rate"]) == (expected["most"], expected["rate"])
            assert found["fit"]["bits"] == expected["fit"]["bits"]  # counts are exact
            assert found["fit"]["bits"] == pytest.approx(0.6 * found["most"], rel=0.05)  # of few weights
            # Sums of two ranks' weights are rounded otherwise than one rank's, and codewords are float32.
            torch.testing.assert_close(found["fit"], expected["fit"], rtol=1e-6, atol=0)
            torch.testing.assert_close(found["inclusion"], expected["inclusion"])
            torch.testing.assert_close(found["weights"], expected["weights"], rtol=1e-3, atol=1e-6)
        assert first[key]["fit"] == second[key]["fit"]
        for name, weight in first[key]["weights"].items():
            assert torch.equal(weight, second[key]["weights"][name])
