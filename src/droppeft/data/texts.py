"""Labelled text in memory, as every source delivers it; ours."""

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import numpy.typing as npt

Rows = npt.NDArray[np.int64]


@dataclass(frozen=True)
class TextTable:
    """The rows of one split.

    Attributes:
        texts: one per row.
        pairs: the second text of each row, ``None`` where the task has single texts.
        labels: class indices, shape (rows,).
        keys: who owns each row (``partition.key``), ``None`` where nobody asked.
    """

    texts: tuple[str, ...]
    pairs: tuple[str, ...] | None
    labels: Rows
    keys: tuple[str, ...] | None = None

    def __len__(self) -> int:
        return len(self.texts)

    def take(self, rows: Rows) -> "TextTable":
        """The given rows in the given order."""
        return TextTable(
            texts=tuple(self.texts[row] for row in rows),
            pairs=self.pairs and tuple(self.pairs[row] for row in rows),
            labels=self.labels[rows],
            keys=self.keys and tuple(self.keys[row] for row in rows),
        )


@dataclass(frozen=True)
class TextData:
    """A classification task.

    Attributes:
        name: what the user called it.
        train: rows that are spread over the clients.
        test: rows on which the global model is measured.
        label_names: one per class, in the order of the class indices.
    """

    name: str
    train: TextTable
    test: TextTable
    label_names: tuple[str, ...]

    @cached_property
    def content_hash(self) -> str:
        """16 hexadecimal digits over texts, pairs, labels and names; owners do not count."""
        digest = hashlib.sha256()
        for part in self._content():
            digest.update(part)
        return digest.hexdigest()[:16]

    def _content(self) -> Iterator[bytes]:
        yield json.dumps(self.label_names).encode()
        for table in (self.train, self.test):
            # JSON, unlike plain joining, keeps ("ab", "c") and ("a", "bc") apart.
            yield json.dumps([table.texts, table.pairs]).encode()
            yield table.labels.astype("<i8").tobytes()
