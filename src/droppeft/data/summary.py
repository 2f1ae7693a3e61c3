"""What is known of a data set before a run: for ``droppeft data``. Ours."""

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal, overload

import numpy as np

from droppeft.config import Config, key_of
from droppeft.config.task_detection import columns_of
from droppeft.data.checks import measured, partitioned
from droppeft.data.conversation_sources import load_conversations, load_test_conversations
from droppeft.data.conversation_tokens import IGNORED, encode_conversations
from droppeft.data.conversations import ConversationData, ConversationTable
from droppeft.data.findings import Findings
from droppeft.data.language import with_language
from droppeft.data.partition import owners_of, partition_rows
from droppeft.data.sources import load_test_texts, load_text
from droppeft.data.texts import Rows, TextData, TextTable
from droppeft.data.tokens import UNTRUNCATED, tokenise
from droppeft.errors import DroppeftError

Kind = Literal["classification", "causal_lm"]

SETTINGS = ("task", "model", "training.max_length", "training.loss_on", "clients", "seed")
"""Settings of ``droppeft data`` besides those of the tables in ``TABLES``."""

TABLES = ("source.", "partition.")


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
class Clients:
    """How the training rows are spread over the clients.

    Attributes:
        rows: number of rows of each client.
        labels: number of classes or categories of each client.
    """

    rows: tuple[int, ...]
    labels: tuple[int, ...]


@dataclass(frozen=True)
class Summary:
    """What was recognised in a data set.

    Attributes:
        kind: ``classification`` or ``causal_lm``.
        shape: how the rows are stored.
        columns: names of all columns of the training split; empty where they are not known.
        train_rows, test_rows: number of rows in each split.
        labels: number of training and of test rows of each class or category.
        owners: number of training rows of each owner (``partition.key``), in descending order.
        clients: the clients of a run with the same settings, or a text in their place, such as why
            there can be none.
        max_length: largest number of tokens of a row.
        lengths: tokens of each training row before truncation, shape (rows,).
        truncated_ends: rows that lose the end of their completion or text.
        learnt: share of the tokens that are learnt; ``None`` for classification.
        findings: what reading found and did.
        shown: some rows.
    """

    kind: Kind
    shape: str
    columns: tuple[str, ...]
    train_rows: int
    test_rows: int
    labels: dict[str, tuple[int, int]]
    owners: tuple[int, ...]
    clients: Clients | str
    max_length: int
    lengths: Rows
    truncated_ends: int
    learnt: float | None
    findings: Findings
    shown: tuple[Shown, ...]


def check_settings(overrides: Sequence[str]) -> None:
    """Refuse ``key=value`` settings that do not change how data are read and tokenised."""
    for key in map(key_of, overrides):
        if key not in SETTINGS and not key.startswith(TABLES):
            raise DroppeftError(
                f"{key} does not change what droppeft data shows; it takes "
                f"{', '.join(SETTINGS)} and settings that begin with source. or partition."
            )


def summarise(config: Config, load_tokenizer: Callable[[], Any], show: int) -> Summary:
    """Read, tokenise and summarise data; the first ``show`` training rows are shown.

    Args:
        config: settings of a run with these data.
        load_tokenizer: loads that of the model, after the data have been read.
        show: number of rows.

    Raises:
        DroppeftError: the data cannot be read, or their rows cannot be rendered.
    """
    columns = () if config.data == "builtin" else columns_of(Path(config.data).expanduser())
    data, source, key = config.data, config.source, config.partition.key
    sites = config.partition.kind == "sites"
    if config.task == "classification":
        texts = load_test_texts(data, source) if sites else load_text(data, source, key)
        tokenizer = load_tokenizer()
        summary = _texts(texts, config, tokenizer, show)
    else:
        conversations = (
            load_test_conversations(data, source)
            if sites
            else load_conversations(data, source, key)
        )
        tokenizer = load_tokenizer()
        summary = _conversations(conversations, config, tokenizer, show)
    longest = tokenizer.model_max_length
    findings = measured(summary.findings, summary.lengths, config.training.max_length, longest)
    return replace(summary, columns=tuple(columns), findings=findings)


def _texts(data: TextData, config: Config, tokenizer: Any, show: int) -> Summary:
    max_length = config.training.max_length
    lengths = tokenise(_main(data), tokenizer, UNTRUNCATED).lengths
    clients, findings = _clients(data, config)
    findings = with_language(findings, _main(data).texts, tokenizer)
    return Summary(
        kind="classification",
        shape="text pairs with labels" if _main(data).pairs else "texts with labels",
        columns=(),
        train_rows=len(data.train),
        test_rows=len(data.test),
        labels=_counts(data),
        owners=_owners(data.train.keys),
        clients=clients,
        max_length=max_length,
        lengths=lengths,
        truncated_ends=int(np.sum(lengths > max_length)),
        learnt=None,
        findings=findings,
        shown=tuple(_shown_texts(data, tokenizer, max_length, show)),
    )


def _shown_texts(data: TextData, tokenizer: Any, max_length: int, show: int) -> Iterator[Shown]:
    first = _main(data).take(np.arange(min(show, len(_main(data)))))
    if not show:
        return
    table = tokenise(first, tokenizer, max_length)
    for row in range(len(table)):
        ids = table.row(row)["input_ids"]
        part = Part(tokenizer.decode(ids), learnt=False)
        yield Shown(row + 1, (part,), len(ids), data.label_names[first.labels[row]])


def _conversations(data: ConversationData, config: Config, tokenizer: Any, show: int) -> Summary:
    training = config.training
    table = _main(data)
    encoded = encode_conversations(table, tokenizer, training.max_length, training.loss_on)
    shown = []
    for row in range(min(show, len(encoded))):
        start, end = encoded.offsets[row : row + 2]
        ids = encoded.columns["input_ids"][start:end]
        label = data.label_names[table.labels[row]] if data.label_names else None
        parts = _parts(ids, encoded.labels[start:end] != IGNORED, tokenizer)
        shown.append(Shown(row + 1, parts, len(ids), label))
    clients, findings = _clients(data, config)
    return Summary(
        kind="causal_lm",
        shape=data.shape,
        columns=(),
        train_rows=len(data.train),
        test_rows=len(data.test),
        labels=_counts(data),
        owners=_owners(data.train.keys),
        clients=clients,
        max_length=training.max_length,
        lengths=encoded.full_lengths,
        truncated_ends=encoded.truncated_completions,
        learnt=float(encoded.targets.sum() / encoded.lengths.sum()),
        findings=findings,
        shown=tuple(shown),
    )


@overload
def _main(data: TextData) -> TextTable: ...


@overload
def _main(data: ConversationData) -> ConversationTable: ...


def _main(data: TextData | ConversationData) -> TextTable | ConversationTable:
    """The rows whose lengths are shown: those to train, or of a server of sites those to test."""
    return data.train if len(data.train) else data.test


def _clients(data: TextData | ConversationData, config: Config) -> tuple[Clients | str, Findings]:
    """Return the clients of a run, and what is found with the rows that they leave out."""
    train: TextTable | ConversationTable = data.train
    settings = config.partition
    if settings.kind == "sites":
        return "each brings rows of its own", data.findings
    try:
        count = config.clients or len(owners_of(train.keys, settings))
        clients = partition_rows(train.labels, train.keys, count, settings, config.seed)
    except DroppeftError as reason:
        return f"none: {reason}", data.findings
    rows = [np.concatenate(one.parts) for one in clients]
    sizes = tuple(len(one) for one in rows)
    labels = tuple(len(np.unique(train.labels[one])) for one in rows)
    return Clients(sizes, labels), partitioned(
        data.findings, train.keys, clients, settings.min_rows
    )


def _parts(ids: Any, learnt: Any, tokenizer: Any) -> tuple[Part, ...]:
    """Decode stretches of tokens that are all learnt, or all not."""
    borders = [0, *(np.flatnonzero(np.diff(learnt)) + 1).tolist(), len(ids)]
    return tuple(
        Part(tokenizer.decode(ids[start:end]), bool(learnt[start]))
        for start, end in pairwise(borders)
    )


def _counts(data: TextData | ConversationData) -> dict[str, tuple[int, int]]:
    names = data.label_names
    train, test = (
        np.bincount(table.labels, minlength=len(names)).tolist()
        for table in (data.train, data.test)
    )
    return dict(zip(names, zip(train, test, strict=True), strict=False))


def _owners(keys: tuple[str, ...] | None) -> tuple[int, ...]:
    return tuple(sorted(Counter(keys or ()).values(), reverse=True))
