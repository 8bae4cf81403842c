"""The three predictors: against the same networks run one by one, and in their limits."""

import pyro
import pytest
import torch
from pyro.infer.autoguide import AutoDelta, AutoLowRankMultivariateNormal, init_to_value
from torch import nn

from sqs_pyro.errors import NetworkError, RecipeError
from sqs_pyro.evaluation.averaging import (
    AveragedNetwork,
    average_of_guide,
    averaged_network,
    choose_temperature,
    evaluate_averaged,
    mean_network,
)
from sqs_pyro.evaluation.classification import evaluate
from sqs_pyro.inference.guides.spike_gmm import SpikeGMMGuide
from sqs_pyro.models import BayesianNetwork
from sqs_pyro.shipping.pack import hard_network


def convolutional(classes: int = 4) -> nn.Sequential:
    net = nn.Sequential(
        nn.Conv2d(1, 8, 3, padding=1, bias=False),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Dropout(0.5),
        nn.Linear(8, classes),
    )
    with torch.no_grad():
        net[6].weight.mul_(5)
        net[1].running_mean.normal_()
        net[1].running_var.uniform_(0.5, 2)
    return net


def batches(n: int = 90, size: int = 20):
    x, y = torch.randn(n, 1, 6, 6), torch.randint(4, (n,))
    return list(zip(x.split(size), y.split(size), strict=True))


@pytest.fixture
def net():
    return convolutional()


def guide_of(net, **options):
    model = BayesianNetwork(net, num_data=10)
    return model, SpikeGMMGuide(model, 4, **{"estimator": "straight_through", **options})


def evaluations(evaluation):
    return {key: value for key, value in vars(evaluation).items() if key != "num_examples"}


@pytest.mark.parametrize("draws_at_once", [1, 2, 5])
def test_the_average_is_that_of_the_networks_probabilities(net, draws_at_once):
    draws = [{"0.weight": torch.randn(8, 1, 3, 3), "6.weight": torch.randn(4, 8)} for _ in range(5)]
    x, p = torch.randn(7, 1, 6, 6), 0.0
    average = AveragedNetwork(net, draws, draws_at_once)
    for draw in draws:
        one = convolutional()
        one.load_state_dict({**net.state_dict(), **draw})
        p = p + one.eval()(x).double().softmax(-1) / 5
    torch.testing.assert_close(average(x).exp().double(), p, atol=1e-6, rtol=1e-5)
    assert net.training  # and its own copy is not: dropout and batch norm would differ


def test_tied_weights_follow_their_draw():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False)
            self.second.weight = self.first.weight

        def forward(self, x):
            return {"logits": self.second(self.first(x))}

    w, x = torch.randn(4, 4), torch.randn(3, 4)
    expected = (x @ w.T @ w.T).log_softmax(-1)
    torch.testing.assert_close(AveragedNetwork(Tied(), [{"first.weight": w}])(x), expected)


def test_only_an_average_of_something():
    with pytest.raises(RecipeError, match="An average over 0 networks, 1 at once, is impossible"):
        AveragedNetwork(convolutional(), [])
    with pytest.raises(RecipeError, match="An average over 1 networks, 0 at once, is impossible"):
        AveragedNetwork(convolutional(), [{"6.weight": torch.randn(4, 8)}], 0)


@pytest.mark.parametrize("samples", [1, 3])
def test_cold_predictors_are_the_hard_network(net, samples):
    model, guide = guide_of(net, initial_gate=0.8)
    loader = batches()
    hard = evaluations(evaluate(hard_network(net, guide.harden(torch.float32)), loader))
    mean = evaluate(mean_network(net, guide, temperature=1e-5), loader)
    averaged = evaluate_averaged(model, guide, loader, samples, temperature=1e-5)
    assert evaluations(mean) == pytest.approx(hard, abs=1e-5)
    assert evaluations(averaged) == pytest.approx(hard, abs=1e-5)
    assert averaged.num_examples == 90


def test_the_average_of_many_draws_of_a_linear_network_is_near_its_mean():
    """Where the logits are linear in the weights and small, averaging probabilities is averaging weights."""
    net = nn.Linear(6, 4, bias=False)
    _, guide = guide_of(net, initial_gate=0.5)
    x = 0.05 * torch.randn(20, 6)
    average = averaged_network(net, guide, 400, temperature=2.0)
    mean = mean_network(net, guide, temperature=2.0)
    # The largest difference of 20 seeds is 1.4e-3 with 1500 draws, so of 400 twice that.
    torch.testing.assert_close(average(x), mean(x).log_softmax(-1), atol=4e-3, rtol=0)
    hard = hard_network(net, guide.harden(torch.float32))
    assert float((mean(x).log_softmax(-1) - hard(x).log_softmax(-1)).abs().max()) > 0.02  # far more than that


def test_warm_draws_spread_the_predictions(net):
    _, guide = guide_of(net, initial_gate=0.5)
    entropies = [
        evaluate(averaged_network(net, guide, 30, temperature=temperature), batches()).entropy
        for temperature in (1e-4, 1.0, 50.0)
    ]
    assert entropies == sorted(entropies) and entropies[2] > entropies[0] + 0.02


def test_statistics_of_each_draw(net):
    """Batch norm of every draw is as if that draw had been a network of its own."""
    _, guide = guide_of(net, initial_gate=0.5)
    data = batches()
    average = averaged_network(net, guide, 3, temperature=2.0, batch_norm_batches=len(data), loader=data)
    x = torch.cat([x for x, _ in data])
    weights, means = average.get_buffer("0/weight"), average.get_buffer("1/running_mean")
    for s in range(3):
        seen = nn.functional.conv2d(x, weights[s], padding=1)
        torch.testing.assert_close(
            means[s], seen.mean((0, 2, 3)), atol=0.03, rtol=0
        )  # minibatches of 20 and of 10
    assert not torch.equal(means[0], means[1])


def test_evaluation_leaves_everything_as_it_was(net):
    model, guide = guide_of(net)
    model.train()
    guide.train()
    before = {name: value.clone() for name, value in net.state_dict().items()}
    evaluate_averaged(model, guide, batches(), num_samples=2, temperature=3.0)
    assert model.training and guide.training and guide.evaluation_temperature is None
    assert list(pyro.get_param_store()) == []
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())


def test_the_same_networks_answer_every_minibatch(net):
    model, guide = guide_of(net, initial_gate=0.5)
    x, y = batches(60, size=60)[0]
    results = []
    for loader in ([(x, y)], list(zip(x.split(7), y.split(7), strict=True))):
        torch.manual_seed(1)
        results.append(evaluate_averaged(model, guide, loader, num_samples=3, temperature=2.0))
    assert results[0].nll == pytest.approx(results[1].nll, rel=1e-5)


def test_the_temperature_of_the_smallest_nll_on_validation_data(net):
    """Where labels are the hard network's own every disturbance costs: the coldest wins. Wrong, the warmest."""
    _, guide = guide_of(net, initial_gate=0.5)
    hard = hard_network(net, guide.harden(torch.float32)).eval()
    with torch.no_grad():
        own = [(x, hard(x).argmax(-1)) for x, _ in batches()]
        wrong = [(x, hard(x).argmin(-1)) for x, _ in batches()]
    candidates = (0.01, 1.0, 100.0)
    assert choose_temperature(net, guide, own, candidates) == 0.01
    assert choose_temperature(net, guide, wrong, candidates) == 100.0
    with pytest.raises(RecipeError, match="no temperature to choose from"):
        choose_temperature(net, guide, own, ())


@pytest.mark.parametrize("average", [averaged_network, mean_network])
def test_of_another_network(average):
    _, guide = guide_of(nn.Sequential(nn.Linear(4, 6), nn.Linear(6, 3)))
    with pytest.raises(NetworkError, match=r"There is no '1\.weight' to take the"):
        average(nn.Sequential(nn.Linear(4, 6)), guide)
    with pytest.raises(NetworkError, match=r"of '0\.weight' has shape \[6, 4\], but the weights have \[5, 4\]"):
        average(nn.Sequential(nn.Linear(4, 5), nn.Linear(5, 3)), guide)


def test_draws_of_any_guide():
    """Of one that is certain they are its network, of others as far apart as it says."""
    net, (x, y) = convolutional(), batches()[0]
    model = BayesianNetwork(net, num_data=20)
    first = init_to_value(values=model.site_values())
    certain = AutoDelta(model, init_loc_fn=first)
    certain(x, y)
    expected = net.eval()(x).log_softmax(-1)
    torch.testing.assert_close(average_of_guide(model, certain, 2)(x), expected)
    spread = AutoLowRankMultivariateNormal(model, init_loc_fn=first, init_scale=0.3, rank=1)
    spread(x, y)
    average = average_of_guide(model, spread, 500)
    weights = torch.cat([draw.flatten(1) for draw in average.draws().values()], 1)
    covariance = spread.get_posterior().covariance_matrix.detach()
    assert float((weights.var(0) / covariance.diagonal() - 1).abs().max()) < 5 * (2 / 500) ** 0.5
    again = average_of_guide(model, spread, 3, seed=1)
    assert torch.equal(again(x), average_of_guide(model, spread, 3, seed=1)(x))
    with pytest.raises(RecipeError, match="num_samples is 0"):
        average_of_guide(model, spread, 0)


def test_draws_of_the_librarys_guide_are_those_of_predictive():
    model, guide = guide_of(convolutional(), initial_gate=0.5)
    x, _ = batches()[0]
    guide.evaluation_temperature = 2.0
    average = average_of_guide(model, guide.eval(), 3, seed=4)
    with pyro.get_param_store().scope():
        pyro.set_rng_seed(4)
        samples = pyro.infer.Predictive(guide, num_samples=3)()
    for name, drawn in average.draws().items():
        assert torch.equal(drawn, samples[name].reshape(drawn.shape))
    assert average(x).shape == (20, 4)
