"""Values out of a file's JSON, checked where they are taken: the first wrong one is told, none is collected."""

import math
from collections.abc import Collection, Mapping
from typing import Any

from sqs_pyro.documents import shown
from sqs_pyro.errors import PackedFileError

MAX_ELEMENTS = 1 << 40  # of one tensor: sizes stay far from overflow
MAX_DIMENSIONS = 64
MAX_NAME = 1000  # characters of a tensor's or module's name


class Wrong(PackedFileError):
    """A value is wrong: where it stands, what it is, what it should be, without a period."""


def record(value: Any, place: str, needed: Collection[str], optional: Collection[str] = ()) -> Mapping[str, Any]:
    """Return an object with just these keys.

    Raises:
        Wrong: it is something else, lacks a key, or has another.
    """
    if not isinstance(value, dict):
        raise wrong(place, value, "an object")
    for key in needed:
        if key not in value:
            raise Wrong(f"at {place!r}: it has no {key!r}")
    for key in value:
        if key not in needed and key not in optional:
            raise Wrong(f"at {shown(f'{place}.{key}', 80)}: there is no such key")
    return value


def items(value: Any, place: str) -> list[Any]:
    """Return a list, whose entries are not looked at."""
    if not isinstance(value, list):
        raise wrong(place, value, "a list")
    return value


def integer(value: Any, place: str, least: int = 0, most: int = MAX_ELEMENTS) -> int:
    """Return a whole number in a range; true and false are none."""
    # type, not isinstance: JSON's true is a bool, which Python counts among the integers.
    if type(value) is not int or not least <= value <= most:
        raise wrong(place, value, f"a whole number from {least} to {most}")
    return value


def name(value: Any, place: str) -> str:
    """Return a name, at most :data:`MAX_NAME` characters."""
    if not isinstance(value, str) or len(value) > MAX_NAME:
        raise wrong(place, value, f"a name of at most {MAX_NAME} characters")
    return value


def choice(value: Any, place: str, allowed: Collection[str]) -> str:
    """Return one of the texts that are allowed."""
    if not isinstance(value, str) or value not in allowed:
        raise wrong(place, value, f"one of {', '.join(allowed)}")
    return value


def shape(value: Any, place: str) -> tuple[int, ...]:
    """Return a tensor's shape: its sides' product, those of 0 left out, is at most :data:`MAX_ELEMENTS`."""
    sides = tuple(
        # One more than there may be shows that there are too many, however long the file's list is.
        integer(side, f"{place}.{i}")
        for i, side in enumerate(items(value, place)[: MAX_DIMENSIONS + 1])
    )
    # A side of 0 hides the others in the product, and torch refuses those when they overflow.
    if len(sides) > MAX_DIMENSIONS or math.prod(side or 1 for side in sides) > MAX_ELEMENTS:
        raise wrong(place, value, f"at most {MAX_DIMENSIONS} sides and {MAX_ELEMENTS} elements")
    return sides


def wrong(place: str, value: Any, allowed: str) -> Wrong:
    """Return what says that a value is wrong, and what it should be."""
    return Wrong(f"at {place!r}: it is {shown(value, 80)}, but should be {allowed}")
