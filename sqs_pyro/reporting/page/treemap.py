"""A treemap: rectangles as large as what they stand for, as near to squares as they can be (Bruls et al. 2000)."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from sqs_pyro.reporting.page.markup import Markup, element

WIDTH, HEIGHT = 720.0, 360.0
_GAP = 1.5
_LINE, _LETTER = 15, 7.2  # of a label, at the size of the style sheet


@dataclass(frozen=True)
class Rectangle:
    """A place in the picture."""

    x: float
    y: float
    width: float
    height: float


@dataclass(frozen=True)
class Tile:
    """What a rectangle stands for.

    Attributes:
        name: written into it, where there is room.
        parts: by kind, a class of the style sheet, how large; the tile is as large as they are together.
        tip: what is said of it.
        layer: number of the layer that it is, if it is one.
    """

    name: str
    parts: dict[str, float] = field(default_factory=dict)
    tip: str = ""
    layer: int | None = None

    @property
    def size(self) -> float:
        """All parts together."""
        return sum(self.parts.values())


def treemap(tiles: Sequence[Tile], said: str) -> Markup:
    """Return a treemap of tiles; those of no size are left out."""
    ordered = sorted((tile for tile in tiles if tile.size > 0), key=lambda tile: -tile.size)
    places = squarified([tile.size for tile in ordered], Rectangle(0, 0, WIDTH, HEIGHT))
    return element(
        "svg",
        [_drawn(tile, place) for tile, place in zip(ordered, places, strict=True)],
        viewBox=f"0 0 {WIDTH:g} {HEIGHT:g}",
        class_="treemap",
        role="img",
        aria_label=said,
    )


def squarified(sizes: Sequence[float], whole: Rectangle) -> list[Rectangle]:
    """Return a rectangle for each size, in proportion; they fill ``whole``.

    Args:
        sizes: above zero, the largest first.
        whole: to fill.
    """
    scale = whole.width * whole.height / sum(sizes) if sizes else 0.0
    left, places = list(sizes), list[Rectangle]()
    while left:
        side = min(whole.width, whole.height)
        count = _row(left, side, scale)
        row, left = left[:count], left[count:]
        places += _laid(row, whole, scale)
        whole = _rest(whole, scale * sum(row))
    return places


def _row(sizes: Sequence[float], side: float, scale: float) -> int:
    """Return how many of the sizes make the row, along ``side``, whose longest rectangle is the shortest."""
    best, total = float("inf"), 0.0
    for count, size in enumerate(sizes):
        total += size
        thick = scale * total / side if side else 0.0
        # The first is the longest along the side, the last the shortest: one of them is the worst.
        worst = max(_ratio(scale * each, thick) for each in (sizes[0], size))
        if worst > best:
            return count
        best = worst
    return len(sizes)


def _ratio(area: float, thick: float) -> float:
    square = thick * thick
    return max(area / square, square / area) if square and area else float("inf")


def _laid(row: Sequence[float], whole: Rectangle, scale: float) -> Iterator[Rectangle]:
    area = scale * sum(row)
    upright = whole.width >= whole.height  # then the row stands at the left, else it lies on top
    thick = area / (whole.height if upright else whole.width) if area else 0.0
    begin = 0.0
    for size in row:
        long = scale * size / thick if thick else 0.0
        if upright:
            yield Rectangle(whole.x, whole.y + begin, thick, long)
        else:
            yield Rectangle(whole.x + begin, whole.y, long, thick)
        begin += long


def _rest(whole: Rectangle, area: float) -> Rectangle:
    if whole.width >= whole.height:
        used = area / whole.height if whole.height else 0.0
        return Rectangle(whole.x + used, whole.y, max(whole.width - used, 0.0), whole.height)
    used = area / whole.width if whole.width else 0.0
    return Rectangle(whole.x, whole.y + used, whole.width, max(whole.height - used, 0.0))


def _drawn(tile: Tile, place: Rectangle) -> Markup:
    wide, high = max(place.width - _GAP, 0.3), max(place.height - _GAP, 0.3)
    lies, begin, parts = wide >= high, 0.0, []
    for kind, size in tile.parts.items():
        share = size / tile.size
        x, y = (begin * wide, 0.0) if lies else (0.0, begin * high)
        width, height = (share * wide, high) if lies else (wide, share * high)
        parts.append(element("rect", x=_r(x), y=_r(y), width=_r(width), height=_r(height), class_=f"part {kind}"))
        begin += share
    room = wide > 5 * _LETTER and high > _LINE + 3
    roomy = wide > 150 and high > 34  # enough for the larger letters of a narrow screen
    label = element(
        "text",
        _fitted(tile.name.removesuffix(".weight"), wide),
        x=5,
        y=_LINE,
        class_="name" if roomy else "name small",
    )
    # An <svg> of its own cuts off what does not fit.
    return element(
        "svg",
        parts,
        label if room else None,
        x=_r(place.x),
        y=_r(place.y),
        width=_r(wide),
        height=_r(high),
        class_="tile",
        data_tip=tile.tip,
        data_layer=tile.layer,
    )


def _fitted(name: str, width: float) -> str:
    """Cut a name at its front: its end is what tells tensors apart."""
    most = max(int((width - 8) / _LETTER), 3)
    return name if len(name) <= most else "…" + name[1 - most :]


def _r(value: float) -> float:
    return round(value, 1)
