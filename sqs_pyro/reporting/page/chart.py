"""Charts as inline SVG: a frame with two axes, and marks in it. Colours are those of the style sheet."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise

from sqs_pyro.reporting.page.axis import Axis
from sqs_pyro.reporting.page.markup import Markup, element

Point = tuple[float, float]
COLOURS = 8  # classes c0 to c7 of the style sheet
MOST_POINTS = 240  # of a curve: more are not told apart at the width of a page


@dataclass(frozen=True)
class Frame:
    """Where a chart is drawn, in units that are pixels at its natural size.

    Attributes:
        x, y: the axes.
        width, height: of everything.
        left, right, top, bottom: margins, with the ticks' texts in them.
    """

    x: Axis
    y: Axis
    width: float = 340
    height: float = 210
    left: float = 50
    right: float = 16
    top: float = 10
    bottom: float = 40

    def place(self, x: float, y: float) -> Point:
        """Return where a point of the axes is drawn."""
        across = self.left + self.x.share(x) * (self.width - self.left - self.right)
        down = self.height - self.bottom - self.y.share(y) * (self.height - self.top - self.bottom)
        return round(across, 1), round(down, 1)

    def line(self, points: Iterable[Point], class_: str) -> Markup:
        """Return a line through points of the axes."""
        return element("polyline", points=_path(self.place(*point) for point in points), class_=f"line {class_}")

    def area(self, lower: Iterable[Point], upper: Iterable[Point], class_: str) -> Markup:
        """Return the area between two lines."""
        outline = [*(self.place(*p) for p in upper), *reversed([self.place(*p) for p in lower])]
        return element("polyline", points=_path(outline), class_=f"area {class_}")

    def dot(self, point: Point, class_: str, tip: str | None = None, radius: float = 4) -> Markup:
        """Return a dot, and what is said of it."""
        across, down = self.place(*point)
        return element("circle", cx=across, cy=down, r=radius, class_=f"dot {class_}", data_tip=tip)

    def bar(self, low: Point, high: Point, class_: str, tip: str | None = None) -> Markup:
        """Return a rectangle between two corners."""
        (left, bottom), (right, top) = self.place(*low), self.place(*high)
        width, height = max(right - left, 0.5), max(bottom - top, 0)
        return element(
            "rect", x=left, y=top, width=round(width, 1), height=round(height, 1), class_=class_, data_tip=tip
        )


def chart(
    frame: Frame, marks: Sequence[Markup], said: str, read: Sequence[tuple[float, float, str]] = ()
) -> Markup:
    """Return a chart.

    Args:
        frame: with its axes.
        marks: drawn in it, the later above the earlier.
        said: what there is to see, for who does not see it.
        read: points of the axes and what is said of each, for who points at them or walks over them with the arrow
            keys; from left to right.
    """
    # A line each, as quotes of JSON would be six characters in an attribute.
    places = [(*frame.place(x, y), " ".join(text.split())) for x, y, text in read]
    spots = [f"{x:g} {y:g} {text}" for x, y, text in places]
    keys = " Arrow keys read its points." if spots else ""
    return element(
        "svg",
        _grid(frame),
        marks,
        viewBox=f"0 0 {frame.width:g} {frame.height:g}",
        class_=f"chart w{frame.width:g}",  # no wider than its letters should grow
        role="img",
        aria_label=said + keys,
        tabindex="0" if spots else None,
        data_points="\n".join(spots) if spots else None,
    )


def legend(entries: Sequence[tuple[str, str]]) -> Markup:
    """Return names behind samples of their marks: pairs of a class of the style sheet and a name."""
    return element(
        "ul",
        [
            element("li", element("span", class_=f"sample {class_}", aria_hidden="true"), name)
            for class_, name in entries
        ],
        class_="legend",
    )


def colour(index: int) -> str:
    """Return the classes of the curve of a number: in every second round of colours lines are dashed."""
    return f"c{index % COLOURS}" + (" dashed" if index // COLOURS % 2 else "")


def thinned(points: Sequence[Point]) -> list[Point]:
    """Return at most :data:`MOST_POINTS` points: of a longer curve means of stretches, and its last."""
    if len(points) <= MOST_POINTS:
        return list(points)
    every = -(-len(points) // (MOST_POINTS - 1))
    stretches = [points[start : start + every] for start in range(0, len(points), every)]
    means = [(part[len(part) // 2][0], sum(y for _, y in part) / len(part)) for part in stretches]
    return [*means[:-1], points[-1]]


def smoothed(points: Sequence[Point]) -> list[Point]:
    """Return running means of a curve that goes up and down more than four times its range; nothing of another."""
    values = [y for _, y in points]
    window = len(points) // 20
    if window < 2 or sum(abs(b - a) for a, b in pairwise(values)) <= 4 * (max(values) - min(values)):
        return []
    recent = [values[max(0, end - window) : end] for end in range(1, len(points) + 1)]
    return [(x, sum(part) / len(part)) for (x, _), part in zip(points, recent, strict=True)]


def _grid(frame: Frame) -> list[Markup]:
    left, bottom = frame.left, frame.height - frame.bottom
    right = frame.width - frame.right
    parts = []
    for tick in frame.y.ticks(4):
        _, down = frame.place(frame.x.low, tick)
        parts.append(element("line", x1=left, x2=right, y1=down, y2=down, class_="grid"))
        parts.append(_text(left - 6, down + 4, frame.y.form(tick), "end"))
    for tick in frame.x.ticks(4):
        across, _ = frame.place(tick, frame.y.low)
        parts.append(element("line", x1=across, x2=across, y1=bottom, y2=bottom + 4, class_="rule"))
        parts.append(_text(across, bottom + 16, frame.x.form(tick), "middle"))
    parts.append(element("line", x1=left, x2=right, y1=bottom, y2=bottom, class_="rule"))
    parts.append(_text((left + right) / 2, frame.height - 5, frame.x.label, "middle", "label"))
    return parts


def _text(x: float, y: float, text: str, anchor: str, class_: str = "tick") -> Markup:
    return element("text", text, x=x, y=y, text_anchor=anchor, class_=class_)


def _path(points: Iterable[Point]) -> str:
    return " ".join(f"{x:g},{y:g}" for x, y in points)
