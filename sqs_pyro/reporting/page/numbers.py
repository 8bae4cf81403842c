"""How numbers are written on a page."""

import math

NOTHING = "–"


def written(value: float | None, form: str = ",.4g") -> str:
    """Return a number in a form; a dash where there is none."""
    return NOTHING if value is None else f"{value:{form}}"


def short_bytes(size: float) -> str:
    """Return bytes in the unit that leaves one to three digits before the point: ``33.9 kB``."""
    for unit in ("B", "kB", "MB", "GB"):
        if abs(size) < 999.5 or unit == "GB":
            break
        size /= 1000
    return f"{size:,.0f} {unit}" if unit == "B" or abs(size) >= 100 else f"{size:.3g} {unit}"


def short_time(seconds: float) -> str:
    """Return a duration in its largest units: ``7 min 15 s``."""
    if seconds < 60:
        return f"{seconds:.3g} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s"


def finite(value: object) -> float | None:
    """Return what is a finite number as one, and None for anything else: an empty cell, a text, infinity."""
    try:
        number = float(value)  # type: ignore[arg-type]
    except (TypeError, ValueError, OverflowError):
        return None
    return number if math.isfinite(number) else None
