"""The built-in data for causal language models: write the first line of a function's docstring.

Ours. The prompt has the function's signature, with the class of a method. The libraries that the
functions are from are those of the built-in texts; ``builtin_docstrings/NOTICE.md`` says how
``scripts/make_builtin_docstrings.py`` made the file.
"""

import csv
import gzip
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from droppeft.data.builtin import LIBRARIES, package_of
from droppeft.data.conversations import (
    Conversation,
    ConversationData,
    ConversationTable,
    Message,
)

DOCSTRINGS = Path(__file__).parent / "builtin_docstrings" / "docstrings.csv.gz"

COLUMNS = ("split", "library", "file", "signature", "docstring")
"""The columns of ``DOCSTRINGS``."""

REQUEST = "Write the one-line docstring of this Python function:"

EXPECTED_HASH = "9dd90193734f8ea2"
"""``content_hash`` of the rows. Losses can be compared only where it is the same."""


def load_builtin_docstrings() -> ConversationData:
    """Load the built-in conversations: a prompt with a signature, and a docstring's first line.

    The categories are the libraries. ``keys`` of both tables are packages, such as ``torch/nn``. No
    source file has rows in both tables.
    """
    with gzip.open(DOCSTRINGS, "rt", encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    return ConversationData(
        name="builtin",
        shape="prompt/completion",
        train=_table([row for row in rows if row["split"] == "train"]),
        test=_table([row for row in rows if row["split"] == "test"]),
        label_names=LIBRARIES,
    )


def _table(rows: Sequence[dict[str, str]]) -> ConversationTable:
    return ConversationTable(
        rows=tuple(_conversation(row["signature"], row["docstring"]) for row in rows),
        labels=np.array([LIBRARIES.index(row["library"]) for row in rows], np.int64),
        keys=tuple(package_of(row["file"]) for row in rows),
    )


def _conversation(signature: str, docstring: str) -> Conversation:
    prompt = Message("user", f"{REQUEST}\n\n{signature}")
    return Conversation((prompt, Message("assistant", docstring)))
