"""The guide: stages, estimators, groups, pruning, and what hardening ships."""

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from torch import nn

from sqs_pyro.distributions import SpikeAndSlab
from sqs_pyro.errors import ArgumentError, NetworkError, RecipeError
from sqs_pyro.inference.elbo import SQSELBO
from sqs_pyro.inference.guides.spike_gmm import SpikeGMMGuide
from sqs_pyro.inference.guides.windows import EqualMass, OutlierAware
from sqs_pyro.inference.pruning import PruningSchedule
from sqs_pyro.models import BayesianNetwork
from sqs_pyro.packing import CodedTensor
from sqs_pyro.shipping.pack import pack

K = 4
X, Y = torch.linspace(-1, 1, 48).view(6, 1, 8), torch.tensor([0, 1, 2, 0, 1, 2])


def network() -> nn.Sequential:
    return nn.Sequential(nn.Conv1d(1, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(24, 3))


@pytest.fixture
def model() -> BayesianNetwork:
    return BayesianNetwork(network(), num_data=60)


def repeated(rows: torch.Tensor, count: int) -> BayesianNetwork:
    """A layer of these rows, as often: one draw of it is as many draws of the rows."""
    net = nn.Linear(rows.shape[1], len(rows) * count)
    net.weight.data = rows.repeat(count, 1)
    return BayesianNetwork(net, num_data=60)


def draw(guide: SpikeGMMGuide) -> dict[str, torch.Tensor]:
    return {name: value.detach() for name, value in guide(X).items()}


def loss_and_gradients(guide: SpikeGMMGuide) -> dict[str, torch.Tensor | None]:
    guide.zero_grad()
    SQSELBO().differentiable_loss(guide.model, guide, X, Y).backward()
    return {name: parameter.grad for name, parameter in guide.named_parameters()}


def nearest(values: torch.Tensor, codebook: torch.Tensor) -> torch.Tensor:
    """Distance of each value to zero or the nearest codebook value."""
    levels = torch.cat([codebook.flatten(), torch.zeros(1)])
    return (values.unsqueeze(-1) - levels).abs().amin(-1)


def test_codebooks_weigh_weights_by_their_precision(model):
    guide = SpikeGMMGuide(model, 1)  # with one codeword a layer: the mean
    for site in guide.site_guides().values():
        site.latent_scale = torch.rand(site.shape) + 0.01
        site.mask = torch.rand(site.shape) < 0.7
    guide.start_coding()
    for site in guide.site_guides().values():
        kept, precision = site.latent[site.mask], 1 / site.latent_scale[site.mask] ** 2
        torch.testing.assert_close(site.loc[0, 0], (precision * kept).sum() / precision.sum())


class TestStages:
    def test_dense_draws_are_the_pretrained_weights(self, model):
        guide = SpikeGMMGuide(model, K, stage="dense", estimator="straight_through")
        for name, value in draw(guide).items():
            assert torch.equal(value, model.site_values()[name])

    def test_dense_stage_trains_latents_and_gates(self, model):
        gradients = loss_and_gradients(SpikeGMMGuide(model, K, stage="dense", estimator="straight_through"))
        for name, gradient in gradients.items():
            trained = "latent" in name or "gate_logit" in name
            assert (gradient is not None and bool(gradient.abs().sum() > 0)) == trained

    def test_coded_draws_are_codebook_values(self, model):
        guide = SpikeGMMGuide(model, K, estimator="straight_through")
        for name, value in draw(guide).items():
            site = guide.site_guides()[name]
            assert float(nearest(value, site.loc.detach()).max()) == 0
            assert len(value.unique()) <= K

    @pytest.mark.parametrize("estimator", ["straight_through", "soft", "concrete"])
    def test_coded_stage_trains_everything_that_the_value_depends_on(self, model, estimator):
        """The straight-through value does not depend on σ and π: they stay."""
        gradients = loss_and_gradients(SpikeGMMGuide(model, K, temperature=1.0, estimator=estimator))
        for name, gradient in gradients.items():
            shape = "scale" in name or "mixing_logits" in name
            if shape and estimator == "straight_through":
                assert gradient is None
            else:
                assert gradient.isfinite().all() and gradient.abs().sum() > 0

    def test_start_coding_fits_codebooks_to_the_survivors(self, model):
        guide = SpikeGMMGuide(model, K, stage="dense", estimator="straight_through")
        masks = {n: torch.rand(v.shape) < 0.5 for n, v in model.site_values().items()}
        guide.prune(masks)
        with torch.no_grad():
            for site in guide.site_guides().values():
                site.latent_unconstrained.add_(torch.where(site.mask, 0.3, 1e3))  # pruned ones must not matter
        guide.start_coding()
        assert guide.stage == "coded"
        for site in guide.site_guides().values():
            survivors = site.latent[site.mask]
            assert survivors.min() <= site.loc.min() and site.loc.max() <= survivors.max()
            torch.testing.assert_close(
                (site.loc * site.mixing_logits.exp()).sum(), survivors.mean(), atol=0.1, rtol=0
            )

    def test_frozen_codes_and_gates_stay(self, model):
        guide = SpikeGMMGuide(model, K, estimator="straight_through")
        guide.freeze_codes()
        before = {n: site.codes.clone() for n, site in guide.site_guides().items()}
        gradients = loss_and_gradients(guide)
        assert all(g is None for n, g in gradients.items() if "latent" in n or "gate_logit" in n)
        with torch.no_grad():
            for site in guide.site_guides().values():
                site.loc_unconstrained.copy_(site.loc.flip(1))  # codes anew would be other ones
        draw(guide)
        guide.harden()
        assert all(torch.equal(site.codes, before[n]) for n, site in guide.site_guides().items())

    def test_codes_are_renewed_every_few_draws(self, model):
        guide = SpikeGMMGuide(model, K, refresh_every=3, estimator="straight_through")
        site = guide.site_guides()["0.weight"]
        changes = []
        for i in range(7):
            with torch.no_grad():
                site.latent_unconstrained.copy_(torch.full_like(site.latent, 10.0 * (-1) ** i))
            before = site.codes.clone()
            draw(guide)
            changes.append(not torch.equal(site.codes, before))
        assert [i for i, changed in enumerate(changes) if changed and i > 0] == [3, 6]


class TestEstimators:
    @pytest.mark.parametrize("estimator", ["straight_through", "soft", "concrete"])
    def test_draws_and_gradients(self, model, estimator):
        guide = SpikeGMMGuide(model, K, temperature=0.5, estimator=estimator)
        discrete = all(
            float(nearest(value, guide.site_guides()[name].loc.detach()).max()) == 0
            for name, value in draw(guide).items()
        )
        assert discrete == (estimator == "straight_through")

    def test_soft_draw_is_the_mean(self, model):
        guide = SpikeGMMGuide(model, K, temperature=2.0, estimator="soft")
        for name, value in draw(guide).items():
            torch.testing.assert_close(value, guide.distribution(guide.site_guides()[name]).mean.detach())

    @pytest.mark.parametrize("estimator", ["straight_through", "soft"])
    def test_cold_and_open_all_are_the_hard_network(self, model, estimator):
        guide = SpikeGMMGuide(model, K, temperature=1e-5, estimator=estimator, initial_gate=100.0)
        hard = guide.harden(torch.float32)
        for name, value in draw(guide).items():
            torch.testing.assert_close(value, hard[name].dense())


class TestEvaluationMode:
    def test_draws_are_discrete_whatever_the_estimator(self, model):
        for estimator in ("straight_through", "soft", "concrete"):
            guide = SpikeGMMGuide(model, K, temperature=1.0, estimator=estimator, initial_gate=0.5).eval()
            for name, value in draw(guide).items():
                assert float(nearest(value, guide.site_guides()[name].loc.detach()).max()) == 0
                assert (value == 0).any()

    def test_gates_and_codes_have_the_posteriors_probabilities(self, model):
        guide = SpikeGMMGuide(
            model, K, temperature=0.1, evaluation_temperature=3.0, initial_gate=0.4, estimator="straight_through"
        ).eval()
        site = guide.site_guides()["0.weight"]
        draws = guide.distribution(site).sample((4000,))
        gate = torch.sigmoid(torch.tensor(0.4 / 3.0))  # one temperature for gates and codes
        density = dist.Normal(site.loc[0], site.scale[0]).log_prob(site.latent.unsqueeze(-1))
        phi = ((density + site.mixing_logits[0].log_softmax(0)) / 3.0).softmax(-1)  # evaluation temperature
        for k in range(K):
            rate = (draws == site.loc[0, k]).float().mean(0)
            torch.testing.assert_close(rate, (gate * phi[..., k]).detach(), atol=0.04, rtol=0)  # > 5 sigma

    def test_evaluation_temperature_spreads_the_draws(self, model):
        def spread(temperature):
            guide = SpikeGMMGuide(
                model, K, temperature=0.05, initial_gate=30.0, estimator="straight_through"
            ).eval()
            guide.evaluation_temperature = temperature
            return float(torch.stack([draw(guide)["3.weight"] for _ in range(50)]).std(0).mean())

        assert spread(5.0) > spread(1.0) > spread(None)

    def test_a_drawn_network_is_distributed_as_pyros_draws(self):
        guide = SpikeGMMGuide(
            repeated(torch.randn(1, 12), 800),
            K,
            evaluation_temperature=2.0,
            initial_gate=0.4,
            estimator="straight_through",
        ).eval()
        mask = torch.rand(12) < 0.5
        guide.prune({"weight": mask.expand(800, 12)})
        coded, again = (guide.draw(codebook_dtype=torch.float32)["weight"].dense() for _ in range(2))  # [800, 12]
        values = guide()["weight"].detach()
        for value in (0.0, *guide.site_guides()["weight"].loc[0].tolist()):
            rates = [(draws == value).float().mean(0) for draws in (coded, values)]
            torch.testing.assert_close(*rates, atol=0.125, rtol=0)  # 5 sigma of 800 draws
        assert not coded[:, ~mask].any() and not torch.equal(coded, again)

    def test_gates_can_have_a_temperature_of_their_own(self, model):
        guide = SpikeGMMGuide(model, K, temperature=0.1, gate_temperature=2.0, estimator="straight_through")
        assert guide.evaluation_temperatures() == (0.1, 2.0)  # as in training
        assert guide.evaluation_temperatures(3.0) == (3.0, 6.0)
        assert guide.evaluation_temperatures(gate_temperature=0.5) == (0.1, 0.5)
        guide.evaluation_temperature, guide.evaluation_gate_temperature = 1.5, 0.25
        assert guide.evaluation_temperatures() == (1.5, 0.25)
        with pytest.raises(RecipeError, match="gate_temperature is -1, but must be positive"):
            guide.evaluation_temperatures(1.0, -1)

    def test_cold_draws_and_the_cold_mean_are_the_hard_network(self, model):
        guide = SpikeGMMGuide(model, K, initial_gate=0.7, estimator="straight_through")
        hard = {name: tensor.dense() for name, tensor in guide.harden(torch.float32).items()}
        cold = {name: tensor.dense() for name, tensor in guide.draw(1e-4, codebook_dtype=torch.float32).items()}
        for name, mean in guide.mean(1e-4).items():
            assert torch.equal(cold[name], hard[name])
            torch.testing.assert_close(mean, hard[name])

    def test_the_mean_is_that_of_many_draws(self):
        rows = repeated(torch.rand(4, 3) - 0.5, 800)
        guide = SpikeGMMGuide(rows, 3, initial_gate=0.5, groups="channel", estimator="straight_through")
        draws = guide.draw(1.5, 3.0, torch.float32)["weight"].dense().view(800, 4, 3)
        mean = guide.mean(1.5, 3.0)["weight"].view(800, 4, 3)
        torch.testing.assert_close(mean, mean[:1].expand_as(mean))
        error = draws.std(0) / 800**0.5
        assert bool(((draws.mean(0) - mean[0]).abs() < 5 * error).all()) and float(error.max()) < 0.02

    def test_drawing_does_not_advance_training(self, model):
        guide = SpikeGMMGuide(model, K, refresh_every=2, estimator="straight_through").eval()
        draw(guide)
        assert guide.draws == 0


class TestGroups:
    @pytest.mark.parametrize(("groups", "counts"), [("layer", [1, 1]), ("channel", [4, 3]), (6, [2, 12])])
    def test_codebooks_belong_to_groups_in_row_major_order(self, groups, counts):
        model = BayesianNetwork(network(), num_data=60)
        guide = SpikeGMMGuide(model, 2, groups=groups, estimator="straight_through")
        coded = guide.harden(torch.float32)
        for (name, site), count in zip(guide.site_guides().items(), counts, strict=True):
            assert site.loc.shape == site.scale.shape == (count, 2)
            value = model.site_values()[name]
            for g, row in enumerate(value.reshape(count, -1)):
                codes = coded[name].codes.reshape(count, -1)[g]
                for k in codes.unique().tolist():  # K-means: a codeword is the mean of the weights that use it
                    torch.testing.assert_close(row[codes == k].mean(), site.loc[g, k].detach(), atol=0.06, rtol=0)
            torch.testing.assert_close(draw(guide)[name], coded[name].dense())

    @pytest.mark.parametrize("groups", [5, 0, -1, "row"])
    def test_groups_that_do_not_fit(self, model, groups):
        with pytest.raises(RecipeError, match=r"groups=.* does not fit layer '0.weight' of 12 weights"):
            SpikeGMMGuide(model, 2, groups=groups, estimator="straight_through")

    def test_fewer_weights_than_components(self, model):
        with pytest.raises(
            NetworkError, match=r"'0.weight' has 12 weights a codebook, fewer than num_components=13"
        ):
            SpikeGMMGuide(model, 13, estimator="straight_through")
        with pytest.raises(
            NetworkError, match=r"'0.weight' has 3 weights a codebook, fewer than num_components=4"
        ):
            SpikeGMMGuide(model, 4, groups="channel", estimator="straight_through")


class TestCodedStart:
    """A guide that starts from codes which were found otherwise."""

    def coded(self, model, groups=1):
        coded = {}
        for name, weight in model.site_values().items():
            mask = torch.rand(weight.shape) < 0.6
            codes = torch.randint(0, 3, weight.shape, dtype=torch.uint8).masked_fill(~mask, 0)
            coded[name] = CodedTensor(codes, mask, torch.randn(groups, 3))
        return coded

    def test_hardens_to_what_it_started_from(self, model):
        coded = self.coded(model)
        guide = SpikeGMMGuide(model, 16, coded=coded, stage="frozen", estimator="straight_through")
        for name, hard in guide.harden(torch.float32).items():
            assert torch.equal(hard.dense(), coded[name].dense())
        value = draw(guide)
        assert all(torch.equal(value[name].detach(), coded[name].dense()) for name in coded)

    def test_zeros_move_where_zero_is_a_codeword(self, model):
        coded = self.coded(model)
        start = {name: value.dense() for name, value in coded.items()}
        guide = SpikeGMMGuide(model, init=start, coded=coded, zero="codeword", estimator="straight_through")
        for name, hard in guide.harden(torch.float32).items():
            assert torch.equal(hard.dense(), start[name])
            assert hard.num_components == coded[name].num_components
        name, site = next(iter(guide.site_guides().items()))
        value = coded[name].codebook[0, 1]
        with torch.no_grad():
            latent = site.latent.clone()
            zero = (start[name] == 0).nonzero()[0]
            other = (start[name] == value).nonzero()[0]
            latent[*zero], latent[*other] = value, 0.0
            site.latent = latent
        moved = guide.harden(torch.float32)[name].dense()
        assert moved[*zero] == value and moved[*other] == 0
        assert int((moved != start[name]).sum()) == 2

    def test_shares_and_widths_are_those_of_the_weights(self, model):
        coded = self.coded(model)
        guide = SpikeGMMGuide(model, coded=coded, estimator="straight_through")
        for name, site in guide.site_guides().items():
            weight, start = model.site_values()[name], coded[name]
            assert site.num_components == 3
            counts = torch.bincount(start.codes[start.mask].long(), minlength=3) + 0.5
            torch.testing.assert_close(site.mixing_logits.detach().exp()[0], counts / counts.sum())
            error = (weight - start.dense())[start.mask].square().mean().sqrt()
            torch.testing.assert_close(site.scale.detach(), error.expand(1, 3))

    def test_other_sites_keep_k_means(self, model):
        name, other = list(model.site_values())
        guide = SpikeGMMGuide(model, 4, coded={name: self.coded(model)[name]}, estimator="straight_through")
        assert guide.site_guides()[other].num_components == 4
        assert guide.site_guides()[name].num_components == 3

    def test_says_what_does_not_fit(self, model):
        coded = self.coded(model)
        first, second = coded
        with pytest.raises(NetworkError, match="no site 'nowhere'"):
            SpikeGMMGuide(model, coded={"nowhere": coded[first]}, estimator="straight_through")
        with pytest.raises(NetworkError, match=f"The coded weight of '{second}' has shape"):
            SpikeGMMGuide(model, 3, coded={second: coded[first]}, estimator="straight_through")
        with pytest.raises(ArgumentError, match=r"zero is 0.05 beside coded, whose zeros no threshold has made"):
            SpikeGMMGuide(model, 2, coded={second: coded[second]}, zero=0.05, estimator="straight_through")


class TestWindows:
    @pytest.mark.parametrize("windows", [EqualMass(6), OutlierAware(6, 2)])
    def test_weights_of_a_window_share_responsibilities(self, model, windows):
        guide = SpikeGMMGuide(model, K, windows, temperature=1.0, estimator="straight_through")
        site = guide.site_guides()["3.weight"]
        window = torch.bucketize(site.latent.detach(), site.edges)
        phi = guide.distribution(site).responsibilities.detach()
        for w in window.unique():
            rows = phi[window == w]
            torch.testing.assert_close(rows, rows[:1].expand_as(rows))

    def test_gradient_reaches_latents_through_the_value_alone(self, model):
        guide = SpikeGMMGuide(model, K, EqualMass(6), temperature=1.0, estimator="straight_through")
        gradients = loss_and_gradients(guide)
        assert all(gradient.isfinite().all() for gradient in gradients.values() if gradient is not None)
        assert gradients["sites.3/weight.latent_unconstrained"].abs().sum() > 0

    def test_state_round_trip_with_another_number_of_edges(self):
        net = network()
        one = SpikeGMMGuide(BayesianNetwork(net), K, EqualMass(6), estimator="straight_through")
        two = SpikeGMMGuide(BayesianNetwork(net), K, EqualMass(3), estimator="straight_through")
        two.load_state_dict(one.state_dict())
        assert torch.equal(two.site_guides()["3.weight"].edges, one.site_guides()["3.weight"].edges)


class TestPruningAndHardening:
    @pytest.mark.parametrize("target", [0.01, 0.123, 0.5, 1.0])
    @pytest.mark.parametrize("saliency", ["gate", "magnitude"])
    @pytest.mark.parametrize("scope", ["global", "layer"])
    def test_nonzero_count_is_the_target_to_the_weight(self, model, target, saliency, scope):
        guide = SpikeGMMGuide(model, K, stage="dense", estimator="straight_through")
        guide.prune(PruningSchedule(target, 10, scope=scope).masks(guide.saliencies(saliency), 10))
        guide.start_coding()
        guide.freeze_codes()
        coded = guide.harden()
        sizes = [tensor.codes.numel() for tensor in coded.values()]
        expected = sum(round(target * n) for n in sizes) if scope == "layer" else round(target * sum(sizes))
        assert sum(tensor.nonzeros for tensor in coded.values()) == expected
        assert guide.nonzero_rate() == expected / sum(sizes)

    def test_masks_follow_the_saliency(self, model):
        guide = SpikeGMMGuide(model, K, estimator="straight_through")
        weights = torch.cat([v.abs().flatten() for v in model.site_values().values()])
        guide.prune(PruningSchedule(0.25, 10).masks(guide.saliencies("magnitude"), 10))
        kept = torch.cat([site.mask.flatten() for site in guide.site_guides().values()])
        assert torch.equal(kept, weights >= weights.sort(descending=True).values[int(kept.sum()) - 1])

    def test_saliencies(self, model):
        guide = SpikeGMMGuide(model, K, gate_temperature=2.0, initial_gate=1.0, estimator="straight_through")
        gate = float(torch.sigmoid(torch.tensor(0.5)))
        for name, value in model.site_values().items():
            torch.testing.assert_close(guide.saliencies("gate")[name], torch.full_like(value, gate))
            torch.testing.assert_close(guide.saliencies()[name], gate * value.abs())
        with pytest.raises(
            RecipeError, match="Saliency 'taylor' is unknown: use 'gate', 'magnitude' or 'activation'"
        ):
            guide.saliencies("taylor")

    def test_pruned_weights_are_exactly_zero_everywhere(self, model):
        guide = SpikeGMMGuide(model, K, initial_gate=3.0, estimator="straight_through")
        masks = {n: torch.rand(v.shape) < 0.4 for n, v in model.site_values().items()}
        guide.prune(masks)
        for mode in (True, False):
            guide.train(mode)
            for name, value in draw(guide).items():
                assert (value[~masks[name]] == 0).all()
        for name, coded in guide.harden().items():
            assert torch.equal(coded.mask, masks[name])
            assert (coded.dense()[~masks[name]] == 0).all() and (coded.codes[~masks[name]] == 0).all()

    @pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.bfloat16])
    def test_hardened_weights_are_the_frozen_draw_rounded(self, model, dtype):
        guide = SpikeGMMGuide(model, K, estimator="straight_through")
        guide.prune({n: torch.rand(v.shape) < 0.6 for n, v in model.site_values().items()})
        guide.freeze_codes()
        coded = guide.harden(dtype)
        for name, value in draw(guide).items():
            assert torch.equal(coded[name].dense(), value.to(dtype).float())
            assert coded[name].codebook_dtype == (
                "float16" if dtype == torch.float16 else coded[name].codebook_dtype
            )

    def test_hardening_follows_the_latents_but_leaves_cached_codes(self, model):
        guide = SpikeGMMGuide(model, K, refresh_every=100, estimator="straight_through")
        site = guide.site_guides()["0.weight"]
        with torch.no_grad():
            site.latent_unconstrained.copy_(site.latent.flip(0))
        cached, coded = site.codes.clone(), guide.harden(torch.float32)["0.weight"]
        levels = site.loc[0]
        assert not torch.equal(coded.codes.flatten(), cached.flatten())
        assert torch.equal(coded.codes.long(), guide.distribution(site).responsibilities.argmax(-1))
        assert float(nearest(coded.dense(), levels).detach().max()) == 0
        assert torch.equal(site.codes, cached)

    @pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
    def test_hardened_weights_are_no_views_of_the_guide(self, model, dtype):
        guide = SpikeGMMGuide(model, K, estimator="straight_through")
        coded = guide.harden(dtype)
        before = {name: tensor.dense().clone() for name, tensor in coded.items()}
        assert not any(tensor.codebook.requires_grad for tensor in coded.values())
        with torch.no_grad():
            for site in guide.site_guides().values():
                site.loc_unconstrained.add_(1.0)
                site.mask.fill_(False)
                site.codes.fill_(0)
        assert all(torch.equal(tensor.dense(), before[name]) for name, tensor in coded.items())

    @pytest.mark.parametrize("factor", [1e6, 1e-9])
    def test_codewords_that_float16_cannot_hold_stay_float32(self, factor):
        net = nn.Sequential(nn.Linear(8, 8))
        with torch.no_grad():
            net[0].weight.mul_(factor)
        guide = SpikeGMMGuide(BayesianNetwork(net), 2, estimator="straight_through")
        coded = guide.harden()["0.weight"]
        assert coded.codebook_dtype == "float32"
        assert torch.equal(coded.codebook, guide.site_guides()["0.weight"].loc.detach())

    def test_a_codebook_that_is_not_finite_says_whose_it_is(self):
        guide = SpikeGMMGuide(BayesianNetwork(nn.Sequential(nn.Linear(8, 8))), 2, estimator="straight_through")
        with torch.no_grad():
            guide.site_guides()["0.weight"].loc_unconstrained[0, 0] = float("inf")
        with pytest.raises(NetworkError, match=r"codebook of '0.weight' holds NaN .* training has diverged"):
            guide.harden()

    def test_open_gates_count(self, model):
        guide = SpikeGMMGuide(model, K, estimator="straight_through")
        with torch.no_grad():
            guide.site_guides()["0.weight"].gate_logit_unconstrained.copy_(-torch.ones(4, 1, 3))
        assert guide.nonzero_rate() == pytest.approx(72 / 84)
        assert guide.harden()["0.weight"].nonzeros == 0

    def test_dense_stage_cannot_be_hardened(self, model):
        guide = SpikeGMMGuide(model, K, stage="dense", estimator="straight_through")
        for asked in (guide.harden, guide.draw, lambda: pack(guide)):
            with pytest.raises(
                NetworkError, match=r"without codes: call start_coding\(\) before pack\(\), harden"
            ):
                asked()

    def test_everything_pruned_in_one_layer(self, model):
        guide = SpikeGMMGuide(model, K, stage="dense", estimator="straight_through")
        guide.prune({"0.weight": torch.zeros(4, 1, 3, dtype=torch.bool)})
        guide.start_coding()
        assert guide.harden()["0.weight"].nonzeros == 0
        assert all(value.isfinite().all() for value in draw(guide).values())


class TestPyro:
    def test_trace_has_one_joint_event_a_site(self, model):
        trace = poutine.trace(SpikeGMMGuide(model, K, estimator="straight_through")).get_trace(X)
        for name, value in model.site_values().items():
            node = trace.nodes[name]
            assert node["fn"].event_shape == value.shape and node["fn"].batch_shape == ()
        trace.compute_log_prob()
        assert all(trace.nodes[name]["log_prob"].shape == () for name in model.site_values())

    def test_model_is_not_part_of_the_guide(self, model):
        guide = SpikeGMMGuide(model, K, estimator="straight_through")
        assert not {id(p) for p in model.parameters()} & {id(p) for p in guide.parameters()}
        assert guide.model is model

    def test_positive_scale_stays_positive(self, model):
        guide = SpikeGMMGuide(model, K, estimator="straight_through")
        with torch.no_grad():
            for site in guide.site_guides().values():
                site.scale_unconstrained.sub_(50.0)
                assert (site.scale > 0).all()

    def test_state_dict_round_trip(self):
        net = network()
        one, two = (SpikeGMMGuide(BayesianNetwork(net), K, estimator="straight_through") for _ in range(2))
        with torch.no_grad():
            for parameter in one.parameters():
                parameter.add_(torch.randn_like(parameter))
        one.prune({n: torch.rand(v.shape) < 0.5 for n, v in one.model.site_values().items()})
        two.load_state_dict(one.state_dict())
        a, b = one.harden(), two.harden()
        assert all(torch.equal(a[n].dense(), b[n].dense()) for n in a)

    def test_any_model_with_init(self):
        def model(x, y=None):
            w = pyro.sample("w", SpikeAndSlab(0.5, dist.Normal(0.0, 1.0)).expand((8,)).to_event(1))
            with pyro.plate("data", len(x)):
                return pyro.sample("y", dist.Normal(x @ w, 0.1), obs=y)

        start = torch.randn(8)
        guide = SpikeGMMGuide(model, 3, init={"w": start}, estimator="straight_through")
        x = torch.randn(20, 8)
        loss = SQSELBO().differentiable_loss(model, guide, x, x @ start)
        loss.backward()
        assert all((p.grad is not None) == p.requires_grad for p in guide.parameters())
        with pytest.raises(NetworkError, match=r"function does not tell its pretrained weights: give init="):
            SpikeGMMGuide(model, 3, estimator="straight_through")


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ({"num_components": 0}, "num_components is 0, but must be 1 to 256"),
        ({"num_components": 257}, "num_components is 257"),
        ({"temperature": 0.0}, "temperature is 0.0, but must be positive"),
        ({"temperature": -1.0}, "temperature is -1.0"),
        ({"evaluation_temperature": 0.0}, "evaluation_temperature is 0.0, but must be positive"),
        ({"gate_temperature": -2.0}, "gate_temperature is -2.0"),
        ({"estimator": "reinforce"}, "estimator 'reinforce' is unknown: use one of local, pathwise, one_hot, str"),
        ({"windows": "equal_mass"}, r"windows is 'equal_mass', but must be a strategy such as PerWeight\(\)"),
        ({"refresh_every": 0}, "refresh_every is 0, but must be at least 1"),
        ({"initial_gate": float("nan")}, "initial_gate is nan, but must be a finite number"),
        ({"initial_gate": "open"}, "initial_gate is 'open', but must be a finite number"),
        ({"stage": "warm"}, "stage 'warm' is unknown: use 'dense', 'coded' or 'frozen'"),
    ],
)
def test_impossible_arguments(model, arguments, sentence):
    with pytest.raises(RecipeError, match=sentence):
        SpikeGMMGuide(model, **{"num_components": K, **arguments})


@pytest.mark.parametrize(
    ("masks", "error", "sentence"),
    [
        (
            {"0.weight": torch.ones(3, dtype=torch.bool)},
            NetworkError,
            r"The mask of '0\.weight' has shape \[3\], but",
        ),
        ({"other": torch.ones(3)}, NetworkError, "There is no 'other' to take the mask given for it"),
        ({"0.weight": torch.full((6, 5), 0.5)}, RecipeError, "holds other values than 0 and 1: compare it"),
    ],
)
def test_masks_are_those_of_the_sites(model, masks, error, sentence):
    guide = SpikeGMMGuide(model, num_components=3, estimator="straight_through")
    shape = guide.site_guides()["0.weight"].shape
    masks = {name: mask.new_full(shape, 0.5) if mask.is_floating_point() else mask for name, mask in masks.items()}
    with pytest.raises(error, match=sentence):
        guide.prune(masks)
    assert guide.nonzero_rate() == 1.0


def test_zeros_and_ones_are_masks(model):
    guide = SpikeGMMGuide(model, num_components=3, estimator="straight_through")
    guide.prune({name: torch.zeros(site.shape) for name, site in guide.site_guides().items()})
    assert guide.nonzero_rate() == 0.0


def test_starting_values_are_not_stretched(model):
    with pytest.raises(NetworkError, match=r"The init of '0\.weight' has shape \[1, 5\], but the weights have"):
        SpikeGMMGuide(model, num_components=3, init={"0.weight": torch.randn(1, 5)}, estimator="straight_through")


@pytest.mark.parametrize(("name", "value"), [("stage", "froze"), ("temperature", 0.0), ("gate_temperature", -1.0)])
def test_attributes_are_checked_before_they_count(model, name, value):
    guide = SpikeGMMGuide(model, num_components=3, estimator="straight_through")
    with pytest.raises(RecipeError, match=name):
        setattr(guide, name, value)
        guide()
