"""Likelihoods of classes: one of C, or several at once, and labels of any form as a value of them."""

import copy
from collections.abc import Sequence
from typing import Any

import pyro.distributions as dist
from torch import Tensor

from sqs_pyro.documents import shown
from sqs_pyro.errors import DataError, NetworkError
from sqs_pyro.models.label_distributions import ClassLabels, ClassProbabilities, SeveralLabels
from sqs_pyro.models.likelihoods.arguments import finite_numbers
from sqs_pyro.models.observation import examples_of, squeezed
from sqs_pyro.networks.calling import output_tensor
from sqs_pyro.networks.minibatches import IGNORED


def _label_to_ignore(given: Any) -> int:
    if isinstance(given, bool) or not isinstance(given, int):
        raise NetworkError(
            f"ignore_index is {given!r}, but must be a whole number: the label that counts for nothing, "
            f"{IGNORED} if there is none."
        )
    return given


class Categorical:
    """Classification: one of C classes for every example, or for every pixel or token of one.

    Logits are ``[B, C]`` with labels ``[B]``, or have more dimensions. Then classes are in dimension 1 if that
    leaves the labels' shape, ``[B, C, ...]`` as torch's own ``cross_entropy`` has it, and in the last if that
    does, ``[B, ..., C]`` as transformers' tokens have it. Where both do, ``class_axis`` must say.

    Labels are integers of any type (also ``[B, 1]``, floats without a fraction, bool), or what has the shape of
    the logits: one-hot integers, or probabilities of the classes, which sum to 1.

    Args:
        class_axis: the dimension of the logits that holds the classes; None: as the labels say.
        ignore_index: labels of this value count for nothing: neither in the likelihood nor in any figure.
        class_weights: ``[C]``, powers of the classes' likelihoods, as ``weight`` of ``cross_entropy``; they should
            have mean 1 over the data, or the KL weighs more or less. Figures are without them.

    Raises:
        NetworkError: an impossible argument.
    """

    def __init__(
        self,
        class_axis: int | None = None,
        ignore_index: int = IGNORED,
        class_weights: Sequence[float] | Tensor | None = None,
    ) -> None:
        if class_axis == 0:
            raise NetworkError("class_axis is 0, which are the examples: give 1, or -1 for the last.")
        if class_axis is not None and not isinstance(class_axis, int):
            raise NetworkError(f"class_axis is {class_axis!r}, but must be a whole number: 1, or -1 for the last.")
        self.class_axis, self.ignore_index = class_axis, _label_to_ignore(ignore_index)
        self.class_weights = finite_numbers("class_weights", class_weights)
        w = self.class_weights
        if w is not None and (w.dim() != 1 or not bool((w >= 0).all()) or not bool(w.any())):
            raise NetworkError("class_weights must be one finite number a class, none negative and not all zero.")

    def __call__(self, output: Any) -> dist.TorchDistribution:
        """Return the distribution of classes, batch shape ``[B]``; without labels, only transformers' are known.

        Raises:
            NetworkError: logits of more than two dimensions, and nothing says where the classes are.
        """
        logits = self._logits(output)
        if self.class_axis is None and logits.dim() > 2 and not _has_tokens(output, logits):
            raise NetworkError(
                f"The network's output has the shape {list(logits.shape)}, and without labels nothing says which "
                "dimension holds the classes: give likelihood=Categorical(class_axis=1), or -1 for the last."
            )
        return self._classes(logits.movedim(self._last_unless_given(logits), -1))

    def settle(self, output: Any, y: Tensor) -> "Categorical":
        """Return the same with ``class_axis`` decided by a first minibatch."""
        axis = self.axis(output, y)
        if self.class_axis is not None or output_tensor(output).dim() == 2:
            return self
        # A copy: the likelihood is the caller's, or the one that all calls share.
        settled = copy.copy(self)
        settled.class_axis = axis
        return settled

    def observe(self, output: Any, y: Tensor) -> tuple[dist.TorchDistribution, Tensor]:
        """See :class:`ReadsLabels`."""
        rows, value = self.rows(output, y)
        if value.is_floating_point():
            weights = self._weights(rows)
            return ClassProbabilities(rows, weights).to_event(rows.dim() - 2), value
        return self._classes(rows), value

    def rows(self, output: Any, y: Tensor) -> tuple[Tensor, Tensor]:
        """Return logits ``[B, ..., C]``, classes last; labels ``[B, ...]`` int64, or probabilities as the logits.

        Raises:
            DataError: labels of a shape or with values that are no classes.
            NetworkError: the output is no logits of at least two classes.
        """
        logits = self._logits(output)
        axis = self.axis(output, y)
        rows = logits.movedim(axis, -1)
        if y.shape == logits.shape:
            y = y.movedim(axis, -1)
            if y.is_floating_point():
                return rows, y
            _check_one_hot(y)
            return rows, y.long().argmax(-1)
        if squeezed(y.shape) != squeezed(rows.shape[:-1]):
            raise self._misfit(logits, y)
        return rows, _whole(y).reshape(rows.shape[:-1])

    def axis(self, output: Any, y: Tensor) -> int:
        """Return the dimension of the logits that holds the classes, from 1.

        Raises:
            DataError: the labels' shape fits neither convention, or both.
        """
        logits = self._logits(output)
        last = logits.dim() - 1
        if self.class_axis is not None or last == 1:
            return self._last_unless_given(logits)
        # torch's convention, transformers' convention; for two dimensions they are one.
        fits = [axis for axis in (1, last) if _fits_without(axis, logits, y)]
        # T = C by chance: the output's class says that these are tokens.
        if len(fits) == 2 and _has_tokens(output, logits):
            return last
        if len(fits) == 1:
            return fits[0]
        if fits:
            raise DataError(
                f"Labels of the shape {list(y.shape)} fit logits of the shape {list(logits.shape)} with the "
                "classes in dimension 1 and in the last: say which with likelihood=Categorical(class_axis=1), "
                "torch's convention, or Categorical(class_axis=-1)."
            )
        raise self._misfit(logits, y)

    def _misfit(self, logits: Tensor, y: Tensor) -> DataError:
        shape = logits.shape
        axes = (1, logits.dim() - 1) if self.class_axis is None else (self._last_unless_given(logits),)
        wanted = " or ".join(dict.fromkeys(str([*shape[:axis], *shape[axis + 1 :]]) for axis in axes))
        return DataError(
            f"Labels are {shown(y)} for logits of the shape {list(shape)}, but classes must be "
            f"{wanted}, and probabilities of classes as the logits: give such labels, or the likelihood that they "
            "have ('gaussian' for numbers, 'multilabel' for several classes at once)."
        )

    def _logits(self, output: Any) -> Tensor:
        logits = output_tensor(output)
        axis = None if logits.dim() < 2 else self._last_unless_given(logits)
        # The softmax of one class is 1, whatever the network says: no loss would ever teach it.
        if axis is None or (logits.dim() == 2 and logits.shape[1] < 2):
            raise NetworkError(
                f"The network's output has the shape {list(logits.shape)}, one number an example, but the "
                "likelihood 'categorical' needs the logits of at least two classes, [B, C]: use 'bernoulli' for "
                "labels 0 and 1, 'gaussian' for numbers."
            )
        return logits

    def _last_unless_given(self, logits: Tensor) -> int:
        axis = -1 if self.class_axis is None else self.class_axis
        if not -logits.dim() < axis < logits.dim():
            raise NetworkError(
                f"class_axis is {axis}, but the network's output has the shape {list(logits.shape)}: give 1, or "
                "-1 for its last dimension."
            )
        return axis % logits.dim()  # counted from 0

    def _classes(self, rows: Tensor) -> dist.TorchDistribution:
        return ClassLabels(rows, self.ignore_index, self._weights(rows)).to_event(rows.dim() - 2)

    def _weights(self, rows: Tensor) -> Tensor | None:
        if self.class_weights is not None and len(self.class_weights) != rows.shape[-1]:
            raise NetworkError(
                f"class_weights has {len(self.class_weights)} numbers, but there are {rows.shape[-1]} classes."
            )
        return None if self.class_weights is None else self.class_weights.to(rows)


#: :class:`Categorical` as it is by default.
categorical = Categorical()
#: Of tokens or whatever else has its classes last, ``[B, ..., C]``.
categorical_last = Categorical(class_axis=-1)


class Bernoulli:
    """Several classes at once, or one of two from a single logit: labels 0 or 1 (or between), as the logits.

    Args:
        ignore_index: labels of this value count for nothing: neither in the likelihood nor in any figure.
        pos_weight: power of the likelihood of ones, as of torch's ``binary_cross_entropy_with_logits``: a number,
            or what broadcasts against the logits.
    """

    def __init__(self, ignore_index: int = IGNORED, pos_weight: float | Tensor | None = None) -> None:
        self.ignore_index = _label_to_ignore(ignore_index)
        self.pos_weight = finite_numbers("pos_weight", pos_weight)
        if self.pos_weight is not None and not bool((self.pos_weight > 0).all()):
            raise NetworkError("pos_weight must be positive: how many times a one counts as much as a zero.")

    def __call__(self, output: Any) -> dist.TorchDistribution:
        """Return the distribution of labels of the logits' shape, batch shape ``[B]``."""
        logits = output_tensor(output)
        weight = None if self.pos_weight is None else self.pos_weight.to(logits)
        return examples_of(SeveralLabels(logits, self.ignore_index, weight))


def _has_tokens(output: Any, logits: Tensor) -> bool:
    """Return whether this is an output of transformers with logits ``[B, T, C]``: these have classes last."""
    return not isinstance(output, (Tensor, tuple, list)) and logits.dim() == 3


def _fits_without(axis: int, logits: Tensor, y: Tensor) -> bool:
    if logits.shape[axis] < 2:
        return False
    if y.shape == logits.shape:  # one-hot, or probabilities
        total = y.double().sum(axis)
        # Probabilities sum to 1 over the axis of the classes, and over no other but by chance; half precision to 3
        # digits.
        return bool((total - 1).abs().max() < 1e-3)
    return squeezed(y.shape) == squeezed(logits.shape[:axis] + logits.shape[axis + 1 :])


def _whole(y: Tensor) -> Tensor:
    """Return labels as int64.

    Raises:
        DataError: they have fractions or are not finite.
    """
    if y.is_floating_point():
        bad = int((~(y == y.round()) | y.isinf()).sum())  # NaN is unequal to itself
        if bad:
            raise DataError(
                f"Labels hold {bad} numbers of {y.numel()} that are NaN or have a fraction, and so are no "
                "classes: give integers, or likelihood='gaussian' for numbers."
            )
    return y.long()


def _check_one_hot(y: Tensor) -> None:
    if bool((y.long().sum(-1) != 1).any()) or int(y.min()) < 0:
        raise DataError(
            f"Labels of the logits' shape ({shown(y)}) are integers, but not one 1 and otherwise 0 for every "
            "example: for several classes at once use likelihood='multilabel'."
        )
