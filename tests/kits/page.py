"""What a page of HTML says, by Python's own parser: its elements, texts, and what it refers to."""

from html.parser import HTMLParser

_VOID = {"area", "base", "br", "col", "embed", "hr", "img", "input", "link", "meta", "source", "track", "wbr"}
_REFERENCES = ("aria-labelledby", "aria-controls", "aria-describedby", "for", "data-shows")


class Page(HTMLParser):
    """A page, parsed; elements that are not closed, or closed in the wrong order, are an error.

    Attributes:
        elements: tag and attributes of each.
        texts: texts by the tag that they stand in.
        ids: in their order.
        references: ids that are referred to.
        urls: everything that could be loaded or followed.
        rows: of tables, the texts of their cells.
    """

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.texts: dict[str, list[str]] = {}
        self.ids: list[str] = []
        self.references: list[str] = []
        self.urls: list[str] = []
        self.rows: list[list[str]] = []
        self._open: list[str] = []
        self.feed(text)
        self.close()
        assert not self._open, self._open

    def handle_starttag(self, tag, attrs):
        known = dict(attrs)
        assert len(known) == len(attrs), f"<{tag}> has an attribute twice"
        self.elements.append((tag, known))
        self.ids += [known["id"]] if "id" in known else []
        for name in _REFERENCES:
            self.references += (known.get(name) or "").split()
        for name in ("href", "src", "action", "poster", "xlink:href", "srcset", "data"):
            target = known.get(name)
            if target is not None:
                (self.references if target.startswith("#") else self.urls).append(target.removeprefix("#"))
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")
        if tag not in _VOID:
            self._open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.handle_starttag(tag, attrs)
        if tag not in _VOID:
            self._open.pop()

    def handle_endtag(self, tag):
        assert self._open.pop() == tag

    def handle_data(self, data):
        inside = self._open[-1] if self._open else ""
        self.texts.setdefault(inside, []).append(data)
        if {"td", "th"} & set(self._open):
            self.rows[-1][-1] += data

    def row(self, name: str) -> list[str]:
        """Return the cells of the first row of a name."""
        return next(cells for cells in self.rows if cells and cells[0] == name)

    def heading(self, level: str = "h2") -> list[str]:
        """Return the headings of a level."""
        return self.texts.get(level, [])

    def check(self) -> None:
        """Check what every page must keep to."""
        assert len(set(self.ids)) == len(self.ids)
        assert set(self.references) <= set(self.ids), set(self.references) - set(self.ids)
        assert not self.urls, self.urls
        tags = [tag for tag, _ in self.elements]
        assert tags.count("script") == tags.count("style") == tags.count("main") == tags.count("h1") == 1
        assert not {"img", "link", "iframe", "object", "embed", "base", "form"} & set(tags)
        for tag, attributes in self.elements:
            assert "style" not in attributes and not any(name.startswith("on") for name in attributes), tag
            if tag == "svg" and "tile" not in (attributes.get("class") or ""):
                assert attributes.get("role") == "img" and attributes.get("aria-label")
        text = "".join(self.texts["style"] + self.texts["script"])
        assert "url(" not in text and "@import" not in text and "fetch(" not in text
