"""Distributions of labels: classes with some left out, probabilities of classes, several classes at once."""

from collections.abc import Sequence
from typing import Any, ClassVar

import pyro.distributions as dist
import torch
from pyro.distributions import TorchDistribution
from torch import Tensor
from torch.distributions import constraints
from torch.nn.functional import binary_cross_entropy_with_logits, one_hot

_AT_ONCE = 1 << 22  # values of distribution functions


class _ClassOrIgnored(constraints.integer_interval):
    """Integers from 0 to C - 1, and one that stands for no label."""

    def __init__(self, classes: int, ignored: int) -> None:
        self.ignored = ignored
        super().__init__(0, classes - 1)

    def check(self, value: Tensor) -> Tensor:
        # In place of -100 the base class would see a class out of range.
        return super().check(value) | (value == self.ignored)


class _ShareOrIgnored(constraints.Constraint):
    """Numbers from 0 to 1, and one that stands for no label."""

    is_discrete = True

    def __init__(self, ignored: int) -> None:
        self.ignored = ignored
        super().__init__()

    def check(self, value: Tensor) -> Tensor:
        return constraints.unit_interval.check(value) | (value == self.ignored)


def drawn_classes(probabilities: Tensor, draws: int) -> Tensor:
    """Return classes drawn by their probabilities, int64 ``[draws, n]``: the inverse of the distribution function.

    It takes one uniform number a draw, where `torch.multinomial` takes an exponential one for each class.

    Args:
        probabilities: ``[n, C]``, rows with a positive sum.
        draws: of each row.
    """
    # float64, which has a place for the least probable of a large vocabulary; MPS has none.
    dtype = torch.float32 if probabilities.device.type == "mps" else torch.float64
    found = []
    for rows in probabilities.split(max(1, _AT_ONCE // probabilities.shape[-1])):
        reached = rows.cumsum(-1, dtype=dtype)  # [rows, C]
        # Of [0, 1): below the last sum, but for a product that is rounded up to it, and then behind all classes.
        uniform = torch.rand(len(rows), draws, dtype=dtype, device=rows.device)
        drawn = torch.searchsorted(reached, uniform * reached[:, -1:], right=True)
        found.append(drawn.clamp_(max=rows.shape[-1] - 1))
    return torch.cat(found).T


class ClassLabels(dist.Categorical):
    """A categorical in which one value is no label: it has log-probability 0 and is never drawn.

    Args:
        logits: ``[..., C]``.
        ignore_index: the value.
        weights: ``[C]``, powers of the classes' probabilities in :meth:`log_prob`, or None.
    """

    def __init__(
        self, logits: Tensor, ignore_index: int, weights: Tensor | None = None, validate_args: bool | None = None
    ) -> None:
        self.ignore_index, self.weights = ignore_index, weights
        super().__init__(logits=logits, validate_args=validate_args)

    def expand(self, batch_shape: Sequence[int], _instance: Any = None) -> "ClassLabels":
        """Return the same distribution with a larger batch."""
        new = self._get_checked_instance(ClassLabels, _instance)
        # Before the base class fills in the rest: it does not know these.
        new.ignore_index, new.weights = self.ignore_index, self.weights
        return super().expand(batch_shape, new)

    @constraints.dependent_property(is_discrete=True, event_dim=0)
    def support(self) -> constraints.Constraint:
        """Return the classes, and the value that is none."""
        return _ClassOrIgnored(self._num_events, self.ignore_index)

    def sample(self, sample_shape: Sequence[int] = ()) -> Tensor:
        """Return classes, int64 ``[*sample, ...]``."""
        shape = torch.Size(sample_shape)
        with torch.no_grad():
            rows = self.probs.reshape(-1, self._num_events)
            return drawn_classes(rows, shape.numel()).reshape(self._extended_shape(shape))

    def log_prob(self, value: Tensor) -> Tensor:
        """Return ``[*sample, ...]``; 0 where there is no label."""
        if self._validate_args:
            self._validate_sample(value)
        ignored = value == self.ignore_index
        # Any class: its log-probability is replaced by 0, and -100 is no index.
        known = value.masked_fill(ignored, 0)
        found = super().log_prob(known)
        if self.weights is not None:
            # p^w is not normalised over classes, exactly as torch's weighted cross-entropy.
            found = found * self.weights[known.long()]
        return found.masked_fill(ignored, 0.0)


class ClassProbabilities(TorchDistribution):
    """Probabilities of classes as an observation: ``Σ_c y_c log softmax(z)_c``, the cross-entropy's negative.

    Args:
        logits: z, ``[..., C]``; batch shape ``[...]``, event shape ``[C]``.
        weights: ``[C]``, factors of the terms, or None.
    """

    arg_constraints: ClassVar[dict[str, constraints.Constraint]] = {"logits": constraints.real_vector}
    support = constraints.simplex

    def __init__(self, logits: Tensor, weights: Tensor | None = None, validate_args: bool | None = None) -> None:
        self.logits, self.weights = logits, weights
        # batch_shape [...], event_shape [C]: one observation is all probabilities of an example.
        super().__init__(logits.shape[:-1], logits.shape[-1:], validate_args=validate_args)

    def log_prob(self, value: Tensor) -> Tensor:
        """Return ``[*sample, ...]``."""
        if self._validate_args:
            self._validate_sample(value)
        weighted = value if self.weights is None else value * self.weights
        return (weighted * self.logits.log_softmax(-1)).sum(-1)

    def sample(self, sample_shape: Sequence[int] = ()) -> Tensor:
        """Return a class drawn by its probability as one-hot, ``[*sample, ..., C]``."""
        with torch.no_grad():
            drawn = torch.distributions.Categorical(logits=self.logits).sample(torch.Size(sample_shape))
            return one_hot(drawn, self.logits.shape[-1]).to(self.logits.dtype)

    def expand(self, batch_shape: Sequence[int], _instance: Any = None) -> "ClassProbabilities":
        """Return the same distribution with a larger batch."""
        logits = self.logits.expand(*batch_shape, self.logits.shape[-1])
        return ClassProbabilities(logits, self.weights, validate_args=self._validate_args)


class SeveralLabels(dist.Bernoulli):
    """Ones and zeros, or shares between, of which one other value is no label: it has log-probability 0.

    Args:
        logits: ``[...]``.
        ignore_index: the value.
        pos_weight: power of the probability of a one in :meth:`log_prob`, or None.
    """

    def __init__(
        self,
        logits: Tensor,
        ignore_index: int,
        pos_weight: Tensor | None = None,
        validate_args: bool | None = None,
    ) -> None:
        self.ignore_index, self.pos_weight = ignore_index, pos_weight
        super().__init__(logits=logits, validate_args=validate_args)

    def expand(self, batch_shape: Sequence[int], _instance: Any = None) -> "SeveralLabels":
        """Return the same distribution with a larger batch."""
        new = self._get_checked_instance(SeveralLabels, _instance)
        new.ignore_index, new.pos_weight = self.ignore_index, self.pos_weight
        return super().expand(batch_shape, new)

    @constraints.dependent_property(is_discrete=True, event_dim=0)
    def support(self) -> constraints.Constraint:
        """From 0 to 1, and the value that is no label."""
        return _ShareOrIgnored(self.ignore_index)

    def log_prob(self, value: Tensor) -> Tensor:
        """Return ``[*sample, ...]``; 0 where there is no label."""
        if self._validate_args:
            self._validate_sample(value)
        ignored = value == self.ignore_index
        # Of the logits' type: integer labels are as welcome as shares.
        known = value.masked_fill(ignored, 0).to(self.logits.dtype)
        logits, known = torch.broadcast_tensors(self.logits, known)
        found = -binary_cross_entropy_with_logits(logits, known, reduction="none", pos_weight=self.pos_weight)
        return found.masked_fill(ignored, 0.0)
