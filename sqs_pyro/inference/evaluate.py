"""How good a classifier is, and how far its probabilities can be trusted."""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import pyro
import torch
from pyro.infer import Predictive
from torch import Tensor, nn
from torch.nn import functional as F

from sqs_pyro.errors import DataError
from sqs_pyro.inference.guide import SpikeGMMGuide
from sqs_pyro.inference.input_checks import check_labels
from sqs_pyro.network_io import device_of, move_to, predictions

_CALIBRATION_BINS = 15


@dataclass(frozen=True)
class Evaluation:
    """A classifier on a data set.

    Attributes:
        accuracy: share of examples whose most probable class is right, 0..1.
        nll: mean negative log-likelihood of the labels, nats.
        ece: expected calibration error of the top class, 15 equal bins, 0..1.
        brier: mean squared distance between probabilities and the one-hot label, 0..2.
        num_examples: examples evaluated.
    """

    accuracy: float
    nll: float
    ece: float
    brier: float
    num_examples: int


@torch.no_grad()
def evaluate(net: nn.Module, loader: Iterable[Any]) -> Evaluation:
    """Evaluate ``net`` (any module from a minibatch to logits ``[B, C]``) in evaluation mode.

    Raises:
        DataError: the loader is empty, or labels do not fit the network's classes.
    """
    device = device_of(net)
    was_training = net.training
    net.eval()
    try:
        log_probs, labels = [], []
        for x, y in loader:
            log_probs.append(predictions(net, move_to(x, device)).float().log_softmax(-1))
            labels.append(y.to(device))
    finally:
        net.train(was_training)
    return _summarise(log_probs, labels)


@torch.no_grad()
def largest_difference(first: nn.Module, second: nn.Module, loader: Iterable[Any]) -> float:
    """Largest absolute difference between two networks' predictions, over all examples of a loader.

    Both run in evaluation mode on the device of ``first``.
    """
    device = device_of(first)
    modes = first.training, second.training
    first.eval(), second.eval()
    try:
        differences = [
            (predictions(first, move_to(x, device)) - predictions(second, move_to(x, device))).abs().max()
            for x, _ in loader
        ]
    finally:
        first.train(modes[0]), second.train(modes[1])
    return float(torch.stack(differences).max())


@torch.no_grad()
def evaluate_averaged(
    model: nn.Module,
    guide: SpikeGMMGuide,
    loader: Iterable[Any],
    num_samples: int = 20,
    temperature: float | None = None,
) -> Evaluation:
    """Evaluate the Bayesian average over networks drawn from the guide.

    The same ``num_samples`` discrete networks (gates and codes drawn once) answer every minibatch; their
    probabilities are averaged.

    Args:
        model: the Bayesian network; its ``"logits"`` site is averaged.
        guide: its guide.
        loader: minibatches.
        num_samples: networks to draw.
        temperature: τ of the draws; by default the guide's ``evaluation_temperature``.
    """
    device = device_of(model)
    states = model.training, guide.training, guide.evaluation_temperature
    model.eval()
    guide.eval()
    guide.evaluation_temperature = temperature or guide.evaluation_temperature
    try:
        with pyro.get_param_store().scope():  # the parameters stay in the modules
            networks = Predictive(guide, num_samples=num_samples, return_sites=None)()
            predictive = Predictive(model, posterior_samples=networks, return_sites=("logits",))
            log_probs, labels = [], []
            for x, y in loader:
                logits = predictive(move_to(x, device))["logits"].reshape(num_samples, len(y), -1).float()
                log_probs.append(logits.log_softmax(-1).logsumexp(0) - math.log(num_samples))
                labels.append(y.to(device))
    finally:
        model.train(states[0])
        guide.train(states[1])
        guide.evaluation_temperature = states[2]
    return _summarise(log_probs, labels)


def _summarise(log_probs: list[Tensor], labels: list[Tensor]) -> Evaluation:
    if not labels:
        raise DataError("There is no example to evaluate on: the loader is empty.")
    log_p, y = torch.cat(log_probs), torch.cat(labels).long()
    classes = log_p.shape[-1]
    check_labels(y, classes)
    p = log_p.exp()
    return Evaluation(
        accuracy=float((log_p.argmax(-1) == y).double().mean()),
        nll=float(F.nll_loss(log_p.double(), y)),
        ece=expected_calibration_error(p, y),
        brier=float((p - F.one_hot(y, classes)).square().sum(-1).mean()),
        num_examples=len(y),
    )


def expected_calibration_error(probabilities: Tensor, labels: Tensor, bins: int = _CALIBRATION_BINS) -> float:
    """``Σ_b (n_b / n) |accuracy_b - confidence_b|`` over equal bins of the top class's probability.

    Guo et al. 2017, equation 5. (torchmetrics has it too, but importing that takes seconds, because it imports
    transformers; it is the reference in the tests.)

    Args:
        probabilities: ``[n, C]``.
        labels: ``[n]``.
        bins: number of bins of equal width, closed on the right.
    """
    confidence, predicted = probabilities.double().max(-1)
    surplus = confidence - (predicted == labels).double()
    bin_of = (confidence * bins).ceil().clamp(1, bins).long() - 1
    return float(torch.bincount(bin_of, weights=surplus, minlength=bins).abs().sum() / len(labels))
