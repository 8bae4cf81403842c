"""Every diagnostic is provoked by training a small network into the trouble, and silent on its healthy twin."""

import copy
from functools import cache

import pyro
import pytest
import torch
from pyro.infer import SVI
from torch import nn

from sqs_pyro import SQSELBO, BayesianNetwork, SpikeGMMGuide, compress, diagnose
from sqs_pyro.compression.finetune.recipe import CompressionRecipe
from sqs_pyro.data import ArrayLoader
from sqs_pyro.errors import DivergenceError, RecipeError
from sqs_pyro.inference.diagnostics import inert_averaging, uncompressed
from sqs_pyro.inference.disagreement import expected_disagreement, temperature_for_disagreement
from sqs_pyro.inference.findings import THRESHOLDS
from sqs_pyro.inference.guides.windows import EqualMass
from sqs_pyro.models import Gaussian, LearnedSlab
from sqs_pyro.models.priors import scale_matched_prior
from sqs_pyro.networks.coverage import coverage

X, Y = torch.randn(96, 8, generator=torch.Generator().manual_seed(0)), torch.arange(96) % 3
X[:, :3] += 2.0 * torch.nn.functional.one_hot(Y, 3)
SITES = ["0.weight", "2.weight"]


@cache
def trained() -> nn.Sequential:
    """A classifier that knows its classes; to be copied."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 3))
    optimizer = torch.optim.Adam(net.parameters(), 0.02)
    for _ in range(60):
        optimizer.zero_grad()
        nn.functional.cross_entropy(net(X), Y).backward()
        optimizer.step()
    return net


def posterior(
    inclusion: float = 0.5, slab_scale: float | None = None, quantized: bool = False, **options
) -> SpikeGMMGuide:
    """A trained classifier's guide, before compression; its weights at four values if asked for."""
    net = copy.deepcopy(trained())
    for weight in (net[0].weight, net[2].weight) if quantized else ():
        middle = weight.data.abs().median()
        weight.data = weight.data.sign() * torch.where(weight.data.abs() > middle, 1.5 * middle, 0.5 * middle)
    model = BayesianNetwork(net, scale_matched_prior(inclusion, slab_scale=slab_scale), num_data=len(X))
    return SpikeGMMGuide(
        model,
        options.pop("num_components", 4),
        **{"initial_gate": 3.0, "estimator": "straight_through", **options},
    )


WIDE = {
    "normal": scale_matched_prior(0.5, slab_scale=1.0),
    "laplace": scale_matched_prior(0.5, slab="laplace", slab_scale=1.0),
    "no spike": pyro.distributions.Normal(0.0, 1.0),
    "learned": LearnedSlab(),
}


@pytest.mark.parametrize(
    "prior", [scale_matched_prior(0.5), scale_matched_prior(0.5, slab="laplace"), *WIDE.values()]
)
def test_a_prior_as_wide_as_weights_that_know_nothing(prior):
    net = nn.Linear(2, 1, bias=False)
    net.weight.data = torch.tensor([[0.02, -0.06]])  # a network that begins, beside a truth of 1.5
    x = torch.randn(40, 2, generator=torch.Generator().manual_seed(1))

    model = BayesianNetwork(net, prior, Gaussian(0.3), num_data=40)
    guide = SpikeGMMGuide(model)
    svi = SVI(model, guide, pyro.optim.Adam({"lr": 0.1}), loss=SQSELBO())
    for _ in range(30):
        svi.step(x, 1.5 * x[:, :1])
    kinds = found(guide)
    if prior in WIDE.values():
        assert "narrow_prior" not in kinds
    else:
        assert kinds["narrow_prior"] == ["weight"]


def train(guide: SpikeGMMGuide, kl_weight: float, steps: int = 40, lr: float = 0.1) -> SpikeGMMGuide:
    svi = SVI(guide.model, guide, pyro.optim.Adam({"lr": lr}), loss=SQSELBO(kl_weight=kl_weight))
    for _ in range(steps):
        svi.step(X, Y)
    return guide


def found(guide: SpikeGMMGuide, **options) -> dict[str, list]:
    """Sites by kind of finding; each finding is checked for what every finding must say."""
    kinds: dict[str, list] = {}
    for finding in diagnose(guide.model, guide, **options):
        assert finding.measured < finding.threshold == THRESHOLDS[finding.kind]
        assert finding.sentence.endswith(".") and "\n" not in finding.sentence
        assert finding.site is None or f"'{finding.site}'" in finding.sentence
        kinds.setdefault(finding.kind, []).append(finding.site)
    return kinds


def prune_to(guide: SpikeGMMGuide, rate: float) -> None:
    for name, saliency in guide.saliencies().items():
        guide.prune({name: saliency > saliency.flatten().quantile(1 - rate)})


def test_a_healthy_posterior_gives_no_finding():
    guide = train(posterior(temperature=1.0), kl_weight=0.01, lr=0.01)
    assert found(guide) == {}
    prune_to(guide, 0.5)
    guide.start_coding()
    assert found(train(guide, kl_weight=0.01, lr=0.01)) == {}
    guide.freeze_codes()
    assert found(guide) == {}


class TestGates:
    def test_a_heavy_kl_closes_all(self):
        guide = train(posterior(inclusion=0.01), kl_weight=1e4, steps=20, lr=0.4)
        assert found(guide)["gates_closed"] == SITES
        assert "starving_layer" not in found(guide)  # said once
        assert all(bool((site.gates() < 0.5).all()) for site in guide.site_guides().values())

    def test_a_heavy_kl_opens_all(self):
        guide = train(posterior(inclusion=1 - 1e-5), kl_weight=1e4, steps=40, lr=0.5)
        assert found(guide, averaging=False)["gates_open"] == SITES

    def test_where_there_is_no_spike_gates_are_open_for_good(self):
        guide = posterior(initial_gate=20.0)
        assert found(guide, averaging=False) == {"gates_open": SITES}
        gaussian = BayesianNetwork(guide.model.net, pyro.distributions.Normal(0.0, 1.0), num_data=96)
        assert diagnose(gaussian, guide, averaging=False) == []

    def test_a_pruning_schedule_decides_instead(self):
        guide = posterior(initial_gate=20.0)
        prune_to(guide, 0.5)
        assert found(guide, averaging=False) == {}

    @pytest.mark.parametrize("rate, starving", [(0.05, ["0.weight"]), (0.3, [])])
    def test_starving_layer(self, rate, starving):
        guide = posterior(stage="dense")
        prune_to(guide, rate)
        assert found(guide).get("starving_layer", []) == starving

    def test_a_layer_pruned_away(self):
        guide = posterior()
        guide.prune({"2.weight": torch.zeros(3, 16, dtype=torch.bool)})
        assert found(guide, averaging=False) == {"starving_layer": ["2.weight"]}


class TestCodebooks:
    def test_means_merge_under_a_heavy_kl(self):
        guide = posterior(slab_scale=0.01, groups="channel", num_components=3)
        assert "merged_components" not in found(guide)
        assert "merged_components" in found(train(guide, kl_weight=1e3, steps=20, lr=0.08))

    def test_means_drift_to_zero_under_a_heavy_kl(self):
        guide = posterior(slab_scale=0.01, num_components=2)
        prune_to(guide, 0.5)
        guide.start_coding()
        assert "vanishing_component" not in found(guide)
        assert found(train(guide, kl_weight=1e3, steps=20, lr=0.08))["vanishing_component"] == SITES

    def test_a_mean_near_zero_is_welcome_where_nothing_is_pruned(self):
        assert "vanishing_component" not in found(posterior(num_components=9))

    @pytest.mark.parametrize("windows, unused", [(EqualMass(2), SITES), (EqualMass(64), [])])
    def test_coarse_windows_leave_components_unused(self, windows, unused):
        guide = train(posterior(num_components=8, windows=windows), kl_weight=0.01, steps=10, lr=0.01)
        assert found(guide).get("unused_components", []) == unused

    @pytest.mark.parametrize("quantized", [True, False])
    def test_a_network_that_is_quantized_already_has_no_widths(self, quantized):
        """The KL's gradient explodes as soon as a latent is half way from one value to the next."""
        guide = posterior(quantized=quantized, temperature=0.05)
        narrow = found(guide).get("narrow_component", [])
        for site in guide.site_guides().values():
            site.latent = (site.loc[0, :2].mean()).expand(site.shape).clone()
        SQSELBO().terms(guide.model, guide, X, Y).kl.backward()
        steepest = max(float(s.latent_unconstrained.grad.abs().max()) for s in guide.site_guides().values())
        assert narrow == (SITES if quantized else [])
        assert steepest > 1e6 if quantized else steepest < 1e3


class TestAveraging:
    def test_cold_draws_are_inert_and_the_sentence_has_the_temperature(self):
        guide = train(posterior(temperature=0.01, initial_gate=6.5), kl_weight=0.01, steps=10, lr=0.001)
        (finding,) = inert_averaging(guide, disagreement=0.25)
        assert finding.site is None
        temperature = temperature_for_disagreement(guide, 0.25)
        assert f"temperature of {temperature:.2g} makes 25% differ" in finding.sentence
        assert found(guide) == {"inert_averaging": [None]}
        assert found(guide, averaging=False) == {}
        guide.evaluation_temperature = temperature
        assert found(guide) == {}

    @pytest.mark.parametrize("temperature", [None, 5.0])
    def test_expected_disagreement_is_that_of_draws(self, temperature):
        guide = posterior(temperature=0.5, initial_gate=1.0)
        prune_to(guide, 0.7)
        guide.start_coding()
        hard, masks = guide.harden(torch.float32), {n: s.mask for n, s in guide.site_guides().items()}
        expected = expected_disagreement(guide, temperature)
        guide.evaluation_temperature = temperature
        with pyro.plate("draws", 4000):  # [4000, 1, 1, ...]
            drawn = {n: value.view(4000, *value.shape[-2:]) for n, value in guide.eval()().items()}
        different = [drawn[n][:, m] != hard[n].dense()[m] for n, m in masks.items()]
        differing = torch.cat(different, 1).double().mean(1)
        error = float(differing.std()) / 4000**0.5
        assert error < 0.002
        assert abs(float(differing.mean()) - expected) < 4.5 * error

    def test_where_there_is_nothing_to_draw(self):
        guide = posterior(num_components=1, initial_gate=20.0)
        assert temperature_for_disagreement(guide, 0.1, gate_temperature=1.0) is None
        (finding,) = inert_averaging(guide, gate_temperature=1.0)
        assert "no evaluation temperature changes that" in finding.sentence
        with pytest.raises(RecipeError, match=r"disagreement is 1\.5, but must be above 0 and below 1"):
            temperature_for_disagreement(guide, 1.5)


class TestInCompression:
    def compress(self, **recipe):
        net = nn.Sequential(nn.Flatten(), nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 3))
        loader = ArrayLoader(X.view(-1, 1, 2, 4), Y, 16)
        return compress(net, loader, {"epochs": 3, "num_components": 4, **recipe})

    def test_result_says_what_is_wrong(self):
        findings = self.compress(nonzero_rate=0.03).findings
        assert {finding.kind for finding in findings} >= {"starving_layer"}

    def test_result_of_a_healthy_compression(self):
        assert self.compress(nonzero_rate=0.4).findings == []

    def test_a_divergence_tells_what_was_found_before(self):
        late = {"pruning": {"start": 0.9, "end": 0.95}, "coding_start": 0.96, "freeze_start": 0.98}
        sentence = r"lower learning_rate \(.*\) or kl_weight .* Before that: Posterior collapse in '1.weight'"
        with pytest.raises(DivergenceError, match=sentence):
            self.compress(initial_gate=20.0, gate_learning_rate=1e-9, learning_rate=10.0, epochs=30, **late)

    @pytest.mark.parametrize(
        "recipe",
        [
            {"nonzero_rate": 1.0, "initial_gate": 20.0},
            {"target_ratio": 1.2, "prior": {"kind": "learned"}, "initial_gate": 20.0},
            {"allocation": "rate_distortion", "prior": {"kind": "learned"}, "target_ratio": 1.1},
            {"allocation": "rate_distortion", "prior": {"kind": "learned"}, "kl_weight": 1e-3},
        ],
        ids=["schedule", "target", "rate_distortion", "beta"],
    )
    def test_what_an_allocation_does_on_purpose_is_no_finding(self, recipe):
        kinds = {finding.kind for finding in self.compress(**recipe).findings}
        assert not kinds & {"gates_open", "gates_closed"}
        assert "unused_components" not in kinds or "allocation" not in recipe

    @pytest.mark.parametrize(
        "recipe, repair, without",
        [
            ({"nonzero_rate": 0.03}, "raise nonzero_rate", "target_ratio"),
            ({"target_ratio": 1.6, "num_components": 2}, "lower target_ratio", "nonzero_rate"),
            (
                {"allocation": "rate_distortion", "prior": {"kind": "learned"}, "kl_weight": 10.0},
                "lower kl_weight",
                "nonzero_rate",
            ),
        ],
        ids=["schedule", "target", "beta"],
    )
    def test_repairs_name_keys_that_have_an_effect(self, recipe, repair, without):
        guide = posterior(stage="dense")
        prune_to(guide, 0.05)
        recipe = CompressionRecipe(**recipe)
        (finding,) = diagnose(guide.model, guide, averaging=False, recipe=recipe)
        assert finding.kind == "starving_layer" and repair in finding.sentence and without not in finding.sentence


class TestScales:
    def kinds(self, guide, **recipe):
        found = diagnose(guide.model, guide, averaging=False, recipe=CompressionRecipe(**recipe))
        for finding in found:
            assert finding.measured < finding.threshold and finding.sentence.endswith(".")
        return {finding.kind: finding for finding in found}

    @pytest.mark.parametrize("scale", [1e-5, 1e5])
    def test_layers_of_other_sizes_do_not_compare(self, scale):
        guide = posterior(stage="dense")
        name, other = guide.site_guides()
        with torch.no_grad():
            guide.site_guides()[name].latent_unconstrained.mul_(scale)
        guide.model.net[0].weight.data.mul_(scale)
        assert "unequal_layers" not in self.kinds(guide)  # nothing is pruned yet
        prune_to(guide, 0.5)
        finding = self.kinds(guide)["unequal_layers"]
        assert finding.site == (name if scale < 1 else other)
        assert "set pruning.scope to 'layer'" in finding.sentence
        for pruning in ({"scope": "layer"}, {"saliency": "activation"}):
            assert "unequal_layers" not in self.kinds(guide, pruning=pruning)

    def test_equal_gates_do_not_compare(self):
        guide = posterior(stage="dense")
        prune_to(guide, 0.5)
        by_gate = {"pruning": {"saliency": "gate"}}
        assert "gate_learning_rate" in self.kinds(guide, **by_gate)["equal_gates"].sentence
        assert "equal_gates" not in self.kinds(guide)
        with torch.no_grad():
            next(iter(guide.site_guides().values())).gate_logit_unconstrained[0, 0] += 0.1
        assert "equal_gates" not in self.kinds(guide, **by_gate)

    def test_layers_that_training_has_thrown_away(self):
        guide = posterior(stage="dense")
        name = next(iter(guide.site_guides()))
        with torch.no_grad():
            guide.site_guides()[name].latent_unconstrained.mul_(1e4)
        finding = self.kinds(guide)["grown_weights"]
        assert finding.site == name and "1e+04 times" in finding.sentence and "kl_weight" in finding.sentence
        assert "kl_weight" not in self.kinds(guide, kl_weight=0)["grown_weights"].sentence


class Partly(nn.Module):
    """Weights that are compressed, that could be, and that cannot."""

    def __init__(self):
        super().__init__()
        self.words = nn.Embedding(50, 8, max_norm=1.0)
        self.table = nn.Parameter(torch.randn(4, 8, 8))
        self.rnn = nn.LSTM(8, 16, batch_first=True)
        self.normed = nn.utils.parametrizations.weight_norm(nn.Linear(16, 16))
        self.fc = nn.Linear(16, 3)


class TestCoverage:
    def test_names_the_share_and_the_largest_others(self):
        net = Partly()
        model = BayesianNetwork(net, num_data=8)
        found = coverage(net, list(model.site_values()))
        assert list(model.site_values()) == ["fc.weight"]
        assert found.compressed == 48 and found.total == sum(p.numel() for p in net.parameters())
        sizes = [other.numel for other in found.others]
        assert sizes == sorted(sizes, reverse=True) and sum(sizes) == found.total - 48
        (finding,) = uncompressed(found)
        assert finding.measured == found.share == 48 / found.total
        for said in (
            f"Only {found.share:.1%} of the network's {found.total:,} parameters",
            "'rnn.weight_hh_l0' (1,024, which its LSTM keeps by itself)",
        ):
            assert said in finding.sentence
        assert "rnn.weight_hh_l0 (64, 16) is not compressed" in repr(model)

    def test_reasons(self):
        net = Partly()
        reasons = {other.name: other.reason for other in coverage(net, ["fc.weight"]).others}
        assert reasons["table"] == "" and "max_norm" in reasons["words.weight"]
        assert "remove_parametrizations" in reasons["normed.parametrizations.weight.original1"]

    def test_biases_alone_are_no_finding(self):
        net = nn.Linear(2, 2)
        assert coverage(net, ["weight"]).share < 0.9 and uncompressed(coverage(net, ["weight"])) == []

    def test_diagnose_and_compress_say_it(self):
        net = nn.Sequential(nn.Linear(8, 64), nn.ReLU(), nn.Linear(64, 3))
        model = BayesianNetwork(net, num_data=96, exclude=["0"])
        kinds = [
            f.kind for f in diagnose(model, SpikeGMMGuide(model, 2, estimator="straight_through"), averaging=False)
        ]
        assert kinds == ["uncompressed"]
        result = compress(net, _rows(), {"epochs": 1, "exclude": ["0"]})
        assert result.findings[-1].kind == "uncompressed"


def _rows():
    return torch.utils.data.DataLoader(torch.utils.data.TensorDataset(X, Y), batch_size=48)
