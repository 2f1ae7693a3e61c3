"""What ``droppeft settings`` prints: settings with their defaults and meanings."""

import re
from collections.abc import Iterator

from rich.console import Console
from rich.padding import Padding
from rich.text import Text

from droppeft.config.describing import Setting, all_settings
from droppeft.config.other_words import KEYS
from droppeft.errors import DroppeftError

CODE = re.compile("`([^`]+)`")
LINK = re.compile(r"\[([^]]+)\]\(([^)]+)\)")
"""A link of a description, which the documentation has as Markdown."""


def matching(word: str) -> list[Setting]:
    """The settings with a word in their key or description, or that a word of others stands for.

    Those that it stands for come first, then those with the word in their key.

    Raises:
        DroppeftError: there is none.
    """
    wanted = word.lower()
    meant = re.findall(r"[\w.]+", KEYS.get(wanted.replace("-", "_"), ""))
    found = [
        one
        for one in all_settings()
        if wanted in f"{one.key} {one.meaning}".lower() or one.key in meant
    ]
    if not found:
        raise DroppeftError(
            f"no setting has {word!r} in its name or description; list all with: droppeft settings"
        )
    return sorted(found, key=lambda one: (one.key not in meant, wanted not in one.key))


def show(settings: list[Setting], console: Console) -> None:
    """Print each setting as it is written on the command line, and below it what it means."""
    for one in settings:
        default = (one.default or "").strip('"')
        console.print(Text.assemble((one.key, "bold cyan"), f"={default}"))
        for line in _about(one):
            console.print(Padding(Text(line), (0, 0, 0, 4), expand=False))


def _about(one: Setting) -> Iterator[str]:
    meaning = LINK.sub(r"\1: docs/reference/\2", one.meaning)
    choices = CODE.findall(one.type)
    is_said = choices and set(choices) <= set(CODE.findall(meaning))
    yield (meaning if is_said else f"{meaning} ({one.type})").replace("`", "")
    if one.other_defaults:
        by_value: dict[str, list[str]] = {}
        for who, value in one.other_defaults.items():
            by_value.setdefault(value.strip('"'), []).append(who)
        yield "; ".join(f"{value} with {', '.join(whos)}" for value, whos in by_value.items())
