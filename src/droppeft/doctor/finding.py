"""What one check of the installation found; ours."""

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Finding:
    """The outcome of a check.

    Attributes:
        status: ``problem`` where a run with the built-in model and data would fail or the
            installation breaks its own requirements, ``note`` for what a person should know and
            can live with, else ``ok``.
        found: what is there, in words.
        remedy: a command for the shell; ``None`` where all is well.
    """

    status: Literal["ok", "note", "problem"]
    found: str
    remedy: str | None = None


def ok(found: str) -> Finding:
    """All is well."""
    return Finding("ok", found)


def note(found: str, remedy: str) -> Finding:
    """The built-in run works; something is less than it could be."""
    return Finding("note", found, remedy)


def problem(found: str, remedy: str) -> Finding:
    """The built-in run would not work, or not on what the requirements promise."""
    return Finding("problem", found, remedy)


def size(size_bytes: float) -> str:
    """In GB, or in MB below one."""
    return f"{size_bytes / 1e9:.1f} GB" if size_bytes >= 1e9 else f"{size_bytes / 1e6:.0f} MB"
