"""Errors a user can repair: one clear sentence each, raised before work is lost.

Every message says what is wrong, what was given, what is allowed and how to repair it. The command line
prints the sentence and exits with a code other than 0; libraries can catch :class:`SQSError`.
"""


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


class RankError(SQSError, RuntimeError):
    """Another rank has ended, or cannot be reached."""


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
    # Of an error without words the first line is its class.
    return line if line == type(error).__name__ else f"{type(error).__name__}: {line}"
