"""Which weights a training with patience has kept, in words."""

from collections.abc import Mapping
from typing import Any

#: Sections of a recipe that may have patience, and what they count.
UNITS = {"baseline": "epoch", "compression": "step"}


def kept_in_words(kept: Mapping[str, Any], section: str) -> str:
    """Return a clause, of a section's ``kept`` in ``metrics.json``: ``best``, ``last`` and ``planned``."""
    unit, end = UNITS[section], "stopped" if kept["last"] < kept["planned"] else "ended"
    return f"{end} at {unit} {kept['last']} of {kept['planned']}, kept {unit} {kept['best']}"
