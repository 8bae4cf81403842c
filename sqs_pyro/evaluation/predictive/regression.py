"""Predictions of numbers: are they near, and are their intervals as wide as they have to be?

A posterior predictive distribution comes as a mixture ``1/S Σ_s N(m_s, σ_s²)``, of the draws' means and the
likelihood's noise, whose figures are exact, or as samples of the site ``"obs"``.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from sqs_pyro.errors import ArgumentError, DataError
from sqs_pyro.evaluation.predictive.mixture import (
    mixture_cdf,
    mixture_crps,
    mixture_interval,
    mixture_log_density,
)

LEVELS = (0.5, 0.9, 0.95)


@dataclass(frozen=True)
class Interval:
    """Central intervals of one level.

    Attributes:
        level: the probability that each is said to hold.
        coverage: the share of observations that are in theirs.
        width: their mean width, in the unit of the observations: of two predictors with the right coverage the
            narrower knows more (Gneiting et al. 2007).
    """

    level: float
    coverage: float
    width: float


@dataclass(frozen=True)
class RegressionEvaluation:
    """A predictive distribution on a data set; several numbers of one example count one by one.

    Attributes:
        nll: mean negative log-density of the observations, nats; None of samples, which have no density.
        rmse: root of the mean squared distance from the predictive mean.
        crps: mean continuous ranked probability score, in the unit of the observations: the absolute error where
            a prediction is a single number.
        intervals: coverage and width of central intervals.
        pit: probability that a prediction gives to all below the observation, ``[n]``: uniform where predictions
            are calibrated (Dawid 1984).
        num_examples: observations.
    """

    nll: float | None
    rmse: float
    crps: float
    intervals: tuple[Interval, ...]
    pit: Tensor
    num_examples: int


@torch.no_grad()
def evaluate_mixture(
    means: Tensor, scale: Tensor | float, y: Tensor, levels: Sequence[float] = LEVELS
) -> RegressionEvaluation:
    """Evaluate the mixture of normal distributions ``1/S Σ_s N(m_s, σ_s²)``, exactly.

    Args:
        means: m, ``[S, n]`` or ``[S, n, ...]``, one set from each draw of the posterior.
        scale: σ > 0, what broadcasts to ``means``: the likelihood's noise.
        y: observations, ``[n]`` or ``[n, ...]``.
        levels: of the central intervals.

    Raises:
        DataError: shapes that do not fit, or no observation.
        ArgumentError: a level that is not between 0 and 1.
    """
    _check(means, y, levels)
    m = means.double().flatten(1)  # [S, n]
    s = torch.as_tensor(scale, dtype=torch.float64, device=m.device).expand(means.shape).flatten(1)
    y = y.double().flatten()
    pit = mixture_cdf(m, s, y)
    return RegressionEvaluation(
        nll=float(-mixture_log_density(m, s, y).mean()),
        rmse=float((m.mean(0) - y).square().mean().sqrt()),
        crps=float(mixture_crps(m, s, y).mean()),
        intervals=_intervals(levels, [mixture_interval(m, s, level) for level in levels], y),
        pit=pit,
        num_examples=len(y),
    )


@torch.no_grad()
def evaluate_samples(samples: Tensor, y: Tensor, levels: Sequence[float] = LEVELS) -> RegressionEvaluation:
    """Evaluate samples of a predictive distribution: ``Predictive(model, guide=guide, num_samples=S)(x)["obs"]``.

    Quantiles are those of the samples, so that an interval near 1 needs many of them.

    Args:
        samples: ``[S, n]`` or ``[S, n, ...]``.
        y, levels: as of :func:`evaluate_mixture`.

    Raises:
        DataError, ArgumentError: as of :func:`evaluate_mixture`.
    """
    _check(samples, y, levels)
    x, y = samples.double().flatten(1).sort(0).values, y.double().flatten()
    ends = [(_quantile(x, (1 - level) / 2), _quantile(x, (1 + level) / 2)) for level in levels]
    return RegressionEvaluation(
        nll=None,
        rmse=float((x.mean(0) - y).square().mean().sqrt()),
        crps=float(sample_crps(x, y).mean()),
        intervals=_intervals(levels, ends, y),
        pit=((x < y).double() + (x == y).double() / 2).mean(0),
        num_examples=len(y),
    )


def sample_crps(samples: Tensor, y: Tensor) -> Tensor:
    """Return ``1/S Σ_s |x_s - y| - 1/2S² Σ_st |x_s - x_t|``, ``[n]``, of samples ``[S, n]``.

    Gneiting and Raftery 2007, equation 21, of the samples' own distribution; sorted, the second sum takes
    ``S log S`` instead of S².
    """
    count = len(samples)
    rank = torch.arange(1, count + 1, dtype=samples.dtype, device=samples.device)
    weight = (2 * rank - count - 1)[:, None]  # how many samples lie below, less how many above
    spread = (weight * samples.sort(0).values).sum(0) / count**2  # half the mean distance of two
    return (samples - y).abs().mean(0) - spread


def _quantile(ordered: Tensor, p: float) -> Tensor:
    """Return the quantile of sorted samples ``[S, n]``, linear between two (torch's own takes few of them)."""
    place = p * (len(ordered) - 1)
    below = int(place)
    above = min(below + 1, len(ordered) - 1)
    return ordered[below].lerp(ordered[above], place - below)


def _intervals(levels: Sequence[float], ends: Sequence[tuple[Tensor, Tensor]], y: Tensor) -> tuple[Interval, ...]:
    return tuple(
        Interval(level, float(((low <= y) & (y <= high)).double().mean()), float((high - low).mean()))
        for level, (low, high) in zip(levels, ends, strict=True)
    )


def _check(draws: Tensor, y: Tensor, levels: Sequence[float]) -> None:
    if draws.shape[1:] != y.shape or not draws.numel():
        raise DataError(
            f"Draws of the shape {list(draws.shape)} and observations of the shape {list(y.shape)} were given, "
            "but must be [S, n] and [n], or [S, n, ...] and [n, ...], with at least one of each."
        )
    for level in levels:
        if not 0 < level < 1:
            raise ArgumentError(f"An interval of level {level} is asked for, but a level is between 0 and 1: 0.9.")
