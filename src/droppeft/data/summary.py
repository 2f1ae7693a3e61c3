"""What is known of a data set before a run: for ``droppeft data``. Ours."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Literal

import numpy as np

from droppeft.config import Config, key_of
from droppeft.config.schema import TrainingConfig
from droppeft.data.conversation_sources import load_conversations
from droppeft.data.conversation_tokens import IGNORED, encode_conversations
from droppeft.data.conversations import ConversationData
from droppeft.data.sources import load_text
from droppeft.data.splits import read_splits
from droppeft.data.texts import Rows, TextData
from droppeft.data.tokens import UNTRUNCATED, tokenise
from droppeft.errors import DroppeftError

Kind = Literal["classification", "causal_lm"]

SETTINGS = ("task", "model", "training.max_length", "training.loss_on", "partition.key")
"""Settings of ``droppeft data`` besides the table ``source``."""


@dataclass(frozen=True)
class Part:
    """A piece of a rendered row; ``learnt`` says whether its tokens are learnt."""

    text: str
    learnt: bool


@dataclass(frozen=True)
class Shown:
    """A row of the training split, tokenised and truncated as for training.

    Attributes:
        row: its number, from 1, in the training split.
        parts: the texts of its tokens.
        tokens: number of tokens.
        label: name of its class or category; ``None`` if there is none.
    """

    row: int
    parts: tuple[Part, ...]
    tokens: int
    label: str | None


@dataclass(frozen=True)
class Summary:
    """What was recognised in a data set.

    Attributes:
        kind: ``classification`` or ``causal_lm``.
        shape: how the rows are stored.
        columns: names of all columns of the training split; empty for the built-in data.
        train_rows, test_rows: number of rows in each split.
        labels: number of training rows of each class or category.
        owners: number of training rows of each owner (``partition.key``), in descending order.
        max_length: largest number of tokens of a row.
        lengths: tokens of each training row before truncation, shape (rows,).
        truncated_ends: rows that lose the end of their completion or text.
        learnt: share of the tokens that are learnt; ``None`` for classification.
        shown: some rows.
    """

    kind: Kind
    shape: str
    columns: tuple[str, ...]
    train_rows: int
    test_rows: int
    labels: dict[str, int]
    owners: tuple[int, ...]
    max_length: int
    lengths: Rows
    truncated_ends: int
    learnt: float | None
    shown: tuple[Shown, ...]


def check_settings(overrides: Sequence[str]) -> None:
    """Refuse ``key=value`` settings that do not change how data are read and tokenised."""
    for key in map(key_of, overrides):
        if key not in SETTINGS and not key.startswith("source."):
            raise DroppeftError(
                f"{key} does not change what droppeft data shows; it takes "
                f"{', '.join(SETTINGS)} and settings that begin with source."
            )


def summarise(config: Config, tokenizer: Any, show: int) -> Summary:
    """Read, tokenise and summarise data; the first ``show`` training rows are shown.

    Raises:
        DroppeftError: the data cannot be read, or their rows cannot be rendered.
    """
    data, source, key = config.data, config.source, config.partition.key
    columns: tuple[str, ...] = ()
    if data != "builtin":
        columns = tuple(read_splits(data, source)[0].table.column_names)
    if config.task == "classification":
        loaded = load_text(data, source, key)
        return _texts(loaded, columns, tokenizer, config.training.max_length, show)
    return _conversations(
        load_conversations(data, source, key), columns, tokenizer, config.training, show
    )


def _texts(
    data: TextData, columns: tuple[str, ...], tokenizer: Any, max_length: int, show: int
) -> Summary:
    lengths = tokenise(data.train, tokenizer, UNTRUNCATED).lengths
    first = range(min(show, len(data.train)))
    table = tokenise(data.train.take(np.array(first, np.int64)), tokenizer, max_length)
    shown = tuple(
        Shown(
            row + 1,
            (Part(tokenizer.decode(table.row(row)["input_ids"]), learnt=False),),
            int(table.lengths[row]),
            data.label_names[table.labels[row]],
        )
        for row in range(len(first))
    )
    return Summary(
        kind="classification",
        shape="text pairs with labels" if data.train.pairs else "texts with labels",
        columns=columns,
        train_rows=len(data.train),
        test_rows=len(data.test),
        labels=_counts(data.train.labels, data.label_names),
        owners=_owners(data.train.keys),
        max_length=max_length,
        lengths=lengths,
        truncated_ends=int(np.sum(lengths > max_length)),
        learnt=None,
        shown=shown,
    )


def _conversations(
    data: ConversationData,
    columns: tuple[str, ...],
    tokenizer: Any,
    training: TrainingConfig,
    show: int,
) -> Summary:
    encoded = encode_conversations(data.train, tokenizer, training.max_length, training.loss_on)
    shown = []
    for row in range(min(show, len(encoded))):
        start, end = encoded.offsets[row : row + 2]
        ids = encoded.columns["input_ids"][start:end]
        label = data.label_names[data.train.labels[row]] if data.label_names else None
        parts = _parts(ids, encoded.labels[start:end] != IGNORED, tokenizer)
        shown.append(Shown(row + 1, parts, len(ids), label))
    return Summary(
        kind="causal_lm",
        shape=data.shape,
        columns=columns,
        train_rows=len(data.train),
        test_rows=len(data.test),
        labels=_counts(data.train.labels, data.label_names),
        owners=_owners(data.train.keys),
        max_length=training.max_length,
        lengths=encoded.full_lengths,
        truncated_ends=encoded.truncated_completions,
        learnt=float(encoded.targets.sum() / encoded.lengths.sum()),
        shown=tuple(shown),
    )


def _parts(ids: Any, learnt: Any, tokenizer: Any) -> tuple[Part, ...]:
    """Decode stretches of tokens that are all learnt, or all not."""
    borders = [0, *(np.flatnonzero(np.diff(learnt)) + 1).tolist(), len(ids)]
    return tuple(
        Part(tokenizer.decode(ids[start:end]), bool(learnt[start]))
        for start, end in pairwise(borders)
    )


def _counts(labels: Rows, names: Sequence[str]) -> dict[str, int]:
    counts = np.bincount(labels, minlength=len(names)).tolist()
    return dict(zip(names, counts, strict=False))


def _owners(keys: tuple[str, ...] | None) -> tuple[int, ...]:
    return tuple(sorted(Counter(keys or ()).values(), reverse=True))
