"""Memory of the heap that nobody uses, given back to the system."""

import ctypes
import sys
from collections.abc import Callable
from functools import cache

_OFTEN = 1 << 22  # bytes


class Heap:
    """Gives back what is free whenever much has been freed, where the C library is glibc.

    By itself it keeps up to 64 MB of freed memory, and all that lies between what is in use: beside the codes of a
    network that are much.
    """

    def __init__(self) -> None:
        self._freed = 0

    def freed(self, size: int) -> None:
        """Tell that ``size`` bytes have been freed."""
        self._freed += size
        if self._freed >= _OFTEN:
            self._freed = 0
            trim = _malloc_trim()
            if trim is not None:
                trim(0)


@cache
def _malloc_trim() -> Callable[[int], int] | None:
    # The process itself as a library: whichever C library it runs on.
    return getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None
