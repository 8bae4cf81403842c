"""How good a classifier is, and how far its probabilities can be trusted."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sqs_pyro.errors import DataError
from sqs_pyro.inference.input_checks import check_labels
from sqs_pyro.network_io import device_of, move_to, predictions

_CALIBRATION_BINS = 15

#: How good a network is on a loader: a figure of at most 1, the higher the better.
Judge: TypeAlias = Callable[[nn.Module, Any], float]


@dataclass(frozen=True)
class Evaluation:
    """A classifier on a data set.

    Attributes:
        accuracy: share of examples whose most probable class is right, 0..1.
        nll: mean negative log-likelihood of the labels, nats.
        ece: expected calibration error of the top class, 15 equal bins, 0..1.
        brier: mean squared distance between probabilities and the one-hot label, 0..2.
        entropy: mean entropy of the predicted classes, nats: how unsure the classifier is.
        num_examples: examples evaluated.
    """

    accuracy: float
    nll: float
    ece: float
    brier: float
    entropy: float
    num_examples: int


def evaluate(net: nn.Module, loader: Iterable[Any]) -> Evaluation:
    """Evaluate ``net`` (any module from a minibatch to logits ``[B, C]``) in evaluation mode.

    Raises:
        DataError: the loader is empty, or labels do not fit the network's classes.
    """
    return summarise(*predict(net, loader))


def accuracy(net: nn.Module, loader: Iterable[Any]) -> float:
    """Share of examples whose most probable class is right; errors as :func:`evaluate`."""
    return evaluate(net, loader).accuracy


@torch.no_grad()
def predict(net: nn.Module, loader: Iterable[Any]) -> tuple[Tensor, Tensor]:
    """Log-probabilities ``[n, C]`` and labels ``[n]`` of all examples, ``net`` in evaluation mode.

    Raises:
        DataError: the loader is empty.
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
    if not labels:
        raise DataError("There is no example to evaluate on: the loader is empty.")
    return torch.cat(log_probs), torch.cat(labels).long()


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


def summarise(log_p: Tensor, y: Tensor) -> Evaluation:
    """Sum up predictions.

    Args:
        log_p: log-probabilities ``[n, C]``.
        y: labels ``[n]``.

    Raises:
        DataError: labels do not fit the number of classes.
    """
    classes = log_p.shape[-1]
    check_labels(y, classes)
    p = log_p.exp()
    return Evaluation(
        accuracy=float((log_p.argmax(-1) == y).double().mean()),
        nll=float(F.nll_loss(log_p.double(), y)),
        ece=expected_calibration_error(p, y),
        brier=float((p - F.one_hot(y, classes)).square().sum(-1).mean()),
        entropy=float(torch.special.entr(p).sum(-1).mean()),
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
