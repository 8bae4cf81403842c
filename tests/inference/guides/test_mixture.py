"""A mixture of guides: draws, marginals and bounds against its members; the sine with a gap; one file."""

import copy

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import SVI, Predictive
from torch import nn

from sqs_pyro import SQSELBO, BayesianNetwork, SpikeAndSlab, SpikeGMMGuide, diagnose, load, pack_ensemble, save
from sqs_pyro.errors import ArgumentError, NetworkError
from sqs_pyro.evaluation.averaging import average_of_guide, averaged_network
from sqs_pyro.inference import GuideMixture
from sqs_pyro.inference.natural_gradient import NaturalGradient
from sqs_pyro.models import HierarchicalInclusion, LearnedPrior

X = torch.linspace(-1, 1, 20).unsqueeze(1)
Y = torch.sin(3 * X[:, 0])


def known_noise(output):
    return dist.Normal(output[:, 0], 0.2)


def model_of(prior=None) -> BayesianNetwork:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(1, 4), nn.Tanh(), nn.Linear(4, 1))
    prior = SpikeAndSlab(torch.tensor(0.5), dist.Normal(0.0, 1.0)) if prior is None else prior
    return BayesianNetwork(net, prior, known_noise, num_data=20, include=".*")


def apart(num_members=2, prior=None, **options) -> GuideMixture:
    """Members that do not overlap: the latents of the m-th are around 10 m."""
    model = model_of(prior)
    mixture = GuideMixture.restarts(model, num_members, num_components=4, **{"initial_gate": 1.0} | options)
    for m, member in enumerate(mixture.members):
        for site in member.site_guides().values():
            site.latent = site.latent.detach() + 10.0 * m
    return mixture


def members_of(draws: torch.Tensor) -> list[int]:
    """Which member each draw ``[S, ...]`` is of: the mean of its non-zero weights says it."""
    flat = draws.flatten(1)
    return (flat.sum(1) / (flat != 0).sum(1) / 10).round().int().tolist()


class TestDraws:
    @pytest.mark.parametrize("parallel", [False, True])
    def test_a_draw_is_of_one_member(self, parallel):
        mixture = apart(3, initial_gate=5.0)
        samples = Predictive(mixture.model, guide=mixture, num_samples=30, parallel=parallel)(X)
        assert samples["obs"].shape == (30, 20)
        found = [members_of(samples[name]) for name in ("0.weight", "2.weight")]
        assert found[0] == found[1] and set(found[0]) == {0, 1, 2}

    def test_members_come_as_often_as_their_weights_say(self):
        mixture = GuideMixture(list(apart(initial_gate=5.0).members), weights=[1, 3])
        draws = Predictive(mixture, num_samples=2000, parallel=True)(X)["2.weight"]
        share = sum(members_of(draws)) / 2000
        assert abs(share - 0.75) < 5 * (0.75 * 0.25 / 2000) ** 0.5
        assert sum(members_of(torch.stack([d["2.weight"] for d in mixture.draw_weights(8)]))) == 6

    def test_hyper_sites_are_the_members(self):
        mixture = apart(prior=HierarchicalInclusion())
        trace = poutine.trace(mixture).get_trace(X)
        assert "0.weight.inclusion" in trace.nodes
        assert Predictive(mixture.model, guide=mixture, num_samples=3, parallel=True)(X)["obs"].shape == (3, 20)

    def test_a_learned_prior_reads_the_member_that_was_drawn(self):
        mixture = apart(prior=LearnedPrior())
        losses = mixture.elbos(X, Y, num_particles=2)
        each = []
        for member in mixture.members:
            mixture.model.bind_codebooks(member.codebook)
            each.append(SQSELBO(num_particles=2).loss(mixture.model, member, X, Y))
        torch.testing.assert_close(losses, -torch.tensor(each), rtol=0.2, atol=0)


def test_marginals_are_those_of_draws():
    mixture = GuideMixture(list(apart().members), weights=[2, 1])
    draws = [torch.stack([d["0.weight"] for d in mixture.draw_weights(20_000)])]
    q = mixture.get_posterior()["0.weight"]
    torch.testing.assert_close(q.mean.detach(), draws[0].mean(0), atol=0.15, rtol=0)
    included = (draws[0] != 0).float().mean(0)
    torch.testing.assert_close(mixture.inclusion_probabilities()["0.weight"], included, atol=0.02, rtol=0)
    for p, quantile in zip((0.2, 0.6, 0.95), mixture.quantiles([0.2, 0.6, 0.95])["0.weight"], strict=True):
        assert ((draws[0] <= quantile).float().mean(0) >= p - 0.02).all()
        assert ((draws[0] < quantile).float().mean(0) <= p + 0.02).all()


class TestBounds:
    def test_the_elbo_of_the_mixture_is_within(self):
        """Of a model without data, whose ELBO is ``-KL(q‖p)``: by draws and the density of the whole mixture."""

        def model(x):
            pyro.sample("w", SpikeAndSlab(0.5, dist.Normal(0.0, 2.0)).expand((3,)).to_event(1))

        for distance in (0.1, 1.0, 20.0):
            starts = [torch.full((3,), value) for value in (-distance / 2, distance / 2)]
            members = [SpikeGMMGuide(model, 1, init={"w": w}, initial_gate=1.0, init_scale=1.0) for w in starts]
            for member in members:
                member.site_guides()["w"].latent_scale = torch.full((3,), 0.5)
            mixture = GuideMixture(members, weights=[1, 2])
            w = torch.stack([d["w"] for d in mixture.draw_weights(20_000)])
            each = [member.get_posterior()["w"].log_prob(w).sum(-1) for member in members]
            log_q = torch.logsumexp(torch.stack(each) + mixture.weights.log()[:, None], 0)
            log_p = SpikeAndSlab(0.5, dist.Normal(0.0, 2.0)).log_prob(w).sum(-1)
            exact, error = float((log_p - log_q).mean().detach()), float((log_p - log_q).std().detach()) / 140
            low, high = mixture.bracket(X, num_particles=1)  # nothing is drawn: KLs alone
            assert low - 4 * error <= exact <= high + 4 * error
            if distance == 20.0:  # no overlap but of weights that are all zero
                assert abs(exact - high) < 0.05 + 4 * error
            elif distance == 0.1:
                assert abs(exact - low) < 0.05 + 4 * error

    def test_its_loss_is_the_lower_end(self):
        mixture = apart(1)
        twins = GuideMixture([mixture.members[0], copy_of(mixture.members[0], mixture.model)])
        model, elbo, losses = twins.model, SQSELBO(), []
        for seed in range(3):  # with the same random numbers, the loss is that of the member that was drawn
            torch.manual_seed(seed)
            losses.append(elbo.loss(model, twins, X, Y))
            torch.manual_seed(seed)
            member = twins.members[int(dist.Categorical(twins.weights).sample())]
            assert losses[-1] == pytest.approx(elbo.loss(model, member, X, Y), rel=1e-6)
        assert len(set(losses)) == 3
        torch.manual_seed(0)
        low, high = twins.bracket(X, Y, num_particles=2)
        torch.manual_seed(0)
        each = [SQSELBO(num_particles=2).loss(model, member, X, Y) for member in twins.members]
        assert low == pytest.approx(-sum(each) / 2, rel=1e-5)  # the members' mean, and their losses' the mixture's
        assert high - low == pytest.approx(torch.tensor(2.0).log().item(), abs=1e-3)

    def test_weights_by_elbos(self):
        mixture = apart()  # the second is far from the data
        mixture.weigh(X, Y)
        assert float(mixture.weights[0]) == pytest.approx(1.0) and float(mixture.weights.sum()) == pytest.approx(
            1.0
        )


def copy_of(guide: SpikeGMMGuide, model: BayesianNetwork) -> SpikeGMMGuide:
    other = SpikeGMMGuide(model, num_components=4, initial_gate=1.0)
    other.load_state_dict(guide.state_dict())
    return other


class TestCoding:
    def test_members_share_codebooks_also_in_training(self):
        mixture = apart()
        latents = torch.cat([m.site_guides()["0.weight"].latent.detach().flatten() for m in mixture.members])
        mixture.start_coding()
        first, second = (member.site_guides()["0.weight"] for member in mixture.members)
        assert first.loc.min() < 1 < 9 < first.loc.max()  # values of both
        assert float((latents[:, None] - first.loc.detach()[0]).abs().amin(1).max()) < 1
        for member in mixture.members:
            svi = SVI(mixture.model, member, pyro.optim.Adam({"lr": 0.01}), SQSELBO())
            svi.step(X, Y)
        assert torch.equal(first.loc, second.loc) and torch.equal(first.scale, second.scale)
        twin = copy.deepcopy(mixture)
        with torch.no_grad():
            twin.members[0].site_guides()["0.weight"].loc_unconstrained.add_(1)
        assert torch.equal(*(member.site_guides()["0.weight"].loc for member in twin.members))

    @pytest.mark.parametrize("coded", [False, True])
    def test_one_file(self, coded, tmp_path):
        mixture = apart(initial_gate=5.0)
        if coded:
            mixture.start_coding()
        packed = pack_ensemble(mixture, 6, seed=0)
        save(packed, tmp_path / "mixture.safetensors")
        loaded = load(tmp_path / "mixture.safetensors", mixture.model.net)
        assert torch.equal(loaded.each(X), packed.each(X)) and packed.each(X).shape == (6, 20, 1)
        drawn = packed.draws()["2.weight"]
        assert sorted(members_of(drawn)) == [0, 0, 0, 1, 1, 1]
        assert len(drawn.unique()) <= 5  # one codebook of four values, and zero

    def test_dense_draws_keep_their_noise_in_codes(self):
        guide = SpikeGMMGuide(model_of(), num_components=4)
        for site in guide.site_guides().values():
            site.latent_scale = torch.full(site.shape, 0.3)
        packed = pack_ensemble(guide, 200, seed=0)
        q = guide.get_posterior()["0.weight"]
        drawn = packed.draws()["0.weight"]
        torch.testing.assert_close(drawn.std(0), q.variance.detach().sqrt(), atol=0.1, rtol=0)
        torch.testing.assert_close(drawn.mean(0), q.mean.detach(), atol=0.12, rtol=0)

    def test_as_many_codes_as_were_asked_for(self):
        guide = SpikeGMMGuide(model_of(), num_components=9)  # more than any site has weights
        drawn = pack_ensemble(guide, 50, seed=0).draws()
        assert {name: len(values[values != 0].unique()) for name, values in drawn.items()} == dict.fromkeys(
            drawn, 9
        )

    def test_averages_take_it(self):
        mixture = apart()
        for average in (
            averaged_network(mixture.model.net, mixture, 4),
            average_of_guide(mixture.model, mixture, 4),
        ):
            assert average.each(X).shape == (4, 20, 1)


def test_states_hold_weights():
    mixture = GuideMixture(list(apart().members), weights=[1, 3])
    other = apart()
    other.load_state_dict(mixture.state_dict())
    assert other.weights.tolist() == [0.25, 0.75]
    assert torch.equal(*(m.members[1].site_guides()["0.weight"].latent for m in (mixture, other)))
    mixture(X)
    store = copy.deepcopy(pyro.get_param_store().get_state())
    pyro.clear_param_store()
    third = apart()
    pyro.get_param_store().set_state(store)
    third(X)
    assert third.weights.tolist() == [0.25, 0.75]


def test_diagnose_looks_at_every_member():
    mixture = apart(3)
    for site in mixture.members[1].site_guides().values():
        site.gate_logit = torch.full(site.shape, -9.0)
    assert {found.kind for found in diagnose(mixture.model, mixture)} >= {"gates_closed"}


class TestArguments:
    def test_starts_are_the_networks_own_and_new_ones(self):
        model = model_of()
        own = {name: value.clone() for name, value in model.site_values().items()}
        mixture = GuideMixture.restarts(model, 3, num_components=4)
        latents = [member.site_guides()["0.weight"].latent.detach() for member in mixture.members]
        assert torch.equal(latents[0], own["0.weight"])
        assert not torch.equal(latents[1], latents[2]) and not torch.equal(latents[0], latents[1])
        assert all(torch.equal(value, own[name]) for name, value in model.site_values().items())

    def test_networks_that_cannot_begin_again(self):
        class Own(nn.Module):
            def __init__(self):
                super().__init__()
                self.weight = nn.Parameter(torch.randn(4, 1))

            def forward(self, x):
                return x @ self.weight.T

        model = BayesianNetwork(Own(), likelihood=known_noise, include="weight")
        with pytest.raises(NetworkError, match=r"'weight' begins.*reset_parameters.*init="):
            GuideMixture.restarts(model, 2)

    def test_what_is_impossible(self):
        one, two = apart().members
        with pytest.raises(ArgumentError, match="positive number for each of the 2"):
            GuideMixture([one, two], weights=[1.0])
        with pytest.raises(ArgumentError, match="positive number for each of the 2"):
            GuideMixture([one, two], weights=[1.0, -1.0])
        with pytest.raises(ArgumentError, match="given nothing"):
            GuideMixture([])
        with pytest.raises(ArgumentError, match="stands twice"):
            GuideMixture([one, one])
        with pytest.raises(NetworkError, match="different models or sites"):
            GuideMixture([one, apart().members[0]])


PLACES = {
    "gap": torch.linspace(-1.6, 1.6, 15).unsqueeze(1),
    "beyond": torch.tensor([-4.6, -4.4, -4.2, -4.0, 4.0, 4.2, 4.4, 4.6]).unsqueeze(1),
    "within": torch.tensor([-3.2, -2.8, -2.4, 2.4, 2.8, 3.2]).unsqueeze(1),
}


def spread(guide, model) -> dict[str, float]:
    """Standard deviation of the function where there are no data, and where there are."""
    found = {}
    for name, places in PLACES.items():
        draws = Predictive(model, guide=guide, num_samples=300, parallel=True, return_sites=("logits",))(places)
        found[name] = float(draws["logits"].squeeze(-1).std(0).mean())
    return found


@pytest.mark.slow
def test_a_mixture_is_less_sure_where_there_are_no_data():
    """Two pieces of a sine, far apart; measured beyond them: 1.1 to 1.7 times as wide, by seed and steps."""
    pyro.set_rng_seed(0)
    x = torch.cat([torch.linspace(-3.5, -2, 40), torch.linspace(2, 3.5, 40)]).unsqueeze(1)
    y = torch.sin(2 * x[:, 0]) + 0.1 * torch.randn(80)
    net = nn.Sequential(nn.Linear(1, 16), nn.Tanh(), nn.Linear(16, 1))
    prior = SpikeAndSlab(torch.tensor(0.9), dist.Normal(0.0, 1.0))
    model = BayesianNetwork(net, prior, lambda out: dist.Normal(out[:, 0], 0.1), num_data=80, include=".*")
    mixture = GuideMixture.restarts(model, 3)
    with pyro.validation_enabled(False):
        for member in mixture.members:
            svi = SVI(model, member, NaturalGradient(member, steps=600), SQSELBO())
            for _ in range(600):
                svi.step(x, y)
        alone = [spread(member, model) for member in mixture.members]
        together = spread(mixture, model)
    ratio = {name: 3 * together[name] / sum(own[name] for own in alone) for name in PLACES}
    # At least 1 but for the noise of draws, by the law of total variance; members agree where there are data.
    assert min(ratio.values()) > 0.95 and ratio["beyond"] > 1.05 and ratio["within"] < 1.15
