"""BayesianNetwork: sites, scaling, likelihoods, and a user's network that stays what it is."""

import copy
from collections import namedtuple

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import Predictive
from torch import nn
from torch.nn import functional as F

from sqs_pyro import models
from sqs_pyro.distributions import SpikeAndSlab
from sqs_pyro.errors import NetworkError, RecipeError
from sqs_pyro.inference.elbo import SQSELBO
from sqs_pyro.inference.guides.spike_gmm import SpikeGMMGuide
from sqs_pyro.models import BayesianNetwork
from sqs_pyro.models.bayesian import scale_matched_prior
from sqs_pyro.models.likelihoods import Gaussian


def mlp(outputs: int = 3) -> nn.Sequential:
    return nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, outputs))


def fixed(model: BayesianNetwork) -> dict[str, torch.Tensor]:
    """Pretrained weights in place of draws."""
    return model.site_values()


def run(model, *args, weights=None):
    conditioned = poutine.condition(model, data=fixed(model) if weights is None else weights)
    return poutine.trace(conditioned).get_trace(*args)


class TestSites:
    def test_named_after_parameters_in_their_shape(self):
        model = BayesianNetwork(mlp(), num_data=10)
        trace = poutine.trace(model).get_trace(torch.randn(5, 4), torch.zeros(5, dtype=torch.long))
        latent = [
            n for n, s in trace.nodes.items() if s["type"] == "sample" and n not in ("data", "logits", "obs")
        ]
        assert latent == ["0.weight", "2.weight"]
        for name in latent:
            node = trace.nodes[name]
            assert node["value"].shape == node["fn"].event_shape == model.net.get_parameter(name).shape
            assert node["fn"].batch_shape == ()

    def test_other_parameters_are_pyro_parameters(self):
        model = BayesianNetwork(mlp(), num_data=10)
        trace = poutine.trace(model).get_trace(torch.randn(5, 4), torch.zeros(5, dtype=torch.long))
        assert {n for n, s in trace.nodes.items() if s["type"] == "param"} == {"net.0.bias", "net.2.bias"}

    def test_tied_parameters_are_sampled_once_and_used_twice(self):
        net = nn.Sequential(nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False))
        net[1].weight = net[0].weight
        model = BayesianNetwork(net, num_data=2)
        x, w = torch.randn(2, 4), torch.randn(4, 4)
        trace = run(model, x, torch.zeros(2, dtype=torch.long), weights={"0.weight": w})
        torch.testing.assert_close(trace.nodes["logits"]["value"], x @ w.T @ w.T)
        assert list(model.site_values()) == ["0.weight"]

    def test_include_and_exclude(self):
        assert list(BayesianNetwork(mlp(), exclude=["^2"]).site_values()) == ["0.weight"]
        assert list(BayesianNetwork(mlp(), include=["bias"]).site_values()) == ["0.bias", "2.bias"]

    def test_site_values_are_the_pretrained_weights_without_gradient(self):
        net = mlp()
        before = copy.deepcopy(net.state_dict())
        values = BayesianNetwork(net).site_values()
        assert all(torch.equal(values[n], before[n]) and not values[n].requires_grad for n in values)


class TestTheUsersNetwork:
    def test_keeps_values_and_works_alone(self):
        net = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Dropout(0.5), nn.Linear(6, 3))
        x = torch.randn(8, 4)
        before, expected = copy.deepcopy(net.state_dict()), copy.deepcopy(net).eval()(x)
        model = BayesianNetwork(net, num_data=8)
        model.eval()
        guide = SpikeGMMGuide(model, 4, estimator="straight_through")
        SQSELBO()(model, guide)(x, torch.zeros(8, dtype=torch.long)).backward()
        torch.testing.assert_close(net(x), expected)
        assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())
        assert model.net is net
        assert type(net) is nn.Sequential and type(net[0]) is nn.Linear

    def test_logits_are_the_networks_with_its_own_weights(self):
        model = BayesianNetwork(mlp(), num_data=5)
        x = torch.randn(5, 4)
        trace = run(model, x, torch.zeros(5, dtype=torch.long))
        torch.testing.assert_close(trace.nodes["logits"]["value"], model.net(x))

    def test_only_compressed_parameters_are_frozen(self):
        model = BayesianNetwork(mlp())
        assert {n for n, p in model.net.named_parameters() if p.requires_grad} == {"0.bias", "2.bias"}

    def test_batch_norm_statistics_follow_in_training_mode(self):
        net = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Linear(6, 3))
        model = BayesianNetwork(net, num_data=16).train()
        x = torch.randn(16, 4)
        run(model, x, torch.zeros(16, dtype=torch.long))
        expected = 0.1 * net[0](x).mean(0)
        torch.testing.assert_close(net[1].running_mean, expected)

    def test_state_dict_round_trip(self):
        model, other = BayesianNetwork(mlp()), BayesianNetwork(mlp())
        other.load_state_dict(model.state_dict())
        x = torch.randn(3, 4)
        assert torch.equal(model.net(x), other.net(x))

    @pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
    def test_in_another_precision(self, dtype):
        """Guides keep float32 whatever the network has."""
        x, y = torch.randn(6, 4), torch.randint(3, (6,))
        net = mlp().to(dtype)
        losses = []
        for n, inputs in ((copy.deepcopy(net).float(), x.to(dtype).float()), (net, x.to(dtype))):
            pyro.clear_param_store()
            model = BayesianNetwork(n, SpikeAndSlab(0.5, dist.Normal(0.0, 1.0)), num_data=6)
            loss_fn = SQSELBO(kl_weight=0.01)(model, SpikeGMMGuide(model, 4, estimator="straight_through"))
            loss = loss_fn(inputs, y)
            loss.backward()
            losses.append(float(loss.detach()))
            assert all(p.grad.isfinite().all() for p in loss_fn.guide.parameters() if p.requires_grad)
        assert losses[1] == pytest.approx(losses[0], rel=2e-2 if dtype == torch.bfloat16 else 1e-5)


class TestScaling:
    @pytest.mark.parametrize(("num_data", "batch"), [(100, 5), (5, 5), (60_000, 7)])
    def test_loss_by_hand(self, num_data, batch):
        """``N/B`` times the cross-entropy of the drawn network, plus the KL of every weight once."""
        model = BayesianNetwork(mlp(), SpikeAndSlab(0.3, dist.Normal(0.0, 1.0)), num_data=num_data)
        guide = SpikeGMMGuide(model, 4, temperature=0.3, estimator="straight_through")
        x, y = torch.randn(batch, 4), torch.randint(3, (batch,))
        loss = SQSELBO().differentiable_loss(model, guide, x, y)

        weights, kl = {}, 0.0
        for name, site in guide.site_guides().items():
            gate = torch.sigmoid(torch.tensor(5.0))
            loc, scale, mixing = site.loc[0], site.scale[0], site.mixing_logits[0].softmax(0)
            density = dist.Normal(loc, scale).log_prob(site.latent.unsqueeze(-1)) + mixing.log()
            phi = (density / 0.3).softmax(-1)
            kappa = (loc**2 + scale**2) / 2 - scale.log() - 0.5
            bernoulli = gate * (gate / 0.3).log() + (1 - gate) * ((1 - gate) / 0.7).log()
            kl = kl + (bernoulli + gate * (phi * kappa).sum(-1)).sum()
            weights[name] = loc[density.argmax(-1)]
        hidden = F.relu(F.linear(x, weights["0.weight"], model.net[0].bias))
        nll = F.cross_entropy(F.linear(hidden, weights["2.weight"], model.net[2].bias), y, reduction="sum")
        torch.testing.assert_close(loss, num_data / batch * nll + kl, rtol=1e-4, atol=1e-3)

    def test_without_num_data_a_batch_is_everything(self):
        model = BayesianNetwork(mlp())
        x, y = torch.randn(5, 4), torch.randint(3, (5,))
        trace = run(model, x, y)
        trace.compute_log_prob()
        expected = -F.cross_entropy(model.net(x), y, reduction="sum")
        torch.testing.assert_close(trace.nodes["obs"]["log_prob_sum"], expected)

    def test_a_last_batch_that_is_smaller(self):
        model = BayesianNetwork(mlp(), num_data=12)
        scales = [
            run(model, torch.randn(b, 4), torch.zeros(b, dtype=torch.long)).nodes["obs"]["scale"] for b in (5, 2)
        ]
        assert [float(s) for s in scales] == pytest.approx([12 / 5, 6])


class TestLikelihoods:
    def log_prob(self, model, x, y) -> torch.Tensor:
        trace = run(model, x, y)
        trace.compute_log_prob()
        return trace.nodes["obs"]["log_prob"]

    def test_categorical(self):
        model = BayesianNetwork(mlp())
        x, y = torch.randn(6, 4), torch.randint(3, (6,))
        torch.testing.assert_close(self.log_prob(model, x, y), -F.cross_entropy(model.net(x), y, reduction="none"))

    def test_categorical_of_tokens(self):
        """Logits ``[B, T, C]``: a sequence is one observation, its log-probability the sum over tokens."""
        model = BayesianNetwork(mlp(), num_data=20)
        x, y = torch.randn(2, 5, 4), torch.randint(3, (2, 5))
        log_prob = self.log_prob(model, x, y)
        expected = -F.cross_entropy(model.net(x).transpose(1, 2), y, reduction="none").sum(1)
        torch.testing.assert_close(log_prob, 10 * expected)  # N/B = 10

    def test_gaussian(self):
        model = BayesianNetwork(mlp(), likelihood="gaussian")
        x, y = torch.randn(6, 4), torch.randn(6, 3)
        expected = dist.Normal(model.net(x), 1.0).log_prob(y).sum(1)
        torch.testing.assert_close(self.log_prob(model, x, y), expected)

    def test_gaussian_with_a_scale(self):
        model = BayesianNetwork(mlp(1), likelihood=Gaussian(0.2))
        x, y = torch.randn(6, 4), torch.randn(6, 1)
        expected = dist.Normal(model.net(x), 0.2).log_prob(y).sum(1)
        torch.testing.assert_close(self.log_prob(model, x, y), expected)

    def test_callable(self):
        def poisson(output):
            return dist.Poisson(output.exp()).to_event(1)

        model = BayesianNetwork(mlp(), likelihood=poisson)
        x, y = torch.randn(6, 4), torch.randint(5, (6, 3)).float()
        expected = dist.Poisson(model.net(x).exp()).log_prob(y).sum(1)
        torch.testing.assert_close(self.log_prob(model, x, y), expected)

    def test_observations_are_drawn_when_not_given(self):
        model = BayesianNetwork(mlp(), num_data=50)
        draws = Predictive(model, num_samples=7)(torch.randn(5, 4))
        assert draws["obs"].shape == (7, 5)
        assert ((draws["obs"] >= 0) & (draws["obs"] < 3)).all()

    @pytest.mark.parametrize(
        ("arguments", "sentence"),
        [
            ({"likelihood": "cauchy"}, "likelihood='cauchy' is unknown: use 'categorical', 'gaussian'"),
            ({"num_data": 0}, "num_data is 0, but must be at least 1"),
            ({"num_data": -4}, "num_data is -4"),
        ],
    )
    def test_bad_arguments(self, arguments, sentence):
        with pytest.raises(NetworkError, match=sentence):
            BayesianNetwork(mlp(), **arguments)

    @pytest.mark.parametrize("scale", [0.0, -1.0, float("nan")])
    def test_bad_scale(self, scale):
        with pytest.raises(NetworkError, match=r"scale is .*, but must be (one positive number|finite numbers)"):
            Gaussian(scale)

    def test_output_without_predictions(self):
        class Odd(nn.Linear):
            def forward(self, x):
                return {"features": super().forward(x)}

        model = BayesianNetwork(nn.Sequential(Odd(4, 3)))
        with pytest.raises(
            NetworkError, match="returned a dict without 'logits' or 'out': give a likelihood=callable"
        ):
            model(torch.randn(2, 4), torch.zeros(2, dtype=torch.long))


class Two(nn.Module):
    def __init__(self, wrap):
        super().__init__()
        self.fc, self.wrap = nn.Linear(4, 3), wrap

    def forward(self, a, b=0.0):
        return self.wrap(self.fc(a) + b)


Output = namedtuple("Output", ["loss", "logits"])


@pytest.mark.parametrize(
    "wrap",
    [
        lambda t: t,
        lambda t: {"logits": t},
        lambda t: {"aux": 0 * t, "out": t},
        lambda t: Output(None, t),
        lambda t: (t, "more"),
    ],
    ids=["tensor", "mapping", "segmentation", "attribute", "tuple"],
)
@pytest.mark.parametrize("form", ["tensor", "tuple", "mapping"])
def test_inputs_and_outputs_of_every_form(form, wrap):
    model = BayesianNetwork(Two(wrap), num_data=5)
    a, b = torch.randn(5, 4), torch.randn(5, 3)
    inputs = {"tensor": a, "tuple": (a, b), "mapping": {"a": a, "b": b}}[form]
    trace = run(model, inputs, torch.zeros(5, dtype=torch.long))
    trace.compute_log_prob()
    logits = model.net.fc(a) + (0 if form == "tensor" else b)
    expected = logits.log_softmax(-1)[:, 0]
    torch.testing.assert_close(trace.nodes["obs"]["log_prob"], expected)


class TestPriors:
    def test_default_slab_is_as_wide_as_the_layer(self):
        net = mlp()
        with torch.no_grad():
            net[2].weight.mul_(10)
        model = BayesianNetwork(net)
        for name, weight in model.site_values().items():
            base = model.priors[name].base_dist
            torch.testing.assert_close(base.slab.scale.flatten()[0], weight.square().mean().sqrt())
            assert float(base.inclusion.flatten()[0]) == 0.5

    def test_default_prior_of_a_layer_of_zeros_is_proper(self):
        net = mlp()
        nn.init.zeros_(net[2].weight)
        model = BayesianNetwork(net)
        assert (model.priors["2.weight"].base_dist.slab.scale > 0).all()

    def test_by_name(self):
        def prior(name, weight):
            return dist.Normal(0.0, 1.0) if name == "0.weight" else scale_matched_prior(0.2)(name, weight)

        model = BayesianNetwork(mlp(), prior)
        assert isinstance(model.priors["0.weight"].base_dist, dist.Normal)
        assert isinstance(model.priors["2.weight"].base_dist, SpikeAndSlab)

    def test_one_distribution_a_weight(self):
        model = BayesianNetwork(mlp(), lambda name, w: dist.Normal(w.detach(), 0.1))
        assert model.priors["0.weight"].event_shape == (8, 4)

    def test_prior_over_vectors_is_an_error(self):
        with pytest.raises(NetworkError, match=r"prior of '0.weight' has event shape \(2,\)"):
            BayesianNetwork(mlp(), dist.Normal(torch.zeros(2), 1.0).to_event(1))

    def test_repr_says_sites_shapes_and_priors(self):
        text = repr(BayesianNetwork(mlp(), SpikeAndSlab(0.25, dist.Normal(0.0, 0.1)), num_data=1234))
        assert "Sequential" in text and "num_data=1234" in text and "2 sites, 56 of 67 parameters" in text
        for part in ("0.weight", "2.weight", "(8, 4)", "(3, 8)", "SpikeAndSlab(0.25, Normal(0, 0.1))"):
            assert part in text

    @pytest.mark.parametrize("prior", [None, SpikeAndSlab(0.25, dist.Normal(0.0, 0.1)), dist.Laplace(0.0, 1.0)])
    def test_to_double_moves_priors(self, prior):
        model = BayesianNetwork(mlp(), prior, num_data=5)
        single = {name: p.log_prob(model.site_values()[name]) for name, p in model.priors.items()}
        model.to(torch.float64)
        for name, p in model.priors.items():
            value = model.site_values()[name]
            assert value.dtype == p.sample().dtype == p.log_prob(value).dtype == torch.float64
            torch.testing.assert_close(p.log_prob(value).float(), single[name])
        trace = run(model, torch.randn(5, 4, dtype=torch.float64), torch.zeros(5, dtype=torch.long))
        assert trace.nodes["logits"]["value"].dtype == torch.float64

    def test_moving_one_network_leaves_a_shared_prior_alone(self):
        prior = SpikeAndSlab(torch.tensor(0.5), dist.Normal(torch.tensor(0.0), torch.tensor(1.0)))
        BayesianNetwork(mlp(), prior).to(torch.float64)
        assert prior.sample().dtype == torch.float32

    def test_deepcopy(self):
        model = BayesianNetwork(mlp(), num_data=5)
        twin = copy.deepcopy(model)
        assert twin.net[0].weight is not model.net[0].weight
        twin(torch.randn(5, 4), torch.zeros(5, dtype=torch.long))


class TestBadNetworks:
    def test_weights_with_nan(self):
        net = mlp()
        with torch.no_grad():
            net[0].weight[0, 0] = float("nan")
        with pytest.raises(NetworkError, match=r"'0.weight' has 1 values of 32 that are NaN"):
            BayesianNetwork(net)

    def test_no_compressible_layer(self):
        with pytest.raises(NetworkError, match="no compressible layer"):
            BayesianNetwork(nn.Sequential(nn.ReLU()))

    def test_refusal_leaves_the_network_trainable(self):
        net = mlp()
        with pytest.raises(NetworkError):
            BayesianNetwork(net, dist.Normal(torch.zeros(2), 1.0).to_event(1))
        assert all(p.requires_grad for p in net.parameters())


class TestCatalogue:
    @pytest.mark.parametrize(
        ("name", "options", "shape"),
        [
            ("digits_net", {"width": 4}, (2, 1, 8, 8)),
            ("resnet20", {"in_channels": 1}, (2, 1, 16, 16)),
            ("resnet32", {}, (2, 3, 16, 16)),
            ("resnet44", {}, (2, 3, 16, 16)),
            ("resnet56", {}, (2, 3, 16, 16)),
            ("resnet18", {"stem": "cifar", "num_classes": 5}, (2, 3, 16, 16)),
            ("resnet50", {"stem": "cifar", "num_classes": 5}, (2, 3, 16, 16)),
        ],
    )
    def test_every_network_is_a_model_in_one_call(self, name, options, shape):
        prior = SpikeAndSlab(0.3, dist.Normal(0.0, 0.1))
        model = getattr(models, name)(prior=prior, num_data=77, exclude=["^fc"], **options)
        assert isinstance(model, BayesianNetwork) and model.num_data == 77
        assert "fc.weight" not in model.site_values()
        assert model.net.network_spec == {"name": name, "options": options}
        assert "SpikeAndSlab(0.3, Normal(0, 0.1))" in repr(model)
        with torch.no_grad():
            trace = poutine.trace(model.eval()).get_trace(torch.randn(shape))
        assert trace.nodes["logits"]["value"].shape == (2, options.get("num_classes", 10))

    def test_unknown_option(self):
        with pytest.raises(RecipeError, match="has no option 'depth'"):
            models.resnet20(depth=3)

    def test_is_documented(self):
        assert models.resnet20.__name__ == "resnet20" and "resnet20" in models.resnet20.__doc__
        assert pyro.get_param_store().keys() == {}.keys()
