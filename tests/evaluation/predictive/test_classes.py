"""A classifier's uncertainty, heard draw by draw, against the same figures of its networks one by one."""

import copy

import pytest
import torch
from torch import nn

from sqs_pyro.errors import DataError, NetworkError
from sqs_pyro.evaluation.averaging import AveragedNetwork
from sqs_pyro.evaluation.classification import evaluate, predict
from sqs_pyro.evaluation.predictive.classes import evaluate_uncertainty
from sqs_pyro.evaluation.predictive.detection import auroc, mutual_information, predictive_entropy
from sqs_pyro.evaluation.predictive.draws import predict_each, predict_numbers
from sqs_pyro.evaluation.predictive.regression import evaluate_mixture
from sqs_pyro.models.likelihoods import Bernoulli, Gaussian


@pytest.fixture
def net():
    return nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Dropout(0.5), nn.Linear(8, 3))


@pytest.fixture
def draws():
    return [{"0.weight": torch.randn(8, 5), "3.weight": 3 * torch.randn(3, 8)} for _ in range(4)]


def batches(n: int = 50, shift: float = 0.0):
    x, y = torch.randn(n, 5) + shift, torch.randint(3, (n,))
    return list(zip(x.split(20), y.split(20), strict=True))


def networks(net, draws):
    for draw in draws:
        one = copy.deepcopy(net)
        one.load_state_dict({**net.state_dict(), **draw})
        yield one


@pytest.mark.parametrize("draws_at_once", [1, 3])
def test_each_draw_is_its_network(net, draws, draws_at_once):
    data = batches()
    log_p, labels = predict_each(AveragedNetwork(net, draws, draws_at_once), data)
    assert log_p.shape == (4, 50, 3) and torch.equal(labels, torch.cat([y for _, y in data]))
    for found, one in zip(log_p, networks(net, draws), strict=True):
        torch.testing.assert_close(found, predict(one, data)[0])


def test_the_first_draws_alone(net, draws):
    average = AveragedNetwork(net, draws)
    average.draws_used = 2
    x = torch.randn(7, 5)
    torch.testing.assert_close(average(x), AveragedNetwork(net, draws[:2])(x))
    assert average.each(x).shape == (2, 7, 3)


def test_figures_are_those_of_the_parts(net, draws):
    average, data, other = AveragedNetwork(net, draws), batches(), batches(30, shift=2.0)
    found = evaluate_uncertainty(average, data, {"shifted": other})
    assert vars(found.figures) == pytest.approx(vars(evaluate(average, data)), abs=1e-6)
    (inside, labels), (outside, _) = predict(average, data), predict(average, other)
    scores = predictive_entropy(inside), predictive_entropy(outside)
    assert found.entropy_auroc == {"shifted": pytest.approx(auroc(*scores))}
    scores = [mutual_information(predict_each(average, loader)[0]) for loader in (data, other)]
    assert found.information_auroc == {"shifted": pytest.approx(auroc(*scores))}
    assert float(found.risk_coverage.risk[-1]) == pytest.approx(1 - found.figures.accuracy)
    surest = inside.max(-1).values.argmax()
    assert float(found.risk_coverage.risk[0]) == float(inside[surest].argmax() != labels[surest])
    assert found.reliability.error == pytest.approx(found.figures.ece)


def test_a_single_network_has_no_information(net):
    data = batches()
    found = evaluate_uncertainty(net, data, {"shifted": batches(shift=2.0)})
    assert found.information_auroc == {} and set(found.entropy_auroc) == {"shifted"}
    assert vars(found.figures) == pytest.approx(vars(evaluate(net, data)), abs=1e-6) and net.training


def test_every_example_has_one_class(net):
    x, y = batches()[0]
    with pytest.raises(DataError, match="leave out examples without a label"):
        predict_each(net, [(x, y.masked_fill(y == 0, -100))])
    with pytest.raises(NetworkError, match=r"outputs of the shape \[20, 5, 3\]"):
        predict_each(nn.Sequential(nn.Unflatten(1, (5, 1)), nn.Linear(1, 3)), [(x, y)])


def test_numbers_with_the_noise_of_the_likelihood(net, draws):
    data = [(x, torch.randn(len(x), 3)) for x, _ in batches()]
    means, scales, y = predict_numbers(AveragedNetwork(net, draws), data, Gaussian(0.3))
    x = torch.cat([x for x, _ in data])
    torch.testing.assert_close(means, torch.stack([one.eval()(x) for one in networks(net, draws)]))
    assert means.shape == scales.shape == (4, 50, 3) and float(scales.min()) == pytest.approx(0.3)
    assert evaluate_mixture(means, scales, y).num_examples == 150
    assert predict_numbers(net, data)[0].shape == (1, 50, 3)


def test_numbers_of_another_likelihood_are_judged_by_samples(net):
    with pytest.raises(NetworkError, match="SeveralLabels is not normal: judge samples of it"):
        predict_numbers(net, [(x, torch.zeros(len(x), 3)) for x, _ in batches()], Bernoulli())
    with pytest.raises(DataError, match="the loader is empty"):
        predict_numbers(net, [])
