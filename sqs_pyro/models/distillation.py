r"""Distillation as a likelihood: besides its label, an example is observed through the original network's opinion.

With logits z, label y, and the teacher's probabilities ``p_T = softmax(z* / T)``,

    log p(y, p_T | z) = (1 - w) log softmax(z)_y + w T² Σ_c p_Tc log softmax(z / T)_c,

the loss of Hinton, Vinyals & Dean (2015): two observations whose powers w and 1 - w share one example's weight.
"""

from collections.abc import Iterator, Sequence
from typing import Any, ClassVar

import torch
from pyro.distributions import TorchDistribution, Unit
from pyro.distributions import constraints as pyro_constraints
from torch import Tensor, nn
from torch.distributions import constraints, kl_divergence
from torch.nn.functional import one_hot

from sqs_pyro.errors import DataError, NetworkError
from sqs_pyro.models.likelihoods import Categorical, categorical
from sqs_pyro.models.observation import Likelihood, examples_of
from sqs_pyro.networks.calling import device_of, move_to, output_tensor, predictions
from sqs_pyro.networks.minibatches import minibatches


class _OpinionOrNothing(constraints.Constraint):
    """Probabilities ``[C]``, or zeros where there is no label."""

    event_dim = 1

    def check(self, value: Tensor) -> Tensor:
        # Without the zeros validation would reject every batch in which a token is padding.
        return constraints.simplex.check(value) | (value == 0).all(-1)


class DistilledCategorical(TorchDistribution):
    """Distribution of a label and of what a teacher thinks, ``batch_shape [...]``, ``event_shape [2, C]``.

    A value has the label, one-hot, in its first row, and the teacher's probabilities at the temperature in its
    second; both are zeros where a label is left out. A sample draws both from this network's own opinion.

    Args:
        logits: z, ``[..., C]``.
        weight: w, from 0 to 1.
        temperature: T.
    """

    arg_constraints: ClassVar[dict[str, constraints.Constraint]] = {"logits": constraints.real_vector}
    support = pyro_constraints.independent(_OpinionOrNothing(), 1)

    def __init__(
        self, logits: Tensor, weight: float, temperature: float, validate_args: bool | None = None
    ) -> None:
        self.logits, self.weight, self.temperature = logits, weight, temperature
        # One event: label and opinion are of one example, whose plate and scale they share.
        shape = torch.Size([2, logits.shape[-1]])
        super().__init__(logits.shape[:-1], shape, validate_args=validate_args)

    def log_prob(self, value: Tensor) -> Tensor:
        """Return ``[*sample, ...]``."""
        if self._validate_args:
            self._validate_sample(value)
        own = self.logits.log_softmax(-1)
        soft = (self.logits / self.temperature).log_softmax(-1)
        of_label = (value[..., 0, :] * own).sum(-1)
        of_teacher = (value[..., 1, :] * soft).sum(-1)
        # Gradients of soft targets shrink with 1/T²; the factor keeps both parts comparable as T changes.
        return (1 - self.weight) * of_label + self.weight * self.temperature**2 * of_teacher

    def sample(self, sample_shape: Sequence[int] = ()) -> Tensor:
        """Return ``[*sample, ..., 2, C]``."""
        with torch.no_grad():
            rows = torch.stack([self.logits, self.logits / self.temperature], -2)  # [..., 2, C]
            drawn = torch.distributions.Categorical(logits=rows).sample(torch.Size(sample_shape))
            return one_hot(drawn, self.logits.shape[-1]).to(self.logits.dtype)

    def expand(self, batch_shape: Sequence[int], _instance: Any = None) -> "DistilledCategorical":
        """Return the same distribution with a larger batch."""
        logits = self.logits.expand(*batch_shape, self.logits.shape[-1])
        return DistilledCategorical(logits, self.weight, self.temperature, validate_args=self._validate_args)


class DistillationLikelihood:
    """From a network's output to :class:`DistilledCategorical`, a likelihood of ``BayesianNetwork``.

    As with :func:`~sqs_pyro.models.likelihoods.categorical`, tokens of a sequence are one event.

    Args:
        weight: w, from 0 to 1.
        temperature: T.
        class_axis: the dimension of the logits that holds the classes.
    """

    def __init__(self, weight: float, temperature: float, class_axis: int = -1) -> None:
        self.weight, self.temperature, self.class_axis = weight, temperature, class_axis

    def __call__(self, output: Any) -> TorchDistribution:
        """Return the observation's distribution, batch shape ``[B]``."""
        logits = output_tensor(output).float().movedim(self.class_axis, -1)
        return DistilledCategorical(logits, self.weight, self.temperature).to_event(logits.dim() - 2)


class TaughtBy:
    r"""What another network says, observed as a whole distribution instead of a drawn label.

    A likelihood of ``BayesianNetwork`` whose observations are the teacher's outputs: ``E_{y ~ p*} log p(y | x)``
    without the entropy of p*, a constant: ``-KL(p* ‖ p)``.

    Args:
        likelihood: from either network's output to a distribution of which torch knows the divergence.
    """

    def __init__(self, likelihood: Likelihood) -> None:
        self.likelihood = likelihood

    def __call__(self, output: Any) -> TorchDistribution:
        """Return the distribution of what would be observed, batch shape ``[B]``."""
        return self.likelihood(output)

    def settle(self, output: Any, y: Any) -> "TaughtBy":
        """Return itself: nothing is open."""
        return self

    def observe(self, output: Any, y: Any) -> tuple[TorchDistribution, Tensor]:
        """Return a factor for each example, and nothing as its value; ``y`` is the teacher's output."""
        divergence = self.divergence(output, y)
        return Unit(-divergence), divergence.new_empty(len(divergence), 0)

    def divergence(self, output: Any, y: Any) -> Tensor:
        """Return ``KL(p* ‖ p)`` of each example, nats, ``[B]``."""
        return kl_divergence(examples_of(self.likelihood(y)), examples_of(self.likelihood(output)))


class DistilledLoader:
    """Minibatches of a loader with the teacher's opinion beside each label.

    Args:
        loader: of ``(x, y)``, labels of any form that the likelihood reads.
        teacher: the network whose opinion is asked, in evaluation mode.
        temperature: T.
        dtype: the teacher multiplies in, under autocast; None leaves it alone.
        likelihood: reads the labels.

    Yields:
        ``(x, value)``, values ``[B, ..., 2, C]`` of :class:`DistilledCategorical`, zeros where no label is.

    Raises:
        DataError: a label is none of the teacher's classes.
        NetworkError: the likelihood has class weights, which an opinion has not.
    """

    def __init__(
        self,
        loader: Any,
        teacher: nn.Module,
        temperature: float,
        dtype: torch.dtype | None = None,
        likelihood: Categorical = categorical,
    ) -> None:
        if likelihood.class_weights is not None:
            raise NetworkError("Distillation knows no class_weights: leave out the weights, or distillation.")
        self.loader, self.teacher, self.temperature, self.dtype = loader, teacher, temperature, dtype
        self.likelihood = likelihood
        # Whoever asks a loader for its number of examples finds it here as well.
        self.dataset = loader.dataset

    def __len__(self) -> int:
        return len(self.loader)

    @property
    def epoch(self) -> int:
        """The inner loader's, on which the order of its minibatches depends."""
        return int(getattr(self.loader, "epoch", 0))

    @epoch.setter
    def epoch(self, value: int) -> None:
        if hasattr(self.loader, "epoch"):
            self.loader.epoch = value

    def __iter__(self) -> Iterator[tuple[Any, Tensor]]:
        device = device_of(self.teacher)
        for x, y in minibatches(self.loader, self.teacher, "training"):
            x, y = move_to(x, device), y.to(device)
            with torch.no_grad(), torch.autocast(device.type, self.dtype, enabled=self.dtype is not None):
                # Half precision ends here: its few digits would blur the opinion on improbable classes.
                logits = predictions(self.teacher, x).float()
            # Of the teacher's logits: both networks have the same output, and so the same place of the classes.
            self.likelihood = self.likelihood.settle(logits, y)
            rows, labels = self.likelihood.rows(logits, y)
            opinion = (rows / self.temperature).softmax(-1)
            # Probabilities of classes as labels: every example has one.
            if labels.is_floating_point():
                yield x, torch.stack([labels.to(opinion.dtype), opinion], -2)
                continue
            known = labels != self.likelihood.ignore_index
            _check_labels(labels[known], rows.shape[-1])
            # A label that is left out is negative, which one_hot refuses: class 0 for a moment, all zeros below.
            both = torch.stack([one_hot(labels * known, rows.shape[-1]).float(), opinion], -2)
            yield x, both * known[..., None, None]


def _check_labels(y: Tensor, classes: int) -> None:
    if y.numel() and (int(y.min()) < 0 or int(y.max()) >= classes):
        raise DataError(
            f"Distillation needs labels from 0 to {classes - 1}, the teacher's classes, but labels from "
            f"{int(y.min())} to {int(y.max())} were given: use a network and data that belong together."
        )
