"""How much β it takes for coded weights to fit into so many bits."""

import math
from collections.abc import Callable


def beta_for(bits: Callable[[float], float], target: float, low: float, high: float, tolerance: float) -> float:
    """Return a β at which a size that falls with β has come down to a target.

    Weights change symbols one by one, so that the size is a step function of β without a root that Brent's method
    could close in on, and it is the upper side of the step that keeps the target. So this halves an interval of
    log β, and returns its upper end.

    Args:
        bits: the size at β.
        target: what it may be.
        low, high: log β between which it is looked for.
        tolerance: length of the interval that is left.
    """
    while high - low > tolerance:
        middle = 0.5 * (low + high)
        low, high = (middle, high) if bits(math.exp(middle)) > target else (low, middle)
    return math.exp(high)
