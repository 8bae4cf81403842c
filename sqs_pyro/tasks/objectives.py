"""What a network learns from the data that a recipe names: how it is trained, judged and told of."""

from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sqs_pyro.data import Data
from sqs_pyro.errors import NetworkError
from sqs_pyro.evaluation.classification import figures_of_classes, predict
from sqs_pyro.extras import needed_for
from sqs_pyro.models.likelihoods import Bernoulli, Categorical, LearnedGaussian, categorical
from sqs_pyro.models.observation import Likelihood
from sqs_pyro.networks.loaders import Loader
from sqs_pyro.tasks.outputs import outputs
from sqs_pyro.tasks.task import Judged, loss

Loss = Callable[[Tensor, Tensor], Tensor]


class Classes:
    """A class of each example; judged by accuracy."""

    headline = "accuracy"
    likelihood: Likelihood = categorical
    #: Of training in float32; None: what :func:`~sqs_pyro.compression.baseline.train_baseline` does by itself.
    loss: Loss | None = None

    def measure(self, net: nn.Module, loader: Loader) -> dict[str, Any]:
        """Return accuracy, NLL, calibration error and the like, and the bins of a reliability diagram."""
        return figures_of_classes(*predict(net, loader))

    def check(self, output: Tensor, data: Data) -> None:
        """Check that a network's output for two examples is logits ``[2, C]``."""
        _check_shape(output, (2, data.num_classes), f"the data has {data.num_classes} classes")


class Pixels(Classes):
    """A class of each pixel or token; judged by the mean over classes of intersection over union.

    Args:
        ignore_index: a label that counts for nothing.
    """

    headline = "mean_iou"

    def __init__(self, ignore_index: int) -> None:
        self.likelihood = self._classes = Categorical(ignore_index=ignore_index)

    def loss(self, output: Tensor, y: Tensor) -> Tensor:
        """Return the cross-entropy, mean over pixels or tokens; labels tell which dimension has the classes."""
        rows, labels = self._classes.rows(output, y)
        return F.cross_entropy(rows.flatten(0, -2), labels.flatten(), ignore_index=self._classes.ignore_index)

    def measure(self, net: nn.Module, loader: Loader) -> dict[str, Any]:
        """Return what there is of classes, and intersection over union, the mean of classes that occur."""
        log_p, labels = predict(net, loader, self.likelihood)
        return {
            self.headline: mean_iou(log_p.argmax(-1), labels, log_p.shape[-1]),
            **figures_of_classes(log_p, labels),
        }

    def check(self, output: Tensor, data: Data) -> None:
        """Check that one dimension of a network's output has the classes."""
        if output.dim() < 3 or data.num_classes not in output.shape[1:]:
            raise _misfit(output, f"the data has {data.num_classes} classes for each pixel or token")


class Labels:
    """Several labels at once; judged by the mean over labels of average precision."""

    headline = "average_precision"
    likelihood: Likelihood = Bernoulli()

    @property
    def loss(self) -> Loss:
        """Of training in float32."""
        return loss(self)

    def measure(self, net: nn.Module, loader: Loader) -> dict[str, Any]:
        """Return average precision over labels that occur, the share of labels that are right, NLL an example."""
        found, targets = outputs(net, loader)
        nll = F.binary_cross_entropy_with_logits(found.double(), targets.double(), reduction="none").sum(-1).mean()
        return {
            self.headline: average_precision(found, targets),
            "accuracy": float(((found > 0) == (targets > 0)).double().mean()),
            "nll": float(nll),
            "num_examples": len(targets),
        }

    def check(self, output: Tensor, data: Data) -> None:
        """Check that a network's output for two examples is logits ``[2, L]``."""
        _check_shape(output, (2, data.num_classes), f"the data has {data.num_classes} labels")


class Numbers:
    """Real numbers; judged by R².

    Args:
        std: of the targets before they were standardised, ``[T]``; errors are told in their units.
    """

    headline = "r2"

    def __init__(self, std: Tensor) -> None:
        self.std = std

    @property
    def likelihood(self) -> Likelihood:
        """A normal distribution whose noise is learned."""
        return LearnedGaussian()

    @property
    def loss(self) -> Loss:
        """Mean squared error: of noise that is not learned there is no more to say."""
        return lambda output, y: F.mse_loss(output.reshape(y.shape), y)

    def measure(self, net: nn.Module, loader: Loader) -> dict[str, Any]:
        """Return R², mean over targets, and in their units the root mean square error and mean absolute error."""
        found, y = outputs(net, loader)
        y = y.reshape(len(y), -1).double()
        error = found.reshape(y.shape).double() - y
        spread = (y - y.mean(0)).square().sum(0)
        r2 = 1 - error.square().sum(0) / spread.clamp(min=torch.finfo(torch.float64).tiny)
        in_units = error * self.std
        return {
            self.headline: float(r2.mean()),
            "rmse": float(in_units.square().mean().sqrt()),
            "mae": float(in_units.abs().mean()),
            "num_examples": len(y),
        }

    def check(self, output: Tensor, data: Data) -> None:
        """Check that a network's output for two examples is numbers ``[2, T]``, or ``[2]`` of one."""
        shape = (2,) if data.num_classes == 1 and output.dim() == 1 else (2, data.num_classes)
        _check_shape(output, shape, f"the data has {data.num_classes} numbers to learn")


class Objective(Judged, Protocol):
    """What all of them have."""

    @property
    def loss(self) -> Loss | None:
        """Of training in float32; None: that of a classifier."""

    def check(self, output: Tensor, data: Data) -> None:
        """Check what a network gives for two examples; raises NetworkError."""


def objective(data: Data, ignore_index: int = -100) -> Objective:
    """Return what is learned from data, by its ``task``."""
    if data.task == "segmentation":
        return Pixels(ignore_index)
    if data.task == "multilabel":
        return Labels()
    if data.task == "regression":
        return Numbers(torch.tensor(data.about.get("target_std", [1.0]), dtype=torch.float64))
    return Classes()


def mean_iou(predicted: Tensor, labels: Tensor, classes: int) -> float:
    """Return intersection over union, ``TP / (TP + FP + FN)``, the mean over classes that are met or predicted.

    Args:
        predicted, labels: ``[n]``, from 0.
        classes: C.
    """
    confusion = torch.bincount(labels * classes + predicted, minlength=classes**2).view(classes, classes).double()
    met = confusion.diagonal()
    union = confusion.sum(0) + confusion.sum(1) - met
    return float((met / union)[union > 0].mean())


def average_precision(logits: Tensor, labels: Tensor) -> float:
    """Return average precision, the mean over labels that occur; scikit-learn's.

    Args:
        logits, labels: ``[n, L]``.
    """
    with needed_for("Figures of several labels"):
        from sklearn.metrics import average_precision_score  # heavy, and only needed here

    occur = (labels.sum(0) > 0).tolist()
    columns = [i for i, there in enumerate(occur) if there]
    if not columns:
        return 0.0
    each = [average_precision_score(labels[:, i].numpy(), logits[:, i].numpy()) for i in columns]
    return float(sum(each) / len(each))


def _check_shape(output: Tensor, expected: tuple[int, ...], why: str) -> None:
    if tuple(output.shape) != expected:
        raise _misfit(output, why)


def _misfit(output: Tensor, why: str) -> NetworkError:
    return NetworkError(
        f"The network gives outputs of shape {tuple(output.shape[1:])}, but {why}: correct the network's options, "
        "such as num_classes."
    )
