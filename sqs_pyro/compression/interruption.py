"""Ctrl-C and SIGTERM: at a moment of our choosing, and as one exception."""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Terminated(KeyboardInterrupt):
    """SIGTERM, which is taken like Ctrl-C."""


def interruption(number: int) -> KeyboardInterrupt:
    """Return the exception for a signal."""
    return Terminated() if number == signal.SIGTERM else KeyboardInterrupt()


@contextmanager
def interruptions_as_exceptions() -> Iterator[None]:
    """Let Ctrl-C raise KeyboardInterrupt, and SIGTERM :class:`Terminated`, in the body.

    Only the main thread may change handlers; elsewhere nothing changes. A signal that is ignored stays so.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    wanted = {signal.SIGINT: signal.default_int_handler, signal.SIGTERM: _terminate}
    before = {number: signal.getsignal(number) for number in wanted}
    # SIG_IGN is the wish of who started us (nohup, a shell's background job); None is a handler not of Python.
    changed = [number for number in wanted if before[number] not in (signal.SIG_IGN, None)]
    try:
        for number in changed:
            signal.signal(number, wanted[number])
        yield
    finally:
        for number in changed:
            signal.signal(number, before[number])


def _terminate(number: int, frame: FrameType | None) -> None:
    raise Terminated


@contextmanager
def deferred_interrupt(insistent: bool = True) -> Iterator[list[int]]:
    """Let Ctrl-C and SIGTERM take effect when the body ends; a second one takes effect at once.

    What they do then is up to the handlers that were there before: Python's own raises KeyboardInterrupt. Only the
    main thread may change handlers; elsewhere, and of a signal that no Python handler waits for, nothing changes.

    Args:
        insistent: whether a second one takes effect at once.

    Yields:
        The signals that have come so far, which grow while the body runs.
    """
    received: list[int] = []
    if threading.current_thread() is not threading.main_thread():
        yield received
        return
    handlers = {number: signal.getsignal(number) for number in SIGNALS}
    # SIG_DFL and SIG_IGN are no functions: what the system does with those signals stays its own business.
    before = {number: handler for number, handler in handlers.items() if callable(handler)}

    def remember(number: int, frame: FrameType | None) -> None:
        received.append(number)
        if insistent:
            put_back()  # a second one finds the handlers of before

    def put_back() -> None:
        for waited, handler in before.items():
            signal.signal(waited, handler)

    for waited in before:
        signal.signal(waited, remember)
    try:
        yield received
    finally:
        put_back()
    # Not after an error in the body: that is on its way out, and would be lost in an interruption.
    for caught in received:
        signal.raise_signal(caught)
