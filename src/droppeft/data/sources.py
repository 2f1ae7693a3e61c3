"""Load labelled text from the built-in data set, the hub, a folder or a file. Ours."""

import hashlib
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Protocol, Self, TypeVar

import numpy as np
import numpy.typing as npt

from droppeft import seeds
from droppeft.config import SourceConfig
from droppeft.data.builtin import load_builtin, package_of
from droppeft.data.cells import Unsuitable, spelled
from droppeft.data.checks import compared, of_classes
from droppeft.data.columns import find_columns
from droppeft.data.findings import Findings
from droppeft.data.labelled_cells import Cells, findings_of, lacking_of, read_cells, table_of
from droppeft.data.labels import check_classes, indices_of, key_of_name, ordered, similar_names
from droppeft.data.missing_values import kept_rows, row_numbers
from droppeft.data.splits import Split, read_splits, read_test_split
from droppeft.data.texts import Rows, TextData, TextTable
from droppeft.errors import DroppeftError

__all__ = ["TextData", "TextTable", "load_text"]

TEST_FRACTION = 0.2
"""Share of the rows of each class that become the test split where there is none."""

SPLIT_BY_US = "there is no test split, so a fifth of the rows of each class is held out"

SUBSET_SEED = 0
"""Seed of the choice of ``max_train_rows`` and ``max_test_rows``, the same for every run."""


class Selectable(Protocol):
    """A table of rows."""

    def __len__(self) -> int: ...

    def take(self, rows: Rows, /) -> Self: ...


Table = TypeVar("Table", bound=Selectable)


def load_text(data: str, source: SourceConfig, key: str | None = None) -> TextData:
    """Load a classification task.

    The classes are the labels of the training split as they are spelled, in ascending order: of
    numbers, if all are numbers. Labels are text, integers, whole floats or booleans.

    Args:
        data: one of:

            - ``builtin``;
            - a folder of files that are named after their splits; shards such as
              ``train-00000-of-00002`` are joined;
            - a folder that ``save_to_disk`` of the datasets library wrote;
            - a single file, of the types in :data:`~droppeft.table_files.SUFFIXES`;
            - an id on the hub, with ``:name`` after it to choose a configuration
              (``nyu-mll/glue:mrpc``).

            Where there is no test split, a fifth of the texts of each class, chosen by a hash of
            the text, becomes one. Rows with equal texts are in the same split.
        source: columns and splits, if they are not found
            (:func:`~droppeft.data.columns.find_columns` and ``TEST_SPLITS``); what to do about rows
            that lack a value; and the largest number of rows. If a split has more, a random subset
            is used, which is the same in every run.
        key: column with the owner of each training row; ``package`` for the built-in data set.

    Raises:
        DroppeftError: the data cannot be found or read, a split or column does not exist, rows lack
            a value and ``source.missing`` is ``error``, the labels are no classes, or the test
            split has labels that the training split does not have.
    """
    if source.prompt is not None:
        raise DroppeftError("source.prompt does not apply to classification; leave it out")
    whole = _builtin(source, key) if data == "builtin" else _from_data(data, source, key)
    limited = replace(
        whole,
        train=at_most(whole.train, source.max_train_rows),
        test=at_most(whole.test, source.max_test_rows),
    )
    return replace(limited, findings=_checked(limited, len(whole.train) + len(whole.test)))


def load_test_texts(data: str, source: SourceConfig) -> TextData:
    """Load the test rows of a classification task, for a server without training rows.

    The classes are those of ``source.classes``, or else the labels of the test rows, in ascending
    order.

    Args:
        data: as for :func:`load_text`. Of a folder or a data set of the hub the test split is read,
            and of a single file all rows.
        source: as for :func:`load_text`.

    Returns:
        The task, whose ``train`` has no rows.

    Raises:
        DroppeftError: as :func:`load_text`, or a test row has a label that is not in
            ``source.classes``.
    """
    if data == "builtin":
        check_builtin_source(source, None)
        builtin = load_builtin()
        found = replace(
            builtin,
            test=replace(builtin.test, keys=None),
            findings=Findings(rows_read=len(builtin.test)),
        )
    else:
        found = _test_of_data(data, source)
    test = at_most(found.test, source.max_test_rows)
    findings = replace(
        found.findings,
        test_rows=len(test),
        beyond_limit=len(found.test) - len(test),
        similar_classes=similar_names(found.label_names),
    )
    train = test.take(np.zeros(0, np.int64))
    return replace(found, train=train, test=test, findings=findings)


def _checked(data: TextData, rows: int) -> Findings:
    """What is found about the rows that are used, of ``rows`` that could be."""
    used = len(data.train) + len(data.test)
    findings = replace(data.findings, beyond_limit=rows - used)
    findings = compared(
        findings, contents_of(data.train), contents_of(data.test), data.train.labels
    )
    return of_classes(findings, data.label_names, data.train.labels)


def contents_of(table: TextTable) -> Sequence[str | tuple[str, str]]:
    """Return the text of each row, or its pair of texts."""
    return list(zip(table.texts, table.pairs, strict=True)) if table.pairs else table.texts


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
    findings = Findings(rows_read=len(data.train) + len(data.test))
    owners = tuple(package_of(file) for file in data.train.keys or ()) if key else None
    return replace(
        data,
        train=replace(data.train, keys=owners),
        test=replace(data.test, keys=None),
        findings=findings,
    )


# From splits to a task


def _from_data(name: str, source: SourceConfig, key: str | None) -> TextData:
    train, test = read_splits(name, source)
    columns = find_columns(train, source)
    cells = [read_cells(split, columns, source) for split in ((train, test) if test else (train,))]
    if key:
        cells[0] = replace(cells[0], owners=owners(train, key))
    kept, missing = kept_rows(lacking_of(cells, columns, key, test=test), source.missing)
    classes, indices = _classes(cells, kept, columns.label)
    tables = [table_of(*of_split) for of_split in zip(cells, kept, indices, strict=True)]
    findings = findings_of(cells, columns, key, missing)
    if test is None:
        tables = _held_out(tables[0], train.where)
        findings = replace(findings, remarks=(*findings.remarks, SPLIT_BY_US))
    return TextData(name, tables[0], tables[1], classes, findings)


def _test_of_data(name: str, source: SourceConfig) -> TextData:
    split = read_test_split(name, source)
    columns = find_columns(split, source)
    cells = read_cells(split, columns, source)
    others = None if Path(name).expanduser().is_file() else split
    lacking = lacking_of([cells], columns, known=source.classes or (), test=others)
    kept, missing = kept_rows(lacking, source.missing)
    if source.classes is None:
        classes, [labels] = _classes([cells], kept, columns.label)
    else:
        classes, labels = source.classes, _of_classes(source.classes, cells, kept[0], columns.label)
    table = table_of(cells, kept[0], labels)
    return TextData(name, table, table, classes, findings_of([cells], columns, None, missing))


def _of_classes(classes: Sequence[str], cells: Cells, rows: Rows, label: str) -> Rows:
    """The class of each row, if all are among the given classes."""
    values = [cells.labels.values[row] for row in rows]
    index = indices_of(values, classes, cells.labels.stored)
    unknown = np.flatnonzero([value not in index for value in values])
    if unknown.size:
        raise DroppeftError(
            f"{cells.split.where}: {label} {values[unknown[0]]} in {row_numbers(rows[unknown])}"
            f"{cells.split.numbering} is not in source.classes ({', '.join(classes)}); add it "
            "there, or correct or remove such rows"
        )
    return np.array([index[value] for value in values], np.int64)


def _classes(
    cells: Sequence[Cells], kept: Sequence[Rows], label: str
) -> tuple[tuple[str, ...], list[Rows]]:
    """Return the names of the classes, and the class of each row that is kept."""
    values = [
        [one.labels.values[row] for row in rows] for one, rows in zip(cells, kept, strict=True)
    ]
    train = cells[0]
    classes = ordered(values[0], train.labels.stored)
    check_classes(classes, len(values[0]), train.split.where, label)
    index = indices_of(
        (value for of_split in values for value in of_split), classes, train.labels.stored
    )
    for one, rows, of_split in zip(cells, kept, values, strict=True):
        unknown = np.flatnonzero([value not in index for value in of_split])
        if unknown.size:
            raise _unknown(
                one.split, train.split, label, of_split[unknown[0]], rows[unknown], classes
            )
    return classes, [
        np.array([index[value] for value in of_split], np.int64) for of_split in values
    ]


def _unknown(
    split: Split, train: Split, label: str, value: str, rows: Rows, classes: Sequence[str]
) -> DroppeftError:
    numbering = f"{split.numbering}," if split.numbering else ""
    alike = [name for name in classes if key_of_name(name) == key_of_name(value)]
    hint = f", but {alike[0]!r} does; spell it alike" if alike else "; correct or remove such rows"
    return DroppeftError(
        f"{split.where}: {label} {value} in {row_numbers(rows)}{numbering} does not occur in "
        f"{train.where}"
        f"{hint}"
    )


def _held_out(table: TextTable, where: str) -> list[TextTable]:
    chosen = _test_rows(table)
    if not chosen.any():
        raise DroppeftError(
            f"{where} has too few rows per class for a test split, where equal texts count once; "
            "add rows or a test file"
        )
    test = replace(table.take(np.flatnonzero(chosen)), keys=None)
    return [table.take(np.flatnonzero(~chosen)), test]


def _test_rows(table: TextTable) -> npt.NDArray[np.bool_]:
    """Select the rows of the fifth of each class's texts that have the smallest hashes."""
    return with_smallest_hashes(hashes_of(table), table.labels)


def hashes_of(table: TextTable) -> list[str]:
    """Return a hash of the text or pair of texts of each row."""
    seconds = table.pairs or ("",) * len(table)
    texts = zip(table.texts, seconds, strict=True)
    return [hashlib.sha256(repr(text).encode()).hexdigest() for text in texts]


def with_smallest_hashes(hashes: Sequence[str], labels: Rows) -> npt.NDArray[np.bool_]:
    """Select all rows of the fifth of each label's distinct hashes that are the smallest.

    Rows with one hash are all selected, or none, whatever their labels are.
    """
    every = np.array(hashes)
    chosen: set[str] = set()
    for label in np.unique(labels):
        distinct = np.unique(every[labels == label])
        chosen.update(distinct[: round(TEST_FRACTION * len(distinct))])
    return np.isin(every, sorted(chosen))


def owners(split: Split, key: str) -> Sequence[str]:
    """Return the owner of each row, from the column ``key``; empty where it is missing."""
    column = split.column(key, "partition.key")
    try:
        return spelled(column)
    except Unsuitable:
        return ["" if owner is None else str(owner) for owner in column.to_pylist()]
