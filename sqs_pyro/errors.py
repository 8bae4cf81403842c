"""Errors a user can repair: one clear sentence each, raised before work is lost.

Every message says what is wrong, what was given, what is allowed and how to repair it. The command line
prints the sentence and exits with a code other than 0; libraries can catch :class:`SQSError`.
"""

import math
import operator
from typing import SupportsFloat, SupportsIndex


class SQSError(Exception):
    """Base of every error that sqs_pyro raises on purpose."""


class RecipeError(SQSError, ValueError):
    """A recipe has an unknown key or an impossible value."""


class ArgumentError(RecipeError):
    """A call without a recipe was given an argument of a wrong type or an impossible value.

    A :class:`RecipeError`, because that was raised in its place before: whoever catches that still catches this.
    """


class DataError(SQSError, ValueError):
    """Data is missing, incomplete, not finite, or does not fit the network."""


class NetworkError(SQSError, ValueError):
    """A network cannot be compressed as asked: no sites, NaN weights, too few weights for a codebook."""


class ModelError(SQSError, ValueError):
    """A Pyro model, its guide and their distributions do not fit together."""


class NotReparametrisedError(ModelError, NotImplementedError):
    """A guide's distribution has no draws through which a gradient could flow."""


class PackedFileError(SQSError, ValueError):
    """A packed file is truncated, altered, of another version, or made for another network."""


class DivergenceError(SQSError, ArithmeticError):
    """Training produced a loss that is not finite."""


class ResourceError(SQSError, RuntimeError):
    """Memory or threads are not enough for what was asked."""


class MissingPackageError(SQSError, ModuleNotFoundError):
    """An optional package is not installed; see :mod:`sqs_pyro.extras`."""


class OutputError(SQSError, ValueError):
    """An output cannot be written: its path exists, is in use or cannot be used, or the disk is full."""


def first_line(error: BaseException, most: int = 300) -> str:
    """Return what an error says, as a clause: its first line, or its class where it says nothing."""
    lines = str(error).strip().splitlines()
    return lines[0].rstrip(" .:")[:most] if lines else type(error).__name__


def said(error: BaseException) -> str:
    """Return an error's class and its first line, as a clause."""
    line = first_line(error)
    return line if line == type(error).__name__ else f"{type(error).__name__}: {line}"


def is_whole(value: object, least: int, most: float = math.inf) -> bool:
    """Return whether an argument is a whole number in a range; texts, floats and booleans are not."""
    if isinstance(value, bool) or not isinstance(value, SupportsIndex):
        return False
    try:
        return least <= operator.index(value) <= most
    except TypeError:  # a tensor of another kind
        return False


def is_positive(value: object) -> bool:
    """Return whether an argument is one finite number above 0, of Python, NumPy or torch."""
    if isinstance(value, bool) or not isinstance(value, SupportsFloat):
        return False
    try:
        return 0 < float(value) < math.inf
    except (TypeError, ValueError, RuntimeError):  # a tensor of several
        return False
