"""E- and M-steps under the law of urns, against brute force, the packer and the ELBO's own KL."""

import math

import pytest
import torch
from torch import nn

from sqs_pyro.compression.finetune.rate_distortion import RateDistortion
from sqs_pyro.compression.finetune.structured_zeros import StructuredRateDistortion
from sqs_pyro.distributions import kl_bound
from sqs_pyro.inference.guides.spike_gmm import SpikeGMMGuide
from sqs_pyro.models import BayesianNetwork, LearnedPrior
from sqs_pyro.packing import pack_tensor
from sqs_pyro.packing.urns import as_kernels, full_conditionals


def network() -> nn.Sequential:
    """Return a network in whose larger layers some channels are much smaller than others."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(4, 16, 3), nn.Conv2d(16, 24, 3), nn.Flatten(), nn.Linear(96, 20))
    with torch.no_grad():
        for layer in (net[0], net[1], net[3]):
            layer.weight.mul_(torch.rand(layer.weight.shape[0], *[1] * (layer.weight.dim() - 1)) + 0.1)
    return net


def guided(num_components=4, groups="layer"):
    model = BayesianNetwork(network(), prior=LearnedPrior(scope="structured"), num_data=100)
    return model, SpikeGMMGuide(model, num_components, groups=groups, estimator="straight_through")


def even(guide, value=100.0):
    return dict.fromkeys(guide.site_guides(), value)


def packed_bits(guide):
    return 8 * sum(pack_tensor(tensor, "structured").num_bytes for tensor in guide.harden().values())


@pytest.mark.parametrize("groups", ["layer", "channel"])
def test_reaches_the_bits_that_are_asked_for_and_the_file_has_them(groups):
    _, guide = guided(num_components=3, groups=groups)
    fitting = StructuredRateDistortion(guide)
    most = fitting.bits_at(0.0, even(guide))
    for share in (0.8, 0.5, 0.3):
        found = fitting.fit(even(guide), bits=share * most)
        # Whole kernels come and go at once: on so few weights the size jumps with β.
        assert found.bits == pytest.approx(share * most, rel=0.06)
        assert packed_bits(guide) == pytest.approx(found.bits, rel=0.03)


@pytest.mark.parametrize("kind", [RateDistortion, StructuredRateDistortion])
@pytest.mark.parametrize(("share", "left"), [(100.0, "all"), (0.0, "none")])
def test_a_size_out_of_reach_ends_at_finite_gates_as_near_as_can_be(kind, share, left):
    _, guide = guided()
    fitting = kind(guide)
    found = fitting.fit(even(guide), bits=share * fitting.bits_at(0.0, even(guide)))
    assert 0 < found.beta < math.inf
    for site in guide.site_guides().values():
        assert site.gate_logit.isfinite().all() and site.scale.isfinite().all()
        kept = site.gates() > 0.5
        # Of all, a weight nearer to zero than to a codeword is zero still.
        assert not kept.any() if left == "none" else kept.float().mean() > 0.5


def test_more_beta_is_fewer_bits_and_fewer_weights():
    bits, rates = [], []
    for beta in (1e-3, 1e-2, 1e-1, 1.0):
        _, guide = guided()
        bits.append(StructuredRateDistortion(guide).fit(even(guide), beta=beta).bits)
        rates.append(guide.nonzero_rate())
    assert bits == sorted(bits, reverse=True) and rates == sorted(rates, reverse=True)


@torch.no_grad()
def test_a_weight_is_zero_where_that_is_cheaper_given_all_others():
    _, guide = guided()
    fitting, precision, beta = StructuredRateDistortion(guide), even(guide), 0.05
    fitting.fit(precision, beta=beta, rounds=20, move_codewords=False)
    for i, site in enumerate(guide.site_guides().values()):
        kept = site.gates() > 0.5
        error = 0.5 * precision[site.site_name] * (site.latent[..., None] - site.loc[0]).square()
        price = (error / beta - fitting.symbol_prior.log_mixing[i].to(error)).amin(-1)
        gain = as_kernels(0.5 * precision[site.site_name] * site.latent.square() / beta - price)
        # The odds led to these zeros, and these zeros to the odds: all but the few that change at once.
        given = full_conditionals(kept)
        assert float(((gain + given.elsewhere > 0) == as_kernels(kept)).float().mean()) > 0.95
        whole = given.of_kernels(as_kernels(kept)) + (gain * as_kernels(kept)).sum(2)
        empty = given.of_kernels(torch.zeros_like(as_kernels(kept)))
        assert float((whole > empty - 0.5).float().mean()) > 0.98


def test_full_kernels_of_tiny_weights_do_not_hold_each_other():
    _, guide = guided()
    site = guide.site_guides()["1.weight"]
    with torch.no_grad():
        site.latent[:12] *= 1e-3
        site.fit_codebook()
    fitting = StructuredRateDistortion(guide)
    for share in (0.9, 0.7, 0.5):
        fitting.fit(even(guide), bits=share * fitting.bits_at(0.0, even(guide)), rounds=1)
    assert not (site.gates()[:12] > 0.5).any()


def test_zeros_gather_in_small_channels():
    """At equal bits the law of urns keeps more weights, the law of the layer spreads them."""
    kept = {}
    for kind in (RateDistortion, StructuredRateDistortion):
        _, guide = guided()
        fitting = kind(guide)
        fitting.fit(even(guide), bits=9_000, rounds=10)
        kept[kind] = guide.nonzero_rate()
    assert kept[StructuredRateDistortion] > 1.02 * kept[RateDistortion]


@torch.no_grad()
def test_its_kl_is_the_elbos():
    """At one-hot posteriors the KL of the structured prior is the code length, weight by weight."""
    model, guide = guided()
    fitting = StructuredRateDistortion(guide)
    found = fitting.fit(even(guide), beta=0.05)
    model.prior.set_inclusion(fitting.inclusions())
    guide.temperature = 1e-4
    total = 0.0
    for name, site in guide.site_guides().items():
        site.gate_logit = 200 * (site.gates() - 0.5).sign()
        total += float(kl_bound(guide.distribution(site), model.priors[name].base_dist, "jensen").sum())
    assert total == pytest.approx(found.kl, rel=1e-4)
    assert total / math.log(2) == pytest.approx(found.bits, rel=0.15)  # without codebooks and tables


def test_a_state_goes_on_as_it_was():
    first, second = (StructuredRateDistortion(guided()[1]) for _ in range(2))
    for fitting in (first, second):
        fitting.fit(dict.fromkeys(fitting.sites, 100.0), bits=12_000, rounds=1)
    third = StructuredRateDistortion(guided()[1])
    for name, site in third.sites.items():
        site.loc = second.sites[name].loc.detach().clone()
    third.load_state_dict(second.state_dict())
    fits = [each.fit(dict.fromkeys(each.sites, 100.0), bits=9_000, rounds=1) for each in (first, third)]
    assert fits[0] == fits[1]
