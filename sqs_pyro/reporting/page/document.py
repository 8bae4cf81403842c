"""A page around its sections: title, contents, style and script, and the order to load nothing else."""

import base64
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from hashlib import sha256
from importlib.resources import files

from sqs_pyro.reporting.page.markup import Child, Markup, element, joined

GENERATOR = "sqs-pyro"


@dataclass(frozen=True)
class Section:
    """A part of a page.

    Attributes:
        id: of its heading, for links.
        title: its heading.
        content: what stands below.
    """

    id: str
    title: str
    content: Child


def document(title: str, subtitle: Child, head: Child, sections: Sequence[Section | None]) -> str:
    """Return a whole page.

    Args:
        title: of the page.
        subtitle: a line below it.
        head: what stands above the first section.
        sections: in their order; None is left out.
    """
    shown = [section for section in sections if section is not None]
    style, script = _asset("page.css"), _asset("page.js")
    # The browser itself then refuses every request, and every script and style but these two.
    policy = f"default-src 'none'; style-src {_digest(style)}; script-src {_digest(script)}; base-uri 'none'"
    meta = [
        element("meta", charset="utf-8"),
        element("meta", http_equiv="Content-Security-Policy", content=policy),
        element("meta", name="viewport", content="width=device-width, initial-scale=1"),
        element("meta", name="color-scheme", content="light dark"),
        element("meta", name="generator", content=GENERATOR),
        element("title", title),
        element("style", Markup(style)),
    ]
    contents = element(
        "nav",
        element("ul", [element("li", element("a", part.title, href=f"#{part.id}")) for part in shown]),
        aria_label="Contents",
    )
    body = [
        element("a", "Skip to the content", href="#content", class_="skip"),
        element("header", element("h1", title), element("p", subtitle, class_="subtitle")),
        contents,
        element("main", head, [_section(part) for part in shown], id="content", tabindex="-1"),
        element("footer", element("p", "Written by sqs-pyro. This page is one file and loads nothing.")),
        element("div", id="tip", role="status", aria_live="polite", hidden=True),
        element("script", Markup(script)),
    ]
    page = element("html", element("head", meta), element("body", body), lang="en")
    return joined(Markup("<!doctype html>\n"), page, Markup("\n"))


def _section(part: Section) -> Markup:
    return element("section", element("h2", part.title, id=part.id), part.content, aria_labelledby=part.id)


@cache
def _asset(name: str) -> str:
    return (files(__package__) / name).read_text(encoding="utf-8")


def _digest(text: str) -> str:
    return f"'sha256-{base64.b64encode(sha256(text.encode()).digest()).decode()}'"
