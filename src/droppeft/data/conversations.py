"""Conversations and documents in memory: what a causal language model learns from. Ours."""

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import chain
from typing import Literal

import numpy as np

from droppeft.data.findings import Findings
from droppeft.data.texts import Rows, hash_of

Role = Literal["system", "user", "assistant"]


@dataclass(frozen=True)
class Message:
    """What one participant of a conversation says."""

    role: Role
    content: str


@dataclass(frozen=True)
class Conversation:
    """Messages, at least one of which is the assistant's; a prompt with its completion has two."""

    messages: tuple[Message, ...]


@dataclass(frozen=True)
class Document:
    """A plain text, all of which is learnt."""

    text: str


Example = Conversation | Document


@dataclass(frozen=True)
class ConversationTable:
    """The rows of one split.

    Attributes:
        rows: the conversations or documents.
        labels: category of each row, shape (rows,); all 0 if the rows have no categories.
        keys: the owner of each row (``partition.key``); ``None`` if it was not requested.
    """

    rows: tuple[Example, ...]
    labels: Rows
    keys: tuple[str, ...] | None = None

    def __len__(self) -> int:
        return len(self.rows)

    def take(self, rows: Rows) -> "ConversationTable":
        """Return a table of the given rows, in the given order."""
        return ConversationTable(
            rows=tuple(self.rows[row] for row in rows),
            labels=self.labels[rows],
            keys=self.keys and tuple(self.keys[row] for row in rows),
        )

    def content(self) -> Iterator[bytes]:
        """Yield rows and categories, to be hashed."""
        yield json.dumps([content_of(row) for row in self.rows]).encode()
        yield self.labels.astype("<i8").tobytes()

    @classmethod
    def joined(cls, tables: "Sequence[ConversationTable]") -> "ConversationTable":
        """Return the rows of several tables, one after another, without their owners."""
        return cls(
            rows=tuple(chain.from_iterable(one.rows for one in tables)),
            labels=np.concatenate([one.labels for one in tables]),
        )


@dataclass(frozen=True)
class ConversationData:
    """A task for a causal language model.

    Attributes:
        name: the value of the setting ``data``.
        shape: which columns the rows were read from, a name in
            :data:`~droppeft.data.conversation_shapes.SHAPES`.
        train: rows that are partitioned among the clients.
        test: rows on which the server evaluates the global model.
        label_names: name of each category; empty if the rows have none.
        findings: what reading found and did.
    """

    name: str
    shape: str
    train: ConversationTable
    test: ConversationTable
    label_names: tuple[str, ...]
    findings: Findings = field(default_factory=Findings)

    @cached_property
    def content_hash(self) -> str:
        """Hash of rows, categories and their names, not of owners: 16 hexadecimal digits."""
        return hash_of(self._content())

    def _content(self) -> Iterator[bytes]:
        yield json.dumps(self.label_names).encode()
        for table in (self.train, self.test):
            yield from table.content()


def content_of(row: Example) -> object:
    """Return a row as a text, or as a list of pairs (role, content)."""
    if isinstance(row, Document):
        return row.text
    return [[message.role, message.content] for message in row.messages]


def prompt_of(row: Example) -> tuple[Message, ...]:
    """Return the messages before the last one of the assistant; none for a document."""
    if isinstance(row, Document):
        return ()
    return row.messages[: _last_answer(row)]


def reference_of(row: Example) -> str:
    """Return the last message of the assistant, or the text of a document."""
    return row.text if isinstance(row, Document) else row.messages[_last_answer(row)].content


def prompts_and_references(
    table: ConversationTable, rows: Rows, most: int
) -> tuple[list[tuple[Message, ...]], list[str]]:
    """Return the prompt and the reference of the first ``most`` of some rows that have a prompt."""
    pairs = [(prompt_of(row), reference_of(row)) for row in table.take(rows).rows]
    chosen = [pair for pair in pairs if pair[0]][:most]
    return [prompt for prompt, _ in chosen], [reference for _, reference in chosen]


def _last_answer(row: Conversation) -> int:
    roles = [message.role for message in row.messages]
    return len(roles) - 1 - roles[::-1].index("assistant")
