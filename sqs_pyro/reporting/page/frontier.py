"""Rate and distortion: how good networks are over the bytes of their files."""

from collections.abc import Sequence
from dataclasses import dataclass

from sqs_pyro.reporting.page.axis import axis
from sqs_pyro.reporting.page.chart import Frame, chart, colour, legend
from sqs_pyro.reporting.page.markup import Markup, element
from sqs_pyro.reporting.page.numbers import short_bytes


@dataclass(frozen=True)
class Spot:
    """A file, or the mean of several.

    Attributes:
        name: of what it is.
        bytes_: of the file.
        value: how good it is.
        curve: name of the curve that it is on.
        sd: standard deviation of the value; None: it is of one.
        front: whether no other is smaller and better.
    """

    name: str
    bytes_: float
    value: float
    curve: str
    sd: float | None = None
    front: bool = False


def frontier(spots: Sequence[Spot], label: str, form: str, fp32: float | None) -> Markup:
    """Return a chart of files, a curve for each variant; the dashed line is the fp32 network."""
    curves = list(dict.fromkeys(spot.curve for spot in spots))
    spread = [spot.value + sign * (spot.sd or 0.0) for spot in spots for sign in (-1, 1)]
    x = axis((spot.bytes_ for spot in spots), "bytes of the file", log=True, form=short_bytes)
    frame = Frame(x, axis([*spread, fp32], label), width=460, height=300)
    marks = [] if fp32 is None else [frame.line([(x.low, fp32), (x.high, fp32)], "stage")]
    for index, name in enumerate(curves):
        own = sorted((spot for spot in spots if spot.curve == name), key=lambda spot: spot.bytes_)
        marks.append(frame.line([(spot.bytes_, spot.value) for spot in own], colour(index)))
        for spot in own:
            at = spot.bytes_, spot.value
            if spot.sd:
                ends = [(spot.bytes_, spot.value + sign * spot.sd) for sign in (-1, 1)]
                marks.append(frame.line(ends, f"error {colour(index)}"))
            marks += [frame.dot(at, "ring", radius=8)] if spot.front else []
            tip = f"{spot.name}: {spot.value:{form}} at {short_bytes(spot.bytes_)}"
            marks.append(frame.dot(at, colour(index), tip + (f" ± {spot.sd:{form}}" if spot.sd else "")))
    said = f"{label} over the size of the file, {len(spots)} points; the table has its figures."
    return element("figure", element("figcaption", label), chart(frame, marks, said))


def frontier_legend(spots: Sequence[Spot], fp32: bool) -> Markup:
    """Return the names of the curves."""
    curves = list(dict.fromkeys(spot.curve for spot in spots))
    names = [(f"dot {colour(index)}", name) for index, name in enumerate(curves)]
    names += [("ring", "on the Pareto front")] if any(spot.front for spot in spots) else []
    return legend([*names, ("line c7 dashed", "fp32")] if fp32 else names)
