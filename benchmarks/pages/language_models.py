"""Tables of language models in a federation: quality, costs, and what they write."""

from collections.abc import Sequence
from pathlib import Path
from textwrap import shorten

from benchmarks.pages.comparisons import HEADS, read_parts
from benchmarks.pages.markdown import bare, markdown_table
from benchmarks.study import read_table
from droppeft.comparison.writers import COLUMNS, head

LONGEST = 240
"""Characters of a sample's text in a table."""

UNTRAINED = "*the model before training*"


def generation(study: str, data: str, columns: Sequence[str]) -> str:
    """A row per variant of one data set, and one of the model before training.

    Args:
        columns: of :data:`COLUMNS`.
    """
    [part] = [one for one in read_parts(study).parts if Path(one.data).name == data]
    heads = {name: HEADS.get(name, head(name, part)) for name in columns}
    before = [
        bare(f"{part.untrained[one]:.3f}") if one in part.untrained else "–"
        for one in heads.values()
    ]
    rows = [[row.variant, *(COLUMNS[name](row) for name in columns)] for row in part.rows]
    return markdown_table(["variant", *heads.values()], [*rows, [UNTRAINED, *before]])


def samples(study: str, data: str) -> str:
    """What the model writes before training, and after training with each variant."""
    rows = [row for row in read_table(study, "samples") if row["data"] == data]
    return markdown_table(
        ["prompt", "reference", "before training", "FedLoRA", "adaptive"],
        [
            [
                shorten(row[name], LONGEST, placeholder=" …")
                for name in ("prompt", "reference", "before", "fedlora", "adaptive")
            ]
            for row in rows
        ],
    )
