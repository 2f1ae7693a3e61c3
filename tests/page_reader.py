"""Reads an HTML page for tests: its tags, links and texts."""

import re
from html.parser import HTMLParser


class Reader(HTMLParser):
    """Collects tags, links and texts."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.links: list[str] = []
        self.texts: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.links += [value or "" for name, value in attrs if name in ("src", "href")]
        self.links += [value or "" for name, value in attrs if name == "xlink:href"]

    def handle_data(self, data: str) -> None:
        self.texts.append(data)


def check_self_contained(text: str) -> None:
    """Check that a page has no script and loads nothing."""
    reader = Reader(text)
    assert not {"script", "link", "img", "iframe", "object"} & set(reader.tags)
    assert all(link.startswith("#") for link in reader.links)
    assert "@import" not in text
    assert not re.findall(r"url\((?!#)", text)
