"""Differences between variants that share seeds, and which of them are beyond chance.

Runs of one seed share the trained network and the order of the data, so that what the seed does to both cancels
in their difference. With mean d̄ and standard deviation s of n differences the 95 % interval of a paired t-test is

    d̄ ± t s/√n,   t the 0.975 quantile of Student's t with n - 1 degrees of freedom,

and ``p = P(|T| ≥ |d̄| √n/s)``. Of m comparisons 0.05 m exclude 0 by chance alone. Holm's (1979) p-values,
``max_{j ≤ i} (m - j + 1) p_(j)`` with p_(1) the smallest, fall below 0.05 by chance in at most 5 % of families.
Chance is that of seeds: test examples are the same in all runs. Where losses d[s, i] of each example are known,
both can be taken for drawn at random, two crossed effects with f degrees of freedom (Satterthwaite 1946):

    Var(d̄) = V_s + V_i - V_r,   V_s = var_s(d̄[s]) / S,   V_i = var_i(d̄[i]) / N,   V_r = residual variance / SN,
    f = Var(d̄)² / (V_s² / (S - 1) + V_i² / (N - 1)).
"""

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import numpy as np
from numpy.typing import NDArray

LEVEL = 0.95
FEWEST = 3  # seeds of an interval: that of two is 13 standard deviations to each side


@dataclass(frozen=True)
class Difference:
    """What a variant has more than the reference.

    Attributes:
        mean: over seeds.
        interval: its ends, or None of fewer than :data:`FEWEST` seeds.
        p: probability of a mean as far from 0 by chance, or None.
    """

    mean: float
    interval: list[float] | None
    p: float | None


def paired_difference(values: Sequence[float], reference: Sequence[float]) -> Difference:
    """Return the mean difference of figures at the same seeds, with its interval."""
    differences = [ours - theirs for ours, theirs in zip(values, reference, strict=True)]
    mean, n = statistics.fmean(differences), len(differences)
    if n < FEWEST:
        return Difference(mean, None, None)
    return _by_chance(mean, statistics.stdev(differences) / math.sqrt(n), n - 1)


def crossed_difference(values: NDArray[Any], reference: NDArray[Any]) -> Difference:
    """Return the mean difference of losses ``[S, N]``, S seeds and N examples both taken for drawn at random."""
    differences = np.asarray(values, np.float64) - np.asarray(reference, np.float64)
    mean, (seeds, examples) = float(differences.mean()), differences.shape
    if seeds < FEWEST:
        return Difference(mean, None, None)
    by_seed, by_example = differences.mean(1), differences.mean(0)
    residual = ((differences - by_seed[:, None] - by_example + mean) ** 2).sum() / ((seeds - 1) * (examples - 1))
    of_seeds, of_examples = by_seed.var(ddof=1) / seeds, by_example.var(ddof=1) / examples
    # As estimates they may contradict each other: the sum is never smaller than one of its parts.
    variance = max(of_seeds + of_examples - residual / (seeds * examples), of_seeds, of_examples)
    parts = of_seeds**2 / (seeds - 1) + of_examples**2 / (examples - 1)
    return _by_chance(mean, math.sqrt(variance), variance**2 / parts if parts else seeds - 1)


def _by_chance(mean: float, error: float, freedom: float) -> Difference:
    """Return a mean of this standard error with what Student's t says of it."""
    from scipy.special import stdtr, stdtrit  # heavy, and only needed here

    half = float(stdtrit(freedom, 0.5 + LEVEL / 2)) * error
    # Without spread all differ by the same: by nothing, or surely.
    t = abs(mean) / error if error else math.inf if mean else 0.0
    return Difference(mean, [mean - half, mean + half], 2 * float(stdtr(freedom, -t)))


def holm(p_values: Sequence[float]) -> list[float]:
    """Return Holm's p-values of a family of comparisons, each at most 1, in the same order."""
    m = len(p_values)
    order = sorted(range(m), key=lambda i: p_values[i])
    adjusted = accumulate((min(1.0, (m - rank) * p_values[i]) for rank, i in enumerate(order)), max)
    by_index = dict(zip(order, adjusted, strict=True))
    return [by_index[i] for i in range(m)]
