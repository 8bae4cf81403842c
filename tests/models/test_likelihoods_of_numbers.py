"""Likelihoods of real numbers and counts against scipy, and parameters of theirs that are learned."""

import copy
import io

import numpy as np
import pyro
import pytest
import scipy.stats
import torch
from pyro.infer.autoguide import AutoNormal
from sklearn.metrics import r2_score
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from sqs_pyro import SQSELBO, BayesianNetwork, SpikeGMMGuide, compress
from sqs_pyro.distributions.local_draw import LocalDraw
from sqs_pyro.errors import DataError, NetworkError
from sqs_pyro.evaluation.judging import judge_by
from sqs_pyro.models import Gaussian, HeteroscedasticGaussian, LearnedGaussian, NegativeBinomial, Poisson
from sqs_pyro.models.likelihoods import resolve
from sqs_pyro.models.observation import observe
from sqs_pyro.testing.statistics import assert_distribution

B, D = 6, 3
GENERATOR = torch.Generator().manual_seed(0)
OUTPUT = torch.randn(B, D, generator=GENERATOR)
WIDE = torch.randn(B, 2 * D, generator=GENERATOR)
NUMBERS = torch.randn(B, D, generator=GENERATOR)
COUNTS = torch.randint(6, (B, D), generator=GENERATOR)
SCALES = [0.3, 1.0, 2.5]


def negative_binomial(output, dispersion):
    mean = output.exp().double().numpy()
    return scipy.stats.nbinom(1 / dispersion, 1 / (1 + dispersion * mean))


@pytest.mark.parametrize("likelihood", [Gaussian(SCALES), LearnedGaussian(0.3)], ids=["known", "learned"])
def test_expectation_over_the_last_layer(likelihood):
    torch.manual_seed(0)
    mean, variance = torch.randn(D, 4), torch.rand(D, 4)
    x = torch.randn(B, 4)
    out = F.linear(x, LocalDraw.of(mean * 1, mean, variance))
    distribution, value = observe(likelihood, out, NUMBERS)
    assert distribution.expand((2, B)).log_prob(value).shape == (2, B)
    assert torch.equal(distribution.mean, out)  # samples are of the network that was drawn
    means, spread = x @ mean.T, (x.square() @ variance.T).sqrt()
    nodes, mass = (torch.tensor(v).float() for v in np.polynomial.hermite_e.hermegauss(8))
    scale = torch.as_tensor(likelihood.scale).detach()
    density = torch.distributions.Normal(means + nodes[:, None, None] * spread, scale).log_prob(NUMBERS)
    expected = (density * (mass / mass.sum())[:, None, None]).sum((0, 2))
    torch.testing.assert_close(distribution.log_prob(value), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("options", [{}, {"num_particles": 3, "vectorize_particles": True}], ids=["one", "three"])
def test_linear_regression_has_no_noise(options):
    pyro.enable_validation(True)
    model = BayesianNetwork(nn.Linear(4, 1), likelihood=Gaussian(0.5), num_data=3 * B, include=".*")
    guide = SpikeGMMGuide(model, num_components=1, initial_gate=0.3)
    x, y = torch.randn(B, 4), torch.randn(B, 1)
    elbo = SQSELBO(max_plate_nesting=1, **options)
    first, second = (elbo.differentiable_loss(model, guide, x, y) for _ in range(2))
    torch.testing.assert_close(first, second)
    # The same by draws of the weights and the density of each, three times the data; one component has no bound.
    kl = elbo.terms(model, guide, x, y).kl.item()
    drawn = guide.draw_weights(20_000)
    weight, bias = (torch.stack([draw[name] for draw in drawn]) for name in ("weight", "bias"))
    density = torch.distributions.Normal(x @ weight.mT + bias[:, None], 0.5).log_prob(y)  # [draws, B, 1]
    losses = kl - 3 * density.sum((1, 2))
    assert abs(losses.mean() - first.item()) < 4 * losses.std() / 20_000**0.5


@pytest.mark.parametrize(
    ("likelihood", "output", "y", "expected"),
    [
        (Gaussian(0.3), OUTPUT, NUMBERS, scipy.stats.norm(OUTPUT, 0.3)),
        (Gaussian(SCALES), OUTPUT, NUMBERS, scipy.stats.norm(OUTPUT, SCALES)),
        ("learned_gaussian", OUTPUT, NUMBERS, scipy.stats.norm(OUTPUT, 1.0)),
        (LearnedGaussian(0.3), OUTPUT, NUMBERS, scipy.stats.norm(OUTPUT, 0.3)),
        (LearnedGaussian(torch.tensor(SCALES)), OUTPUT, NUMBERS, scipy.stats.norm(OUTPUT, SCALES)),
        ("heteroscedastic", WIDE, NUMBERS, scipy.stats.norm(WIDE[:, :D], WIDE[:, D:].exp())),
        ("poisson", OUTPUT, COUNTS, scipy.stats.poisson(OUTPUT.exp())),
        ("poisson", OUTPUT, COUNTS.double(), scipy.stats.poisson(OUTPUT.exp())),
        ("negative_binomial", OUTPUT, COUNTS, negative_binomial(OUTPUT, 1.0)),
        (NegativeBinomial(SCALES), OUTPUT, COUNTS.float(), negative_binomial(OUTPUT, np.array(SCALES))),
    ],
)
def test_against_scipy(likelihood, output, y, expected):
    distribution, value = observe(resolve(likelihood), output, y)
    log_density = getattr(expected, "logpdf", None) or expected.logpmf
    found = distribution.log_prob(value)
    assert found.shape == distribution.batch_shape == (B,)
    np.testing.assert_allclose(found.detach(), log_density(y.numpy()).sum(1), rtol=1e-4)
    np.testing.assert_allclose(distribution.mean.detach(), expected.mean(), rtol=1e-4)
    np.testing.assert_allclose(distribution.variance.detach(), expected.var(), rtol=1e-4)


@pytest.mark.parametrize("likelihood", ["gaussian", "learned_gaussian", "poisson", "negative_binomial"])
def test_one_number_an_example(likelihood):
    """``[B]`` and ``[B, 1]`` are the same observations."""
    y = COUNTS[:, 0]
    flat, _ = observe(resolve(likelihood), OUTPUT[:, 0], y)
    column, value = observe(resolve(likelihood), OUTPUT[:, :1], y)
    torch.testing.assert_close(flat.log_prob(y.float()), column.log_prob(value))


def test_without_dispersion_counts_are_poissons():
    wide, narrow = NegativeBinomial(1e-4)(OUTPUT).log_prob(COUNTS), Poisson()(OUTPUT).log_prob(COUNTS)
    torch.testing.assert_close(wide, narrow, rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize(
    ("likelihood", "output", "sentence"),
    [
        (Gaussian([1.0, 2.0]), OUTPUT, r"scale is 2 numbers, but the network's output has the shape \[6, 3\]"),
        (LearnedGaussian([1.0] * B), OUTPUT[:, 0], "scale is 6 numbers"),
        (NegativeBinomial([1.0, 2.0]), OUTPUT, "dispersion is 2 numbers"),
        (HeteroscedasticGaussian(), OUTPUT, "needs D means and then D log-scales"),
        (HeteroscedasticGaussian(), WIDE[:, 0], "needs D means and then D log-scales"),
    ],
)
def test_outputs_that_do_not_fit(likelihood, output, sentence):
    with pytest.raises(NetworkError, match=sentence):
        likelihood(output)


@pytest.mark.parametrize("make", [Gaussian, LearnedGaussian, NegativeBinomial])
@pytest.mark.parametrize("given", [0.0, -1.0, "a", None, float("nan"), [], [[1.0]], [1.0, 0.0]])
def test_impossible_arguments_are_one_sentence(make, given):
    with pytest.raises(NetworkError, match="must be") as raised:
        make(given)
    assert "\n" not in str(raised.value)


def test_nothing_is_broadcast():
    with pytest.raises(DataError, match="nothing is broadcast"):
        observe(HeteroscedasticGaussian(), WIDE, WIDE)


# ---- learned with a model ----


def regression(n=400, outputs=2, noise=(0.2, 1.0)):
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(n, 4, generator=generator)
    y = x @ torch.randn(4, outputs, generator=generator)
    return x, y + torch.tensor(noise) * torch.randn(n, outputs, generator=generator)


def linear(likelihood, outputs=2, n=400):
    torch.manual_seed(0)
    return BayesianNetwork(nn.Linear(4, outputs), likelihood=likelihood, num_data=n)


def few(model):
    return SpikeGMMGuide(model, 3)


def fitted(model, x, y, steps=100, guide=few):
    guide = guide(model)
    svi = pyro.infer.SVI(model, guide, pyro.optim.Adam({"lr": 0.2}), loss=SQSELBO())
    for _ in range(steps):
        svi.step(x, y)
    return guide


def test_noise_is_that_of_the_residuals():
    x, y = regression()
    model = linear(LearnedGaussian([1.0, 1.0]))
    fitted(model, x, y, guide=AutoNormal)
    residuals = y - x @ torch.linalg.lstsq(x, y).solution  # least squares as numpy has it
    assert model.likelihood.scale.tolist() == pytest.approx(residuals.std(0).tolist(), rel=0.08)


def test_dispersion_is_that_of_the_counts():
    torch.manual_seed(3)
    y = torch.distributions.NegativeBinomial(2.0, probs=torch.tensor(0.6)).sample((800, 1))  # α = 1/2, μ = 3
    model = linear("negative_binomial", 1, 800)
    fitted(model, torch.zeros(800, 4), y, guide=AutoNormal)
    assert model.likelihood.dispersion.item() == pytest.approx(0.5, rel=0.2)


def test_predictive_has_the_noise_in_it():
    model = linear(LearnedGaussian([0.1, 3.0]))
    x = torch.randn(5, 4)
    draws = pyro.infer.Predictive(model, guide=few(model), num_samples=400, parallel=True)(x)
    noise = (draws["obs"] - draws["logits"]).flatten(0, -2)
    for found, scale in zip(noise.T, (0.1, 3.0), strict=True):
        assert_distribution(found.detach().numpy(), scipy.stats.norm(0, scale).cdf)


@pytest.mark.parametrize("plates", [{"num_particles": 3, "vectorize_particles": True}, {"num_particles": 2}])
def test_particles(plates):
    x, y = regression()
    model = linear(LearnedGaussian([1.0, 1.0]))
    guide = AutoNormal(model)
    svi = pyro.infer.SVI(model, guide, pyro.optim.Adam({"lr": 2e-2}), loss=pyro.infer.Trace_ELBO(**plates))
    before = model.likelihood.scale.detach().clone()
    svi.step(x, y)
    assert not torch.equal(model.likelihood.scale, before)


class TestOwnership:
    def test_is_a_parameter_of_the_model(self):
        model = linear(LearnedGaussian(0.5))
        assert "likelihood.scale_unconstrained" in dict(model.named_parameters())
        assert linear("negative_binomial").state_dict()["likelihood.dispersion_unconstrained"].shape == ()

    def test_order_of_parameters_is_the_same_after_a_step(self):
        """Optimizers count them."""
        model, (x, y) = linear(LearnedGaussian()), regression()
        before = [name for name, _ in model.named_parameters()]
        fitted(model, x, y, steps=1)
        assert [name for name, _ in model.named_parameters()] == before

    def test_store_and_state_dict_bring_it_back(self, tmp_path):
        x, y = regression()
        model = linear(LearnedGaussian())
        fitted(model, x, y, steps=20)
        pyro.get_param_store().save(tmp_path / "store")
        kept = model.likelihood.scale.item()
        assert pyro.param("likelihood.scale").item() == kept != 1.0
        pyro.clear_param_store()
        by_state = linear(LearnedGaussian())
        by_state.load_state_dict(model.state_dict())
        assert by_state.likelihood.scale.item() == kept
        by_store = linear(LearnedGaussian())
        pyro.get_param_store().load(tmp_path / "store")
        assert by_store.likelihood.scale.item() == kept

    def test_copies_and_pickles_learn_on_their_own(self):
        x, y = regression()
        model = linear(LearnedGaussian())
        file = io.BytesIO()
        torch.save(model, file)
        file.seek(0)
        for other in (copy.deepcopy(model), torch.load(file, weights_only=False)):
            fitted(other, x, y, steps=5)
            assert other.likelihood.scale.item() != model.likelihood.scale.item() == 1.0

    def test_belongs_to_one_network(self):
        noise = LearnedGaussian()
        linear(noise)
        with pytest.raises(NetworkError, match="LearnedGaussian already belongs to a network"):
            linear(noise)

    def test_a_call_outside_of_a_model_leaves_the_store_alone(self):
        pyro.clear_param_store()
        LearnedGaussian()(OUTPUT)
        model = linear(LearnedGaussian())
        model.likelihood(OUTPUT[:, :2])
        assert not list(pyro.get_param_store().keys())

    def test_module_form_of_the_loss(self):
        x, y = regression()
        model = linear(LearnedGaussian())
        loss = SQSELBO()(model, few(model))
        loss(x, y).backward()
        assert model.likelihood.scale_unconstrained.grad is not None
        assert "model.likelihood.scale_unconstrained" in dict(loss.named_parameters())


# ---- judged and compressed ----


@pytest.mark.parametrize(
    ("likelihood", "output", "mean", "y"),
    [
        (LearnedGaussian(SCALES), OUTPUT, OUTPUT, NUMBERS),
        ("heteroscedastic", WIDE, WIDE[:, :D], NUMBERS),
        ("poisson", OUTPUT, OUTPUT.exp(), COUNTS),
        ("negative_binomial", OUTPUT, OUTPUT.exp(), COUNTS),
        (lambda z: pyro.distributions.Poisson(z.exp()), OUTPUT, OUTPUT.exp(), COUNTS),
    ],
)
def test_judged_by_r2_of_the_mean(likelihood, output, mean, y):
    found = judge_by(resolve(likelihood))(nn.Identity(), [(output[:4], y[:4]), (output[4:], y[4:])])
    expected = 1 - float((y - mean).square().sum() / (y - y.float().mean(0)).square().sum())
    assert found == pytest.approx(expected, rel=1e-4)
    assert r2_score(y[:, 0], mean[:, 0]) <= 1  # as scikit-learn has it, of one output
    one = judge_by(resolve(likelihood if likelihood != "heteroscedastic" else "gaussian"))
    if not isinstance(likelihood, LearnedGaussian):
        single = one(nn.Identity(), [(output[:, :1], y[:, 0])])
        assert single == pytest.approx(r2_score(y[:, 0], mean[:, 0]), abs=1e-5)


def test_a_binomial_is_judged_by_its_mode():
    y = torch.tensor([7.0, 2.0, 5.0])
    logits = torch.tensor([1.0, -1.5, 0.1])  # modes of ten trials: 8, 2, 5
    found = judge_by(lambda z: pyro.distributions.Binomial(10, logits=z))(nn.Identity(), [(logits, y)])
    assert found == pytest.approx(2 / 3)


@pytest.mark.parametrize(
    ("likelihood", "outputs"),
    [
        ("learned_gaussian", 2),
        (LearnedGaussian([1.0, 1.0]), 2),
        ("heteroscedastic", 4),
        ("poisson", 2),
        ("negative_binomial", 2),
    ],
)
def test_compression(likelihood, outputs, tmp_path):
    x, y = regression(64)
    if likelihood in ("poisson", "negative_binomial"):
        y = y.exp().clamp_max(20).round()
    loader = DataLoader(TensorDataset(x, y), batch_size=16)
    net = nn.Sequential(nn.Linear(4, 16), nn.ReLU(), nn.Linear(16, outputs))
    recipe = {"epochs": 2, "num_components": 4, "nonzero_rate": 0.8}
    runs = [
        compress(net, loader, recipe, likelihood=likelihood, validation=loader, checkpoint=tmp_path / "run.pt")
        for _ in range(2)  # the second takes up the first's checkpoint, which knows the likelihood
    ]
    first, again = ({n: p.detach() for n, p in run.model.named_parameters()} for run in runs)
    torch.testing.assert_close(first, again, rtol=0, atol=0)
    assert runs[0].history[-1].score <= 1
    learned = [value for name, value in first.items() if name.startswith("likelihood.")]
    assert len(learned) == (likelihood not in ("heteroscedastic", "poisson"))
    for value in learned:
        assert bool((value != 0).all())  # of 1 at the start, of which the logarithm is 0
    if isinstance(likelihood, LearnedGaussian):
        assert likelihood.scale.tolist() == [1.0, 1.0]  # the caller's own is as it was
