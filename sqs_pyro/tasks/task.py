"""A task: what a network's output says of the targets, by which figures it is judged, which text it is about."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Generic, Protocol, TypeVar, runtime_checkable

from torch import Tensor, nn

from sqs_pyro.data.token_loader import TokenDataset
from sqs_pyro.evaluation.judging import Judge
from sqs_pyro.models.observation import Likelihood
from sqs_pyro.networks.loaders import Loader

T = TypeVar("T")
S = TypeVar("S")


@dataclass(frozen=True)
class Parts(Generic[T]):
    """What there is for training, for every choice, and for the final figures alone."""

    train: T
    validation: T
    test: T

    def each(self, function: Callable[[T], S]) -> "Parts[S]":
        """Return all three."""
        return Parts(function(self.train), function(self.validation), function(self.test))


class Judged(Protocol):
    """What training, choosing and reporting need to know of any task."""

    @property
    def headline(self) -> str:
        """The figure, at most 1, the higher the better, by which networks of this task are compared."""

    @property
    def likelihood(self) -> Likelihood:
        """From the network's output to the distribution of a minibatch's targets, batch shape ``[B]``."""

    def measure(self, net: nn.Module, loader: Loader) -> dict[str, Any]:
        """Return all figures of a network in evaluation mode on a loader that does not shuffle, as plain JSON."""


class Task(Judged, Protocol):
    """What a run needs to know of a task on text."""

    @property
    def name(self) -> str:
        """A key of :data:`sqs_pyro.networks.task_networks.AUTO_CLASSES`."""

    @property
    def network_options(self) -> dict[str, Any]:
        """What a network's configuration must say for this task."""

    def datasets(self, tokenizer: Any) -> Parts[TokenDataset]:
        """Return its examples as tokens and targets."""

    def observed(self, datasets: Parts[TokenDataset], net: nn.Module) -> Parts[TokenDataset]:
        """Return the same, where targets are what the fp32 network says; others come back as they are."""


@runtime_checkable
class Scored(Judged, Protocol):
    """A task whose headline figure is had without all others, and may be better the less of it there is."""

    higher_is_better: bool

    def score(self, net: nn.Module, loader: Loader) -> float:
        """Return the figure, or what is at most 1, the higher the better, in its place."""


def judge(task: Judged) -> Judge:
    """Return the task's headline figure alone, the higher the better."""
    if isinstance(task, Scored):
        return task.score
    return lambda net, loader: float(task.measure(net, loader)[task.headline])


def lost(task: Judged, before: Mapping[str, Any], after: Mapping[str, Any]) -> float:
    """Return how much of the headline figure is lost between two measurements; below zero: nothing is."""
    change = float(before[task.headline] - after[task.headline])
    return -change if isinstance(task, Scored) and not task.higher_is_better else change


def loss(task: Judged) -> Callable[[Tensor, Tensor], Tensor]:
    """Return the task's negative log-likelihood, nats an example, from predictions and targets."""
    return lambda predictions, targets: -task.likelihood(predictions).log_prob(targets).mean()
