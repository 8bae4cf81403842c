"""What is to be said of a packed network's latency."""

from collections.abc import Mapping
from typing import Any

_SLOWER = 1.1  # times as long as dense: from where it is said
_SHARE = 0.1  # of what a call loses: a layer that loses less is not its cause


def slower(measured: Mapping[str, Any] | None) -> str | None:
    """Return what is to be said if a packed network is slower than dense here; None: it is not."""
    if measured is None:
        return None
    times = {batch: own["packed_ms"] / own["dense_ms"] for batch, own in measured["batch"].items()}
    batch, worst = max(times.items(), key=lambda item: item[1])
    if worst < _SLOWER:
        return None
    own = measured["batch"][batch]
    lost = own["packed_ms"] - own["dense_ms"]
    layers = {name: more for name, more in (own.get("layers") or {}).items() if more >= _SHARE * lost}
    named = "".join(f"; layer '{name}' {more:.2g} ms" for name, more in layers.items())
    return (
        f"At batch {batch} a call of the packed network takes {worst:.1f} times as long here as dense "
        f"({lost:.2g} ms more{named}): compile it "
        "(`sqs bench model` compares), or run what `sqs export --format dense` writes, if there is memory for it."
    )
