"""What the written pages have in common."""

import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from droppeft.comparison.study_files import RunRecord, Study, read_tables

sys.path.append(str(Path(__file__).resolve().parents[1]))  # where the package of studies is
from benchmarks.study import read_table as read_table
from benchmarks.study import read_values as read_values

NOTICE = "<!-- Written by docs/generate.py: change the source, not this page. -->"
FIGURES = Path(__file__).parent / "figures"
STUDIES = Path(__file__).parent.parent / "benchmarks"
"""Folders of comparisons, by name."""


def markdown_table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table of texts, one line per row."""
    lines = [head, ["---"] * len(head), *rows]
    return "".join(f"| {' | '.join(map(_cell, line))} |\n" for line in lines)


def read_compared(name: str) -> tuple[Study, list[RunRecord]]:
    """What a study asked, and its runs."""
    return read_tables(STUDIES / name)


def was_compared(name: str) -> bool:
    """Whether there is a result of this comparison."""
    return (STUDIES / name / "study.json").is_file()


def place(machine: Mapping[str, Any]) -> str:
    """Cores, their make, and threads of torch."""
    threads = machine["threads"]
    return f"{processor(machine)}, {threads} thread{'s' * (threads > 1)}"


def processor(machine: Mapping[str, Any]) -> str:
    """Cores that the process might use, and their make."""
    count = machine["cores"]
    return f"{count} core{'s' * (count > 1)} ({machine['processor']})"


def _cell(text: str) -> str:
    return text.replace("|", "\\|")
