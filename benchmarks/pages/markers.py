"""Find the markers of a Markdown page, and write a table behind each."""

import re
import tomllib
from collections.abc import Callable, Mapping

START = "<!-- table: "
MARKER = re.compile(
    r"(?P<start><!-- table: (?P<name>\w+)(?P<settings>.*?)-->\n).*?(?P<end><!-- end -->)", re.S
)

Tables = Mapping[str, Callable[..., str]]
"""Functions by the name that markers use; a marker's settings are keyword arguments."""


def fill(text: str, tables: Tables) -> str:
    """Write what ``tables`` says between each marker of a page and its end.

    Raises:
        ValueError: if a marker has no end, or names a table that does not exist.
    """
    found = [match[0] for match in MARKER.finditer(text)]
    if text.count(START) != len(found) or any(one.count(START) > 1 for one in found):
        raise ValueError("a marker '<!-- table: NAME -->' has no '<!-- end -->' after it")
    return MARKER.sub(lambda match: _filled(match, tables), text)


def _filled(match: re.Match[str], tables: Tables) -> str:
    name, settings = match["name"], tomllib.loads(match["settings"])
    if name not in tables:
        raise ValueError(f"no table is called '{name}'; there are: {', '.join(sorted(tables))}")
    return f"{match['start']}\n{tables[name](**settings).strip()}\n\n{match['end']}"
