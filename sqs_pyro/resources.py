"""Too little memory, or no more threads: every library has an error of its own for it, users get one sentence."""

import errno
from collections.abc import Iterator
from contextlib import contextmanager

from sqs_pyro.errors import OutputError, ResourceError, SQSError, first_line

# torch (CPU, CUDA, mapped files), C++, the loader of shared libraries, zlib, Python's threads
_MEMORY = (
    "allocate memory",
    "out of memory",
    "bad_alloc",
    "bad allocation",
    "failed to map segment",
    "unable to mmap",
    "insufficient memory",
)
_THREADS = ("can't start new thread", "Resource temporarily unavailable", "thread creation")


@contextmanager
def enough_resources(what: str, lower: str = "close other programs, or raise the limit") -> Iterator[None]:
    """Say in one sentence that a stage needed more memory or threads than there are; other errors pass.

    Around the stages of a public call, it names the innermost.

    Args:
        what: the stage, as the subject of the sentence.
        lower: what to do.

    Raises:
        ResourceError: in place of the error of torch, NumPy, zlib or the system.
    """
    try:
        yield
    except (ResourceError, OutputError):
        raise  # the innermost stage has said it; a full disk is no want of memory
    except Exception as error:
        said = shortage(_first(error) if isinstance(error, SQSError) else error)
        if said is None:
            raise
        raise ResourceError(f"{what} needs more {said}: {lower}.") from None


def _first(error: BaseException) -> BaseException:
    """Return the error that a sentence explains: what fails on data may have failed for want of memory."""
    while (earlier := error.__cause__ or error.__context__) is not None:
        error = earlier
    return error


def shortage(error: BaseException) -> str | None:
    """Return what an error says there is too little of, with its reason in brackets; None if of nothing."""
    reason = first_line(error)[-160:]  # the end: torch begins with where in its source it failed
    if isinstance(error, MemoryError) or getattr(error, "errno", None) == errno.ENOMEM:
        return f"memory than there is ({reason or 'MemoryError'})"
    # Classes that libraries use for it; a KeyError that says "out of memory" is about something else.
    if not isinstance(error, RuntimeError | ImportError | OSError | ValueError):
        return None
    text = str(error)
    if any(sign.lower() in text.lower() for sign in _MEMORY):
        return f"memory than there is ({reason})"
    if any(sign in text for sign in _THREADS):
        return f"threads than it may start ({reason})"
    return None
