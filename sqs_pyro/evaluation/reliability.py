"""Is a classifier right as often as it says? Accuracy over confidence, and the calibration error."""

from dataclasses import dataclass

import torch
from torch import Tensor

_CALIBRATION_BINS = 15


@dataclass(frozen=True)
class Reliability:
    """Accuracy over confidence in equal bins of the top class's probability; an empty bin has zeros.

    Attributes:
        confidence: mean probability of the top class, ``[bins]``.
        accuracy: share of examples whose top class is right, ``[bins]``.
        counts: examples, ``[bins]``.
    """

    confidence: Tensor
    accuracy: Tensor
    counts: Tensor

    def to_dict(self) -> dict[str, list[float]]:
        """Return plain data for JSON."""
        return {
            "confidence": self.confidence.tolist(),
            "accuracy": self.accuracy.tolist(),
            "counts": self.counts.tolist(),
        }

    @property
    def error(self) -> float:
        """The expected calibration error, ``Σ_b (n_b / n) |accuracy_b - confidence_b|``."""
        return float((self.counts * (self.accuracy - self.confidence)).abs().sum() / self.counts.sum())


def reliability_curve(probabilities: Tensor, labels: Tensor, bins: int = _CALIBRATION_BINS) -> Reliability:
    """Return what a reliability diagram shows (Guo et al. 2017, section 2).

    Args:
        probabilities: ``[n, C]``.
        labels: ``[n]``.
        bins: number of bins of equal width, closed on the right.
    """
    confidence, predicted = probabilities.double().max(-1)
    bin_of = (confidence * bins).ceil().clamp(1, bins).long() - 1
    counts = torch.bincount(bin_of, minlength=bins)

    def mean(values: Tensor) -> Tensor:
        return torch.bincount(bin_of, weights=values, minlength=bins) / counts.clamp(min=1)

    return Reliability(mean(confidence), mean((predicted == labels).double()), counts)


def expected_calibration_error(probabilities: Tensor, labels: Tensor, bins: int = _CALIBRATION_BINS) -> float:
    """Return ``Σ_b (n_b / n) |accuracy_b - confidence_b|`` over equal bins of the top class's probability.

    Guo et al. 2017, equation 5. (torchmetrics has it too, but importing that takes seconds, because it imports
    transformers; it is the reference in the tests.) Arguments as of :func:`reliability_curve`.
    """
    return reliability_curve(probabilities, labels, bins).error
