"""The built-in task: name the Python library from which a docstring's first paragraph comes.

Ours. ``builtin_texts/NOTICE.md`` says which libraries these are, under which licences their texts
are, and how ``scripts/make_builtin_texts.py`` made them.
"""

import csv
import gzip
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from droppeft.data.texts import TextData, TextTable

TEXTS = Path(__file__).parent / "builtin_texts" / "texts.csv.gz"

COLUMNS = ("split", "library", "file", "text")
"""The columns of ``TEXTS``."""

LIBRARIES = (
    "matplotlib",
    "networkx",
    "pandas",
    "scipy",
    "sklearn",
    "sympy",
    "torch",
    "transformers",
)
"""The classes."""

EXPECTED_HASH = "dc09c3a05e423bec"
"""``content_hash`` of the texts. Accuracies can be compared only where it is the same."""


def load_builtin() -> TextData:
    """Load the built-in task: 5,000 rows, with equally many for every library.

    ``keys`` of both tables are the rows' source files.
    """
    with gzip.open(TEXTS, "rt", encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    return TextData(
        name="builtin",
        train=_table([row for row in rows if row["split"] == "train"]),
        test=_table([row for row in rows if row["split"] == "test"]),
        label_names=LIBRARIES,
    )


def _table(rows: Sequence[dict[str, str]]) -> TextTable:
    return TextTable(
        texts=tuple(row["text"] for row in rows),
        pairs=None,
        labels=np.array([LIBRARIES.index(row["library"]) for row in rows], np.int64),
        keys=tuple(row["file"] for row in rows),
    )


def package_of(file: str) -> str:
    """Return the owner of a built-in row: ``torch/nn`` for ``torch/nn/modules/linear.py``."""
    return "/".join(file.split("/")[:2])
