"""Does a predictor know what it does not know? Scores of uncertainty, and how well they tell inputs apart."""

import math

import torch
from torch import Tensor

from sqs_pyro.errors import DataError


def predictive_entropy(log_p: Tensor) -> Tensor:
    """Return ``-Σ_c p_c log p_c``, nats ``[n]``, of log-probabilities ``[n, C]``: how unsure a prediction is."""
    return torch.special.entr(log_p.double().exp()).sum(-1)


def mixture_log_probabilities(log_p: Tensor) -> Tensor:
    """Return ``log 1/S Σ_s p_s``, ``[n, C]``, of the draws' log-probabilities ``[S, n, C]``."""
    return log_p.logsumexp(0) - math.log(len(log_p))


def mutual_information(log_p: Tensor) -> Tensor:
    """Return ``H(1/S Σ_s p_s) - 1/S Σ_s H(p_s)``, nats ``[n]``: how far draws disagree.

    The part of a prediction's entropy that more training data would take away (BALD, Houlsby et al. 2011); zero
    for one draw.

    Args:
        log_p: the draws' log-probabilities, ``[S, n, C]``.
    """
    information = predictive_entropy(mixture_log_probabilities(log_p.double())) - predictive_entropy(log_p).mean(0)
    return information.clamp(min=0)  # below zero by rounding alone


def auroc(inside: Tensor, outside: Tensor) -> float:
    """Return the area under the ROC curve of a score that should be higher outside.

    It is the probability that an example from outside has the higher score, ties counted half (the statistic of
    Mann and Whitney): 1/2 for a score that says nothing.

    Args:
        inside: scores of inputs like those of training, ``[n]``.
        outside: scores of shifted or foreign inputs, ``[m]``.

    Raises:
        DataError: one of the two is empty, or a score is NaN.
    """
    if not len(inside) or not len(outside) or bool(inside.isnan().any() | outside.isnan().any()):
        raise DataError(
            f"An AUROC of {len(inside)} and {len(outside)} scores is asked for, but both must be at least one, "
            "and none of them NaN."
        )
    ordered = inside.double().sort().values
    below, up_to = (torch.searchsorted(ordered, outside.double(), right=right) for right in (False, True))
    return float((below + up_to).double().mean() / (2 * len(ordered)))
