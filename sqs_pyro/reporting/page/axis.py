"""Axes of charts: a range of numbers, where they are drawn, and at which of them there are ticks."""

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass

_STEPS = (1, 2, 2.5, 5, 10)
_plain = "{:g}".format
# ticks of a decade, by how many times the low end the high end is at most
_DECADES = {10: (1, 2, 3, 5, 7), 1000: (1, 2, 5), math.inf: (1,)}


@dataclass(frozen=True)
class Axis:
    """A range of numbers.

    Attributes:
        low, high: its ends, of which the first is smaller.
        label: what they are.
        log: whether equal ratios are equally long; then ``low`` is above zero.
        form: how ticks are written.
        blank: whether it has none, as where rows have names of their own.
    """

    low: float
    high: float
    label: str
    log: bool = False
    form: Callable[[float], str] = _plain
    blank: bool = False

    def share(self, value: float) -> float:
        """Return where a number lies between the ends: 0 to 1."""
        if self.log:
            return math.log(max(value, self.low) / self.low) / math.log(self.high / self.low)
        return (value - self.low) / (self.high - self.low)

    def ticks(self, count: int = 5) -> list[float]:
        """Return about ``count`` round numbers between the ends."""
        if self.blank:
            return []
        if self.log and self.high > 3 * self.low:  # within less than that there may be no round power
            return self._log_ticks(count)
        width = (self.high - self.low) / count
        power = 10.0 ** math.floor(math.log10(width))
        step = next(power * step for step in _STEPS if power * step >= 0.999 * width)
        first, last = math.ceil(self.low / step - 1e-9), math.floor(self.high / step + 1e-9)
        return [number * step for number in range(first, min(last, first + 4 * count) + 1)]

    def _log_ticks(self, count: int) -> list[float]:
        first, last = math.floor(math.log10(self.low)), math.ceil(math.log10(self.high))
        each = next(steps for most, steps in _DECADES.items() if self.high <= most * self.low)
        every = max(1, (last - first) // (2 * count))
        found = [step * 10.0**power for power in range(first, last + 1, every) for step in each]
        found = [tick for tick in found if self.low <= tick * (1 + 1e-9) and tick <= self.high * (1 + 1e-9)]
        return found if len(found) > 1 else [self.low, self.high]


def axis(
    values: Iterable[float | None],
    label: str,
    *,
    log: bool = False,
    form: Callable[[float], str] = _plain,
    start: float | None = None,
    stop: float | None = None,
) -> Axis:
    """Return an axis that has room for values, or that begins and ends where it is said."""
    known = [value for value in values if value is not None and (value > 0 or not log)]
    low, high = (min(known), max(known)) if known else (1.0, 2.0)
    if log:
        high = max(high, 1e-100)
        low = max(low, 1e-15 * high)  # a chart of more decades would show nothing of any
        pad = max(1.03, (high / low) ** 0.04)
        low, high = low / pad, high * pad
    else:
        pad = 0.04 * (high - low) or 0.05 * abs(high) or 1.0
        low, high = low - pad, high + pad
    low, high = (low if start is None else start), (high if stop is None else stop)
    return Axis(low, high if high > low else low + 1.0, label, log, form)
