"""The result of one check of the installation; ours."""

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Finding:
    """The result of a check.

    Attributes:
        status: ``problem`` if a run with the built-in model and data would fail or the installation
            does not meet its requirements, ``note`` if the user should know something that does
            not prevent such a run, else ``ok``.
        found: a description of what was found.
        remedy: a shell command that mends it; ``None`` if the status is ``ok``.
    """

    status: Literal["ok", "note", "problem"]
    found: str
    remedy: str | None = None


def ok(found: str) -> Finding:
    """A finding without need for action."""
    return Finding("ok", found)


def note(found: str, remedy: str) -> Finding:
    """A finding that does not prevent a run with the built-in model and data."""
    return Finding("note", found, remedy)


def problem(found: str, remedy: str) -> Finding:
    """A run with the built-in model and data would fail, or the requirements are not met."""
    return Finding("problem", found, remedy)


def size(size_bytes: float) -> str:
    """Format a size in GB, or in MB below one GB."""
    return f"{size_bytes / 1e9:.1f} GB" if size_bytes >= 1e9 else f"{size_bytes / 1e6:.0f} MB"
