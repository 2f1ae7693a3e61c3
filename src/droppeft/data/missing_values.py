"""Rows that lack a value: they are refused, or left out and counted. Ours."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt

from droppeft.data.splits import Split
from droppeft.data.texts import Rows
from droppeft.errors import DroppeftError
from droppeft.quantities import counted

Mask = npt.NDArray[np.bool_]
Rule = Literal["error", "drop"]

SHOWN_ROWS = 3


@dataclass(frozen=True)
class Lacking:
    """What rows of a split lack.

    Attributes:
        split: the split.
        rows: for each kind of value (``text``, ``label``, ``owner``), a phrase that says that it is
            missing, and whether each row lacks it, shape (rows,).
        advice: what to do, for a kind whose values are not simply missing.
    """

    split: Split
    rows: Mapping[str, tuple[str, Mask]]
    advice: str = ""


def kept_rows(lacking: Sequence[Lacking], rule: Rule) -> tuple[list[Rows], Counter[str]]:
    """Return the rows of each split that lack nothing, and how many are left out for what.

    A row that lacks several values counts for each of them, and once for ``any``.

    Raises:
        DroppeftError: rows lack values and ``rule`` is ``error``, or a split has no others. The
            message counts all of them.
    """
    if rule == "error":
        found = [text for one in lacking if (text := _described(one))]
        if found:
            advice = next((one.advice for one in lacking if one.advice), "")
            raise DroppeftError(
                f"{'; '.join(found)}; {advice or 'correct this'}, or leave such rows out with "
                "source.missing=drop"
            )
    kept, dropped = [], Counter[str]()
    for one in lacking:
        left = np.ones(one.split.table.num_rows, bool)
        for kind, (_, rows) in one.rows.items():
            dropped[kind] += int(np.sum(rows))
            left &= ~rows
        dropped["any"] += int(np.sum(~left))
        if not left.any():
            wanted = " and ".join(f"a {kind}" for kind in one.rows)
            raise DroppeftError(f"{one.split.where}: no row has {wanted}, so that none is left")
        kept.append(np.flatnonzero(left))
    return kept, dropped


def _described(lacking: Lacking) -> str:
    found = [(phrase, rows) for phrase, rows in lacking.rows.values() if rows.any()]
    if not found:
        return ""
    parts = [f"{phrase} in {row_numbers(np.flatnonzero(rows))}" for phrase, rows in found]
    masks = [rows for _, rows in found]
    every = int(np.sum(np.any(masks, axis=0)))
    in_all = f", {counted(every, 'row')} in all" if every < np.sum(masks) else ""
    return f"{lacking.split.where}: {' and '.join(parts)}{in_all}{lacking.split.numbering}"


def row_numbers(rows: Rows) -> str:
    """Return how many rows there are, and the numbers of the first ones, counted from 1."""
    first = ", ".join(str(row + 1) for row in rows[:SHOWN_ROWS])
    if len(rows) == 1:
        return f"row {first}"
    more = ", …" if len(rows) > SHOWN_ROWS else ""
    return f"{len(rows):,} rows ({first}{more})"
