"""What Pyro users do without thinking of it: names, dtypes, modes, texts for lists, priors of their own."""

import pickle
from contextlib import nullcontext

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import SVI, JitTrace_ELBO, JitTraceMeanField_ELBO, Predictive, Trace_ELBO, WeighedPredictive
from pyro.nn import PyroModule, PyroSample
from torch import nn

from sqs_pyro import SQSELBO, BayesianNetwork, SpikeAndSlab, SpikeGMM, SpikeGMMGuide, pack
from sqs_pyro.compression.finetune.recipe import CompressionRecipe
from sqs_pyro.distributions import register_bound
from sqs_pyro.errors import DataError, ModelError, NetworkError, SQSError
from sqs_pyro.models import (
    HierarchicalInclusion,
    LearnedPrior,
    gaussian_spike_prior,
    normal_prior,
    scale_matched_prior,
)
from sqs_pyro.networks.sites import select_sites
from sqs_pyro.networks.weight_scale import weight_scale

X, Y = torch.linspace(-1, 1, 48).view(12, 4), torch.arange(12) % 3
PRIORS = {
    "normal": scale_matched_prior,
    "laplace": lambda: scale_matched_prior(slab="laplace"),
    "student_t": lambda: scale_matched_prior(slab="student_t"),
    "plain_normal": normal_prior,
    "gaussian_spike": gaussian_spike_prior,
    "hierarchical": HierarchicalInclusion,
    "learned": LearnedPrior,
}


def mlp() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 3))


def has_finite_gradients(guide) -> bool:
    gradients = [p.grad for p in guide.parameters() if p.grad is not None]
    return bool(gradients) and all(bool(each.isfinite().all()) for each in gradients)


def svi(model, guide, rate: float = 0.05) -> SVI:
    return SVI(model, guide, pyro.optim.Adam({"lr": rate}), loss=SQSELBO())


@pytest.mark.parametrize(
    ("prior", "value"),
    [(prior, value) for i, prior in enumerate(PRIORS) for value in ((0.0, -2.0), (1e-40, 0.3))[i % 2]],
)
def test_a_layer_of_equal_weights_trains(prior, value):
    """A branch that starts as nothing has a prior of usable width, and a codebook with places to go to."""
    net = mlp()
    nn.init.constant_(net[2].weight, value)
    model = BayesianNetwork(net, prior=PRIORS[prior](), num_data=12)
    guide = SpikeGMMGuide(model, num_components=4, estimator="straight_through")
    torch.testing.assert_close(guide.harden()["2.weight"].dense(), net[2].weight.detach(), atol=1e-3, rtol=0)
    site = guide.site_guides()["2.weight"]
    assert len(site.loc.unique()) == 4
    run = svi(model, guide)
    losses = [run.step(X, Y) for _ in range(15)]
    assert torch.tensor(losses).isfinite().all() and losses[-1] < losses[0] < 1e4
    assert len(site.latent.unique()) > 1


def test_weight_scale():
    weight = torch.randn(20, 5, 3)
    assert torch.equal(weight_scale(weight), weight.square().mean().sqrt())
    assert float(weight_scale(torch.zeros(20, 5, 3))) == pytest.approx(15**-0.5)
    assert float(weight_scale(torch.zeros(4))) == pytest.approx(0.5)
    assert float(weight_scale(torch.full((4,), 1e30))) == pytest.approx(1e30)


class TestPredictions:
    def pair(self, *layers):
        torch.manual_seed(0)
        net = nn.Sequential(nn.Linear(4, 6), *layers, nn.ReLU(), nn.Linear(6, 3))
        model = BayesianNetwork(net, num_data=12)
        return model, SpikeGMMGuide(
            model, num_components=4, temperature=2.0, initial_gate=1.0, estimator="straight_through"
        )

    def logits(self, model, guide):
        torch.manual_seed(1)
        return Predictive(model, guide=guide, num_samples=8, return_sites=("logits",))(X)["logits"]

    @pytest.mark.parametrize("estimator", ["straight_through", "soft"])
    def test_are_draws_of_the_posterior_in_either_mode(self, estimator):
        model, guide = self.pair()
        guide.estimator = estimator
        training = self.logits(model, guide)
        assert guide.training and model.training
        assert torch.equal(training, self.logits(model.eval(), guide.eval()))
        assert float(training.std(0).min()) > 0

    @pytest.mark.parametrize("estimator", ["straight_through", "soft"])
    def test_with_weights_are_the_same_draws_in_either_mode(self, estimator):
        model, guide = self.pair()
        guide.estimator = estimator
        drawn = []
        for mode in (True, False):
            torch.manual_seed(1)
            drawn.append(WeighedPredictive(model, guide=guide.train(mode), num_samples=8)(X))
        assert torch.equal(drawn[0].samples["logits"], drawn[1].samples["logits"])
        assert torch.equal(drawn[0].log_weights, drawn[1].log_weights)
        assert float(drawn[0].samples["logits"].std(0).min()) > 0

    def test_leave_the_network_as_it_is(self):
        model, guide = self.pair(nn.BatchNorm1d(6), nn.Dropout(0.5))
        before = {name: value.clone() for name, value in model.net.state_dict().items()}
        modes = [module.training for module in model.net.modules()]
        first = self.logits(model, guide)
        assert torch.equal(first, self.logits(model.eval(), guide))
        model.net.train()
        assert all(torch.equal(value, before[name]) for name, value in model.net.state_dict().items())
        assert modes == [module.training for module in model.net.modules()]

    def test_of_a_network_in_training_mode_for_those_who_ask(self):
        model, _ = self.pair(nn.Dropout(0.5))
        model.evaluates_predictions = False
        given = {name: value.expand(2, *value.shape) for name, value in model.site_values().items()}
        logits = Predictive(model, given, return_sites=("logits",))(X)["logits"]
        assert not torch.equal(logits[0], logits[1])

    @pytest.mark.parametrize("elbo", [SQSELBO, Trace_ELBO])
    def test_training_and_its_losses_keep_their_estimator(self, elbo):
        model, guide = self.pair()
        expected = {name: site.mode for name, site in TestPredictions.laws(guide).items()}
        drawn = {}
        elbo().loss(model, lambda *data: drawn.update(guide(*data)), X, Y)
        assert all(torch.equal(drawn[name], value) for name, value in expected.items())

    @staticmethod
    def laws(guide):
        return {name: guide.distribution(site) for name, site in guide.site_guides().items()}


class OwnPrior(SpikeAndSlab):
    """A spike and a standard Normal, with a KL that nobody would mistake for another."""

    def __init__(self, inclusion, validate_args=None):
        super().__init__(inclusion, dist.Normal(0.0, 1.0), validate_args)

    def expand(self, batch_shape, _instance=None):
        return super().expand(batch_shape, self._get_checked_instance(OwnPrior, _instance))


class WithoutExpand(SpikeAndSlab):
    def __init__(self, inclusion):
        super().__init__(inclusion, dist.Normal(0.0, 1.0))


class OtherExpand(OwnPrior):
    def expand(self, batch_shape, _instance=None):
        return dist.Normal(0.0, 1.0).expand((2, *batch_shape))


register_bound("jensen", SpikeGMM, OwnPrior)(lambda q, p: torch.full(q.batch_shape, 1000.0))


class TestAPriorOfOnesOwn:
    @pytest.mark.parametrize("stage", ["coded", "dense"])
    def test_its_bound_counts_in_a_network(self, stage):
        model = BayesianNetwork(mlp(), prior=OwnPrior(torch.tensor(0.3)), num_data=12)
        guide = SpikeGMMGuide(model, num_components=4, stage=stage, estimator="straight_through")
        terms = SQSELBO().terms(model, guide, X, Y)
        assert {name: float(kl.detach()) for name, kl in terms.kl_by_site.items()} == {
            "0.weight": 24_000.0,
            "2.weight": 18_000.0,
        }
        assert svi(model, guide).step(X, Y) > 42_000

    @pytest.mark.parametrize(
        ("prior", "sentence"),
        [
            (lambda: WithoutExpand(torch.tensor(0.5)), r"a WithoutExpand, cannot be expanded .* needs expand\("),
            (lambda: OtherExpand(torch.tensor(0.5)), r"its expand\(\) returned batch shape \(2, 6, 4\)"),
            (
                lambda: dist.Normal(torch.zeros(5), 1.0),
                r"batch shape \(5,\), which does not broadcast .* \(6, 4\)",
            ),
            (lambda: dist.Normal(torch.zeros(2, 6, 4), 1.0), r"batch shape \(2, 6, 4\), which does not broadcast"),
            (lambda: dist.Normal(torch.zeros(4), 1.0).to_event(1), r"event shape \(4,\), but must be"),
            (lambda: torch.distributions.Normal(0.0, 1.0), r"is a Normal, but must be a Pyro distribution"),
            (lambda: 0.5, "is a float, but must be a Pyro distribution"),
            (lambda: lambda name, weight: None, "is a NoneType, but must be a Pyro distribution"),
            (
                lambda: lambda name: None,
                r"failed for '0\.weight' with TypeError: .* called with a site's name and",
            ),
            (lambda: dist.Normal, "is the class Normal, but must be a distribution made with it"),
        ],
    )
    def test_sentences(self, prior, sentence):
        with pytest.raises(NetworkError, match=sentence):
            BayesianNetwork(mlp(), prior=prior())

    def test_a_function_of_the_weight_learns_nothing_of_it(self):
        model = BayesianNetwork(mlp(), prior=lambda name, weight: dist.Normal(0.0, weight.std()), num_data=12)
        run = svi(model, SpikeGMMGuide(model, num_components=4, estimator="straight_through"))
        assert run.step(X, Y) != run.step(X, Y)

    @pytest.mark.parametrize(
        "prior", [dist.HalfNormal(1.0), dist.Uniform(-0.01, 0.01), dist.Categorical(torch.ones(3))], ids=repr
    )
    def test_that_excludes_weights(self, prior):
        model = BayesianNetwork(mlp(), prior=prior, num_data=12)
        with pytest.raises(NetworkError, match=f"is a {type(prior).__name__}, whose values are .* any number"):
            SpikeGMMGuide(model, num_components=4, estimator="straight_through")

    @pytest.mark.parametrize(
        "prior",
        [
            dist.Uniform(-50.0, 50.0),
            dist.MixtureSameFamily(dist.Categorical(torch.ones(2)), dist.Normal(torch.zeros(2), torch.ones(2))),
        ],
        ids=repr,
    )
    def test_of_all_weights_there_will_be(self, prior):
        model = BayesianNetwork(mlp(), prior=prior, num_data=12)
        assert svi(model, SpikeGMMGuide(model, num_components=4, estimator="straight_through")).step(X, Y) > 0

    def test_two_that_are_equally_specific(self):
        class A(OwnPrior):
            pass

        class B(OwnPrior):
            pass

        class Both(A, B):
            pass

        for law in (A, B):
            register_bound("jensen", SpikeGMM, law)(lambda q, p: q.gates)
        with pytest.raises(ModelError, match=r"ambiguous: .*\(SpikeGMM, A\) and \(SpikeGMM, B\)"):
            torch.distributions.kl_divergence(TestAPriorOfOnesOwn.law(), Both(torch.tensor(0.5)))

    @staticmethod
    def law():
        return SpikeGMM(torch.tensor(0.5), torch.zeros(2), torch.ones(2), logits=torch.zeros(2))


class TestNames:
    class Named(nn.Module):
        """Parameters that are called like things of the model, of its prior, or of a dictionary."""

        def __init__(self, *names):
            super().__init__()
            self.names = names
            for name in names:
                self.register_parameter(name, nn.Parameter(torch.randn(4, 3)))

        def forward(self, x):
            return x @ sum(getattr(self, name) for name in self.names)

    @pytest.mark.parametrize("name", ["data", "logits", "obs"])
    def test_of_the_models_own_sites(self, name):
        with pytest.raises(NetworkError, match=f"'{name}' cannot be a site, because the model has a site of that"):
            BayesianNetwork(self.Named(name), include=".")

    def test_of_the_priors_sites(self):
        with pytest.raises(NetworkError, match="'inclusion' cannot be a site, because its prior has"):
            BayesianNetwork(self.Named("inclusion"), include=".", prior=HierarchicalInclusion(scope="global"))

    def test_of_everything_else(self):
        names = ("keys", "values", "items", "latent", "loc", "net", "prior", "sites", "training_", "weight/a")
        model = BayesianNetwork(self.Named(*names), include=".", num_data=12)
        guide = SpikeGMMGuide(model, num_components=3, estimator="straight_through")
        assert tuple(guide.site_guides()) == names
        run = svi(model, guide)
        assert run.step(X, Y) > run.step(X, Y)
        assert pack(guide)(X).shape == (12, 3)

    @pytest.mark.parametrize("text", ["0.weight", "weight"])
    def test_one_pattern_may_be_a_text(self, text):
        for given in ({"include": text}, {"exclude": text if text == "0.weight" else "^0"}):
            listed = {key: [value] for key, value in given.items()}
            assert list(select_sites(mlp(), **given)) == list(select_sites(mlp(), **listed))
            recipe = CompressionRecipe.model_validate(given)
            assert recipe == CompressionRecipe.model_validate(listed)


class TestEnvironment:
    @pytest.fixture
    def float64(self):
        torch.set_default_dtype(torch.float64)
        yield
        torch.set_default_dtype(torch.float32)

    @pytest.mark.usefixtures("float64")
    @pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
    @pytest.mark.parametrize("prior", PRIORS)
    def test_default_dtype(self, prior, dtype):
        model = BayesianNetwork(mlp().to(dtype), prior=PRIORS[prior](), num_data=12)
        guide = SpikeGMMGuide(model, num_components=3, estimator="straight_through")
        assert torch.tensor(svi(model, guide).step(X.to(dtype), Y)).isfinite()
        assert Predictive(model, guide=guide, num_samples=2)(X.to(dtype))["logits"].dtype == dtype
        assert pack(guide)(X.to(dtype)).dtype == dtype

    def test_one_example_under_batch_norm(self):
        net = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Linear(6, 3))
        model = BayesianNetwork(net, num_data=12)
        guide = SpikeGMMGuide(model, num_components=3, estimator="straight_through")
        with pytest.raises(DataError, match="A minibatch has one example, of which batch norm in training"):
            svi(model, guide).step(X[:1], Y[:1])
        net.eval()
        svi(model, guide).step(X[:1], Y[:1])

    def test_a_network_that_is_random_already(self):
        inner = PyroModule[nn.Linear](4, 6)
        inner.weight = PyroSample(dist.Normal(0.0, 1.0).expand([6, 4]).to_event(2))
        model = BayesianNetwork(nn.Sequential(inner, nn.Linear(6, 3)), num_data=12)
        guide = SpikeGMMGuide(model, num_components=3, estimator="straight_through")
        pyro.enable_validation(False)  # which warns of it
        with pytest.raises(SQSError, match="the model samples 'weight' but the guide does not") as raised:
            svi(model, guide).step(X, Y)
        assert isinstance(raised.value, ValueError)


@pytest.mark.parametrize("prior", PRIORS)
def test_pickled_in_the_middle_of_training(prior):
    model = BayesianNetwork(mlp(), prior=PRIORS[prior](), num_data=12)
    guide = SpikeGMMGuide(model, num_components=3, estimator="straight_through")
    svi(model, guide).step(X, Y)
    twin_model, twin_guide = pickle.loads(pickle.dumps((model, guide)))
    assert twin_guide.model is twin_model
    losses = []
    for made in ((model, guide), (twin_model, twin_guide)):
        torch.manual_seed(2)
        losses.append([svi(*made).step(X, Y) for _ in range(2)])
    assert losses[0] == losses[1]
    assert torch.equal(pack(guide)(X), pack(twin_guide)(X))


class TestCodesThatAGradientNeeds:
    """Several passes may wait for one backward pass: nothing that it needs is written to in the meantime."""

    def parts(self, refresh_every=1):
        model = BayesianNetwork(mlp(), num_data=12)
        return model, SpikeGMMGuide(
            model, num_components=3, refresh_every=refresh_every, estimator="straight_through"
        )

    @pytest.mark.parametrize("refresh_every", [1, 2])
    def test_sums_of_losses(self, refresh_every):
        model, guide = self.parts(refresh_every)
        loss = SQSELBO()(model, guide)
        (loss(X[:6], Y[:6]) + loss(X[6:], Y[6:])).backward()
        together = {name: p.grad.clone() for name, p in guide.named_parameters() if p.grad is not None}
        guide.zero_grad()
        for part in (slice(0, 6), slice(6, 12)):
            loss(X[part], Y[part]).backward()
        for name, gradient in together.items():
            torch.testing.assert_close(guide.get_parameter(name).grad, gradient)

    @pytest.mark.parametrize("elbo", [SQSELBO, Trace_ELBO])
    def test_particles(self, elbo):
        model, guide = self.parts()
        elbo(num_particles=3).differentiable_loss(model, guide, X, Y).backward()
        elbo(num_particles=2)(model, guide)(X, Y).backward()
        assert has_finite_gradients(guide)

    def test_steps_inside_no_grad_train(self):
        losses = []
        for context in (nullcontext(), torch.no_grad()):
            model = BayesianNetwork(mlp(), num_data=12)
            run = svi(model, SpikeGMMGuide(model, num_components=4, estimator="straight_through"))
            with context:
                losses.append([run.step(X, Y) for _ in range(3)])
        assert losses[0] == losses[1]

    def test_steps_in_inference_mode_are_refused(self):
        model = BayesianNetwork(mlp(), num_data=12)
        run = svi(model, SpikeGMMGuide(model, num_components=4, estimator="straight_through"))
        with torch.inference_mode():
            assert run.evaluate_loss(X, Y) > 0
            with pytest.raises(ModelError, match=r"inference_mode\(\), in which nothing can be trained: call it"):
                run.step(X, Y)

    @pytest.mark.filterwarnings("ignore")  # torch's, that jit.trace is deprecated and what it does not follow
    @pytest.mark.parametrize("elbo", [JitTrace_ELBO, JitTraceMeanField_ELBO])
    def test_no_trace_of_a_random_network(self, elbo):
        model = BayesianNetwork(mlp(), num_data=12)
        with pytest.raises(ModelError, match="JitTrace_ELBO and jit_compile, cannot follow a network"):
            SVI(
                model,
                SpikeGMMGuide(model, num_components=4, estimator="straight_through"),
                pyro.optim.Adam({"lr": 0.1}),
                elbo(),
            ).step(X, Y)
        assert all(isinstance(p, nn.Parameter) for p in model.net.parameters())

    def test_masks_are_renewed_between_forward_and_backward(self):
        model, guide = self.parts()
        loss = SQSELBO().differentiable_loss(model, guide, X, Y)
        guide.prune(
            {name: torch.zeros(site.shape, dtype=torch.bool) for name, site in guide.site_guides().items()}
        )
        guide.freeze_codes()
        loss.backward()
        assert has_finite_gradients(guide)

    def test_codes_are_saved(self):
        model, guide = self.parts()
        SQSELBO()(model, guide)(X, Y)
        other = self.parts()[1]
        other.load_state_dict(guide.state_dict())
        for name, site in guide.site_guides().items():
            assert torch.equal(other.site_guides()[name].codes, site.codes)
