"""What language models write before and after training in a federation."""

from textwrap import shorten

from benchmarks.pages.markdown import markdown_table
from benchmarks.study import read_table

LONGEST = 240
"""Characters of a sample's text in a table."""


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
