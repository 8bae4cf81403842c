"""What is to be said of a packed network's latency."""

from collections.abc import Mapping
from typing import Any

_SLOWER = 1.1  # times as long as dense: from where it is said


def slower(measured: Mapping[str, Any] | None) -> str | None:
    """Return what is to be said if a packed network is slower than dense here; None: it is not."""
    if measured is None:
        return None
    times = {batch: own["packed_ms"] / own["dense_ms"] for batch, own in measured["batch"].items()}
    batch, worst = max(times.items(), key=lambda item: item[1])
    if worst < _SLOWER:
        return None
    return (
        f"At batch {batch} a call of the packed network takes {worst:.1f} times as long here as dense: compile it "
        "(`sqs bench model` compares), or run what `sqs export --format dense` writes, if there is memory for it."
    )
