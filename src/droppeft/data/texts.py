"""Labelled text in memory. Ours."""

import hashlib
import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import chain

import numpy as np
import numpy.typing as npt

from droppeft.data.findings import Findings

Rows = npt.NDArray[np.int64]


def hash_of(parts: Iterable[bytes]) -> str:
    """Return a hash of parts of data in their order: 16 hexadecimal digits."""
    digest = hashlib.sha256()
    for part in parts:
        digest.update(part)
    return digest.hexdigest()[:16]


@dataclass(frozen=True)
class TextTable:
    """The rows of one split.

    Attributes:
        texts: the text of each row.
        pairs: the second text of each row; ``None`` if the task has single texts.
        labels: class indices, shape (rows,).
        keys: the owner of each row (``partition.key``); ``None`` if it was not requested.
    """

    texts: tuple[str, ...]
    pairs: tuple[str, ...] | None
    labels: Rows
    keys: tuple[str, ...] | None = None

    def __len__(self) -> int:
        return len(self.texts)

    def take(self, rows: Rows) -> "TextTable":
        """Return a table of the given rows, in the given order."""
        return TextTable(
            texts=tuple(self.texts[row] for row in rows),
            pairs=self.pairs and tuple(self.pairs[row] for row in rows),
            labels=self.labels[rows],
            keys=self.keys and tuple(self.keys[row] for row in rows),
        )

    def content(self) -> Iterator[bytes]:
        """Yield texts, pairs and labels, to be hashed."""
        # JSON distinguishes ("ab", "c") from ("a", "bc"), which joining would not.
        yield json.dumps([self.texts, self.pairs]).encode()
        yield self.labels.astype("<i8").tobytes()

    @classmethod
    def joined(cls, tables: "Sequence[TextTable]") -> "TextTable":
        """Return the rows of several tables, one after another, without their owners."""
        pairs = [one.pairs for one in tables if one.pairs is not None]
        return cls(
            texts=tuple(chain.from_iterable(one.texts for one in tables)),
            pairs=tuple(chain.from_iterable(pairs)) if pairs else None,
            labels=np.concatenate([one.labels for one in tables]),
        )


@dataclass(frozen=True)
class TextData:
    """A classification task.

    Attributes:
        name: the value of the setting ``data``.
        train: rows that are partitioned among the clients.
        test: rows on which the server evaluates the global model.
        label_names: name of each class, in the order of the class indices.
        findings: what reading found and did.
    """

    name: str
    train: TextTable
    test: TextTable
    label_names: tuple[str, ...]
    findings: Findings = field(default_factory=Findings)

    @cached_property
    def content_hash(self) -> str:
        """Hash of texts, pairs, labels and label names, not of owners or findings.

        It has 16 hexadecimal digits.
        """
        return hash_of(self._content())

    def _content(self) -> Iterator[bytes]:
        yield json.dumps(self.label_names).encode()
        for table in (self.train, self.test):
            yield from table.content()
