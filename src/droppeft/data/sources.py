"""Load labelled text from the built-in data set, the hub, a folder or a file. Ours."""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import replace
from typing import Protocol, Self, TypeVar

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from droppeft import seeds
from droppeft.config import SourceConfig
from droppeft.config.task_detection import LABEL_COLUMNS, TEXT_COLUMNS
from droppeft.data.builtin import load_builtin, package_of
from droppeft.data.splits import Split, read_splits
from droppeft.data.texts import Rows, TextData, TextTable
from droppeft.errors import DroppeftError

__all__ = ["TextData", "TextTable", "load_text"]

TEST_FRACTION = 0.2
"""Share of the rows of each class that become the test split of a single file."""

SUBSET_SEED = 0
"""Seed of the choice of ``max_train_rows`` and ``max_test_rows``, the same for every run."""


class Selectable(Protocol):
    """A table of rows."""

    def __len__(self) -> int: ...

    def take(self, rows: Rows, /) -> Self: ...


Table = TypeVar("Table", bound=Selectable)


def load_text(data: str, source: SourceConfig, key: str | None = None) -> TextData:
    """Load a classification task.

    The classes are the labels of the training split in ascending order. Labels are integers,
    booleans or strings.

    Args:
        data: one of:

            - ``builtin``;
            - a folder of .parquet, .csv, .jsonl or .json files that are named after their splits;
              shards such as ``train-00000-of-00002`` are joined;
            - a single file of these types; a fifth of the rows of each class, chosen by a hash of
              the text, becomes the test split;
            - an id on the hub, with ``:name`` after it to choose a configuration
              (``nyu-mll/glue:mrpc``).
        source: columns and splits, if they do not have the names in ``TEXT_COLUMNS``,
            ``LABEL_COLUMNS`` and ``TEST_SPLITS``; and the largest number of rows. If a split has
            more, a random subset is used, which is the same in every run.
        key: column with the owner of each training row; ``package`` for the built-in data set.

    Raises:
        DroppeftError: if the data cannot be found or read, a split or column does not exist, labels
            are missing or hidden, the test split has labels that the training split does not have,
            or there are fewer than two classes.
    """
    if source.prompt is not None:
        raise DroppeftError("source.prompt does not apply to classification; leave it out")
    if data == "builtin":
        whole = _builtin(source, key)
    else:
        train, test = read_splits(data, source)
        if test is None:
            whole = _from_file(data, train, source, key)
        else:
            whole = _from_splits(data, train, test, source, key)
    return replace(
        whole,
        train=at_most(whole.train, source.max_train_rows),
        test=at_most(whole.test, source.max_test_rows),
    )


def at_most(table: Table, most: int | None) -> Table:
    """Return a random subset of ``most`` rows, the same in every run, if there are more."""
    if most is None or len(table) <= most:
        return table
    generator = seeds.numpy_generator(SUBSET_SEED, purpose="subset of rows")
    return table.take(generator.permutation(len(table))[:most])


# The built-in data set


def check_builtin_source(source: SourceConfig, key: str | None) -> None:
    """Refuse settings for columns and splits, and another owner than ``package``."""
    for name in ("text", "label", "prompt", "completion", "train", "test"):
        if getattr(source, name) is not None:
            raise DroppeftError(f"source.{name} does not apply to data=builtin; leave it out")
    if key not in (None, "package"):
        raise DroppeftError(f"data=builtin has no column {key}; partition.key can be package")


def _builtin(source: SourceConfig, key: str | None) -> TextData:
    check_builtin_source(source, key)
    data = load_builtin()
    owners = tuple(package_of(file) for file in data.train.keys or ()) if key else None
    return replace(data, train=replace(data.train, keys=owners), test=replace(data.test, keys=None))


# From splits to a task


def _from_splits(
    name: str, train: Split, test: Split, source: SourceConfig, key: str | None
) -> TextData:
    text, label = _text_columns(train, source), _label_column(train, source)
    train_values, test_values = (label_values(split, label) for split in (train, test))
    classes = np.unique(train_values)
    _check_classes(classes, test_values, train, test, label)
    return TextData(
        name=name,
        train=_text_table(train, text, np.searchsorted(classes, train_values), key),
        test=_text_table(test, text, np.searchsorted(classes, test_values), None),
        label_names=class_names(classes, train.table.schema, label),
    )


def _from_file(name: str, whole: Split, source: SourceConfig, key: str | None) -> TextData:
    label = _label_column(whole, source)
    values = label_values(whole, label)
    classes = np.unique(values)
    _check_classes(classes, values, whole, whole, label)
    table = _text_table(whole, _text_columns(whole, source), np.searchsorted(classes, values), key)
    held_out = _test_rows(table)
    if not held_out.any():
        raise DroppeftError(
            f"{whole.where} has too few rows per class for a test split; add rows or a test file"
        )
    return TextData(
        name=name,
        train=table.take(np.flatnonzero(~held_out)),
        test=replace(table.take(np.flatnonzero(held_out)), keys=None),
        label_names=class_names(classes, whole.table.schema, label),
    )


def _test_rows(table: TextTable) -> npt.NDArray[np.bool_]:
    """Select the fifth of each class whose texts have the smallest hashes."""
    seconds = table.pairs or ("",) * len(table)
    texts = zip(table.texts, seconds, strict=True)
    hashes = np.array([hashlib.sha256(repr(text).encode()).hexdigest() for text in texts])
    chosen = np.zeros(len(table), bool)
    for label in np.unique(table.labels):
        rows = np.flatnonzero(table.labels == label)
        by_hash = rows[np.argsort(hashes[rows], kind="stable")]
        chosen[by_hash[: round(TEST_FRACTION * len(rows))]] = True
    return chosen


def _text_columns(split: Split, source: SourceConfig) -> Sequence[str]:
    if source.text is not None:
        return source.text
    present = set(split.table.column_names)
    found = next((names for names in TEXT_COLUMNS if present.issuperset(names)), None)
    if found is None:
        raise _not_found("text", split)
    return found


def _label_column(split: Split, source: SourceConfig) -> str:
    if source.label is not None:
        return source.label
    found = next((name for name in LABEL_COLUMNS if name in split.table.column_names), None)
    if found is None:
        raise _not_found("label", split)
    return found


def _not_found(what: str, split: Split) -> DroppeftError:
    columns = ", ".join(split.table.column_names)
    return DroppeftError(
        f"{split.where}: no {what} column found among {columns}; set source.{what} to its name, "
        "or task=causal_lm to learn to write texts"
    )


def label_values(split: Split, name: str) -> npt.NDArray[np.generic]:
    """Return the labels in column ``name``, as int64 or str."""
    column = split.column(name, "source.label")
    if is_text(column.type):
        return _named_labels(split, name, column)
    if not (pa.types.is_integer(column.type) or pa.types.is_boolean(column.type)):
        raise DroppeftError(
            f"{split.where}: {name} has type {column.type}; labels must be integers or text; "
            "neither regression nor several labels of a row can be learnt"
        )
    values: npt.NDArray[np.int64] = column.to_numpy().astype(np.int64)
    if (hidden := np.flatnonzero(values == -1)).size:
        raise DroppeftError(
            f"{split.where}: {name} is -1, a hidden label, in row {hidden[0] + 1}; "
            "use a split with labels, such as source.test=validation, or remove these rows"
        )
    return values


def _named_labels(split: Split, name: str, column: pa.ChunkedArray) -> npt.NDArray[np.str_]:
    values = np.array(column.to_pylist(), np.str_)
    if (empty := np.flatnonzero(values == "")).size:
        raise DroppeftError(f"{split.where}: {name} is missing in row {empty[0] + 1}")
    return values


def _check_classes(
    classes: npt.NDArray[np.generic],
    test_values: npt.NDArray[np.generic],
    train: Split,
    test: Split,
    label: str,
) -> None:
    if len(classes) < 2:
        raise DroppeftError(
            f"{train.where}: {label} has only one value, {classes[0]}; use two or more"
        )
    if classes.dtype.kind != test_values.dtype.kind:
        raise DroppeftError(
            f"{label} is a number in only one of {train.where} and {test.where}; use the same type"
        )
    unknown = np.flatnonzero(~np.isin(test_values, classes))
    if unknown.size:
        raise DroppeftError(
            f"{test.where}: {label} {test_values[unknown[0]]} in row {unknown[0] + 1} "
            f"does not occur in {train.where}"
        )


def class_names(classes: npt.NDArray[np.generic], schema: pa.Schema, label: str) -> tuple[str, ...]:
    """Return the names of the classes: those in Hugging Face's metadata, or else the labels."""
    names = _stored_names(schema, label)
    if classes.dtype.kind == "i" and classes[0] >= 0 and classes[-1] < len(names):
        return tuple(names[value] for value in classes)
    return tuple(str(value) for value in classes)


def _stored_names(schema: pa.Schema, label: str) -> Sequence[str]:
    try:
        stored = json.loads((schema.metadata or {})[b"huggingface"])
        return tuple(stored["info"]["features"][label]["names"])
    except (KeyError, TypeError, ValueError):
        return ()


def _text_table(
    split: Split, columns: Sequence[str], labels: npt.NDArray[np.intp], key: str | None
) -> TextTable:
    texts = [_text(split, name) for name in columns]
    return TextTable(
        texts=texts[0],
        pairs=texts[1] if len(texts) == 2 else None,
        labels=labels.astype(np.int64),
        keys=owners(split, key) if key else None,
    )


def _text(split: Split, name: str) -> tuple[str, ...]:
    column = split.column(name, "source.text")
    if not is_text(column.type):
        raise DroppeftError(f"{split.where}: {name} has type {column.type}, not text")
    return tuple(column.to_pylist())


def owners(split: Split, key: str) -> tuple[str, ...]:
    """Return the owner of each row, from the column ``key``."""
    return tuple(str(owner) for owner in split.column(key, "partition.key").to_pylist())


def is_text(kind: pa.DataType) -> bool:
    """Whether a column of this type holds texts."""
    return bool(
        pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind)
    )
