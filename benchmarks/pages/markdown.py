"""Write Markdown: tables, numbers, and the machine on which something was measured."""

import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from statistics import fmean, stdev
from typing import Any


def markdown_table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table of texts, one line per row."""
    lines = [head, ["---"] * len(head), *rows]
    return "".join(f"| {' | '.join(map(_cell, line))} |\n" for line in lines)


def place(machine: Mapping[str, Any]) -> str:
    """Cores, their make, and threads of torch."""
    threads = machine["threads"]
    return f"{processor(machine)}, {threads} thread{'s' * (threads > 1)}"


def processor(machine: Mapping[str, Any]) -> str:
    """Cores that the process might use, and their make."""
    count = machine["cores"]
    return f"{count} core{'s' * (count > 1)} ({machine['processor']})"


def spread(values: Collection[float | None]) -> str:
    """Mean and standard deviation of those there are."""
    known = [value for value in values if value is not None]
    if not known:
        return "–"
    deviation = f" ± {stdev(known):.3f}" if len(known) > 1 else ""
    return bare(f"{fmean(known):.3f}{deviation}")


def signed(values: Iterable[float], places: int = 3) -> str:
    """Every one, with its sign."""
    return bare(", ".join(f"{one:+.{places}f}" for one in values)) or "–"


def bare(text: str) -> str:
    """Numbers below one without their 0."""
    return re.sub(r"(?<![0-9])0\.(?=[0-9])", ".", text)


def megabytes(value: float) -> str:
    """Whole megabytes."""
    return f"{value / 1e6:,.0f} MB"


def interval(row: Mapping[str, Any], column: str, sign: str = "–") -> str:
    """A ratio, with the ends of its interval that stand in columns beside it."""
    return f"{row[column]:.3f} ({row[f'{column}_low']:.3f}{sign}{row[f'{column}_high']:.3f})"


def _cell(text: str) -> str:
    return text.replace("|", "\\|")
