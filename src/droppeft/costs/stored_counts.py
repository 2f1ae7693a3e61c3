"""Counts of steps in the cache folder: counting takes seconds, and runs need the same. Ours."""

import json
from collections.abc import Callable
from dataclasses import asdict
from functools import cache
from importlib.metadata import version
from pathlib import Path

import droppeft
from droppeft.costs.step_counts import BlockCounts, StepCounts
from droppeft.data.cache import remembered

PACKAGES = ("torch", "transformers", "peft")
"""Packages on whose code a count depends."""


def stored_counts(of: object, count: Callable[[], StepCounts]) -> StepCounts:
    """Return the counts of a step, from the cache folder if they are known.

    Args:
        of: everything that they depend on; its ``repr`` is the key, with the versions of the
            packages and the files of droppeft.
        count: counts the step.

    Raises:
        DroppeftError: as ``count``.
    """
    key = f"{of!r}{_code()}"
    return remembered("step-counts", key, count, lambda counts: json.dumps(asdict(counts)), _read)


def _read(text: str) -> StepCounts:
    tree = json.loads(text)
    blocks = tuple(BlockCounts(**block) for block in tree.pop("blocks"))
    return StepCounts(**{**tree, "blocks": blocks, "rest": BlockCounts(**tree["rest"])})


@cache
def _code() -> str:
    """What identifies the code that counts and is counted."""
    files = sorted(Path(droppeft.__file__).parent.rglob("*.py"))
    changed = [(str(file), file.stat().st_mtime_ns) for file in files]
    return repr([[version(name) for name in PACKAGES], changed])
