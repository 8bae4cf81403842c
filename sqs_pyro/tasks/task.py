"""A task: what a network's output says of the targets, by which figures it is judged, which text it is about."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Generic, Protocol, TypeVar

from torch import Tensor, nn

from sqs_pyro.data.token_loader import TokenDataset
from sqs_pyro.evaluation.judging import Judge
from sqs_pyro.models.likelihoods import Likelihood

T = TypeVar("T")
S = TypeVar("S")


@dataclass(frozen=True)
class Parts(Generic[T]):
    """What there is for training, for every choice, and for the final figures alone."""

    train: T
    validation: T
    test: T

    def each(self, function: Callable[[T], S]) -> "Parts[S]":
        """The same of all three."""
        return Parts(function(self.train), function(self.validation), function(self.test))


class Judged(Protocol):
    """What training, choosing and reporting need to know of any task."""

    @property
    def headline(self) -> str:
        """The figure, at most 1, the higher the better, by which networks of this task are compared."""

    @property
    def likelihood(self) -> Likelihood:
        """From the network's output to the distribution of a minibatch's targets, batch shape ``[B]``."""

    def measure(self, net: nn.Module, loader: Any) -> dict[str, Any]:
        """All figures of a network in evaluation mode on a loader that does not shuffle, as plain JSON."""


class Task(Judged, Protocol):
    """What a run needs to know of a task on text."""

    @property
    def name(self) -> str:
        """A key of :data:`sqs_pyro.networks.task_networks.AUTO_CLASSES`."""

    @property
    def network_options(self) -> dict[str, Any]:
        """What a network's configuration must say for this task."""

    def datasets(self, tokenizer: Any) -> Parts[TokenDataset]:
        """Its examples as tokens and targets."""

    def observed(self, datasets: Parts[TokenDataset], net: nn.Module) -> Parts[TokenDataset]:
        """The same, where targets are what the fp32 network says; others come back as they are."""


def judge(task: Judged) -> Judge:
    """The task's headline figure alone."""
    return lambda net, loader: float(task.measure(net, loader)[task.headline])


def loss(task: Judged) -> Callable[[Tensor, Tensor], Tensor]:
    """The task's negative log-likelihood, nats an example, from predictions and targets."""
    return lambda predictions, targets: -task.likelihood(predictions).log_prob(targets).mean()
