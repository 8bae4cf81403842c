"""What every run notes beside its results: how long its stages took, and with which versions it ran."""

import importlib.metadata
import platform
import time


class Clock:
    """Seconds from lap to lap, by the lap's name."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._last = time.perf_counter()

    def lap(self, name: str) -> None:
        """Note under a name how long it is since the last lap, or since the clock was made."""
        now = time.perf_counter()
        self.seconds[name], self._last = now - self._last, now


def versions(*more: str) -> dict[str, str]:
    """Versions of Python and of the packages that results depend on, ``more`` of them if need be."""
    packages = ("sqs-pyro", "torch", "pyro-ppl", *more)
    return {"python": platform.python_version()} | {name: importlib.metadata.version(name) for name in packages}
