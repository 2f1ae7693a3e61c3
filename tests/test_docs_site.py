"""The documentation site builds without warnings, loads nothing from elsewhere, has no orphans."""

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path

import pytest

from droppeft.adapters.types import TYPES
from droppeft.layer_dropout import ARCHITECTURES

ROOT = Path(__file__).parents[1]
LOADING = {"script": "src", "img": "src", "link": "href", "iframe": "src", "source": "src"}
"""Attributes whose address a browser loads by itself."""


class Addresses(HTMLParser):
    """Collects what a page loads, and the pages that it links to."""

    def __init__(self) -> None:
        super().__init__()
        self.loaded: list[str] = []
        self.linked: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        """Note the addresses of one tag."""
        given = dict(attrs)
        if address := given.get(LOADING.get(tag, "")):
            self.loaded.append(address)
        if tag == "a" and (address := given.get("href")):
            self.linked.append(address)


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet"]
    built = subprocess.run(
        [*command, "--site-dir", str(folder)],
        cwd=ROOT,
        env={**os.environ, "NO_MKDOCS_2_WARNING": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert built.returncode == 0, built.stdout + built.stderr
    return folder


def _pages(site: Path) -> Iterator[tuple[Path, Addresses]]:
    for path in sorted(site.rglob("*.html")):
        addresses = Addresses()
        addresses.feed(path.read_text(encoding="utf-8"))
        yield path, addresses


def test_nothing_is_loaded_from_elsewhere(site: Path) -> None:
    elsewhere = re.compile(r"^(\w+:)?//")
    pages = list(_pages(site))
    assert len(pages) > 30
    for path, addresses in pages:
        assert addresses.loaded
        assert not [one for one in addresses.loaded if elsewhere.match(one)], path
    for style in site.rglob("*.css"):
        assert not re.search(r"url\(['\"]?(\w+:)?//", style.read_text(encoding="utf-8")), style


def test_every_page_can_be_reached_from_the_first(site: Path) -> None:
    links = {path: addresses.linked for path, addresses in _pages(site)}
    reached, waiting = set(), [site / "index.html"]
    while waiting:
        page = waiting.pop()
        if page in reached or page not in links:
            continue
        reached.add(page)
        waiting += [
            (page.parent / address.partition("#")[0]).resolve()
            for address in links[page]
            if not re.match(r"\w+:", address)
        ]
    assert set(links) - reached == {site / "404.html"}


def test_references_in_docstrings_are_links(site: Path) -> None:
    for page in (site / "reference" / "python").glob("*.html"):
        assert not re.search(r":\w+:<code>|:\w+:`", page.read_text(encoding="utf-8")), page
    page = (site / "reference" / "python" / "layer_dropout.html").read_text(encoding="utf-8")
    assert 'href="#droppeft.layer_dropout.find_stacks"' in page


def test_the_landing_page_counts_correctly() -> None:
    page = (ROOT / "docs" / "index.md").read_text(encoding="utf-8")
    usable = sum(kind.kind != "refused" for kind in TYPES.values())
    assert f"[{len(ARCHITECTURES)} types]" in page
    assert f"[{usable - 1} other types]" in page
