"""What an argument of a call is, whatever was given for it."""

import math
import operator
from typing import SupportsFloat, SupportsIndex


def is_whole(value: object, least: int, most: float = math.inf) -> bool:
    """Return whether an argument is a whole number in a range; texts, floats and booleans are not."""
    # bool is an int to Python; a float is no index, not even 3.0.
    if isinstance(value, bool) or not isinstance(value, SupportsIndex):
        return False
    try:
        return least <= operator.index(value) <= most
    except TypeError:  # a tensor of another kind
        return False


def is_finite(value: object) -> bool:
    """Return whether an argument is one finite number, of Python, NumPy or torch."""
    if isinstance(value, bool) or not isinstance(value, SupportsFloat):
        return False
    try:
        return math.isfinite(value)
    except (TypeError, ValueError, RuntimeError):  # a tensor of several
        return False


def is_positive(value: object) -> bool:
    """Return whether an argument is one finite number above 0, of Python, NumPy or torch."""
    return is_finite(value) and float(value) > 0  # type: ignore[arg-type]
