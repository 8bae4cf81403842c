"""HTML from calls: what is no markup yet is text, and is escaped."""

import html
import re
from collections.abc import Iterable
from typing import TypeAlias

_VOID = {"br", "input", "meta", "path", "line", "rect", "circle", "polyline"}
# What no document of Unicode text may hold, and a browser would show as boxes.
_CONTROLS = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f\ud800-\udfff]")


class Markup(str):
    """A text that is HTML, or SVG, already."""

    __slots__ = ()


Child: TypeAlias = str | int | float | Iterable["Child"] | None


def element(tag: str, *children: Child, **attributes: str | float | bool | None) -> Markup:
    """Return an element.

    Args:
        tag: its name.
        children: markup stands as it is, other text is escaped, None is nothing, sequences are laid out.
        attributes: ``class_`` is ``class``, ``data_tip`` is ``data-tip``; True is an attribute without a value,
            False and None are none.
    """
    said = "".join(_attribute(name, value) for name, value in attributes.items())
    if tag in _VOID and not children:
        return Markup(f"<{tag}{said}>" if tag in ("br", "input", "meta") else f"<{tag}{said}/>")
    return Markup(f"<{tag}{said}>{joined(*children)}</{tag}>")


def joined(*children: Child) -> Markup:
    """Return children one behind the other, as of :func:`element`."""
    return Markup("".join(_child(child) for child in children))


def escaped(text: str) -> str:
    """Return a text as HTML that shows it, in elements and in attributes."""
    return html.escape(_CONTROLS.sub("\ufffd", text), quote=True)


def _child(child: Child) -> str:
    if child is None:
        return ""
    if isinstance(child, Markup):
        return child
    if isinstance(child, str):
        return escaped(child)
    if isinstance(child, int | float):
        return escaped(str(child))
    return "".join(_child(each) for each in child)


def _attribute(name: str, value: str | float | bool | None) -> str:
    if value is None or value is False:
        return ""
    # Names of SVG keep their capitals (viewBox); those of ours have hyphens for underscores.
    key = name.rstrip("_").replace("_", "-")
    if value is True:
        return f" {key}"
    text = f"{value:.5g}" if isinstance(value, float) else str(value)
    return f' {key}="{escaped(text)}"'
